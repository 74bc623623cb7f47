"""What ``loadgen simulate`` is asked to do: a scenario file, and what the command line puts in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from loadgen.commands.policy_spec import parse_policies, parse_policy
from loadgen.commands.scenario import Scenario, WorkloadChoice
from loadgen.commands.scenario_file import ScenarioFile, load_scenario
from loadgen.report.tables import PublishedFigures
from loadgen.simulator import SimulatedPolicy

DEFAULT_POLICIES = "join-shortest-queue,least-kv,br-0,br-h"


@dataclass(frozen=True, slots=True)
class SimulationPlan:
    """The scenario of each seed, the policies by label, and published figures by label."""

    scenario: Callable[[int], Scenario]
    policies: Mapping[str, SimulatedPolicy]
    seeds: int
    published: Mapping[str, PublishedFigures]


def plan_simulation(
    path: Path | None,
    policies: str | None,
    predictor: str | None,
    trace: Path | None,
    workers: int | None,
    rate: float | None,
) -> SimulationPlan:
    """Put a scenario file and the command line's choices together; raises InvalidInputError."""
    file = ScenarioFile(policies=DEFAULT_POLICIES.split(",")) if path is None else load_scenario(path)
    folder = Path() if path is None else path.parent
    default_predictor = predictor or file.predictor
    if policies is None:
        chosen = {text: parse_policy(text, default_predictor) for text in file.policies}
    else:
        chosen = parse_policies(policies, default_predictor)
    return SimulationPlan(
        partial(_scenario, file, folder, trace, workers, rate),
        chosen,
        file.seeds,
        {row.policy: (row.imbalance_kv_tokens, row.tpot_ms_p95) for row in file.paper},
    )


def _scenario(
    file: ScenarioFile, folder: Path, trace: Path | None, workers: int | None, rate: float | None, seed: int
) -> Scenario:
    scenario = file.scenario(folder, seed, workers, rate)
    if trace is None:
        return scenario
    # A trace named on the command line comes with its own times unless a rate is given as well.
    arrivals = scenario.arrivals if rate is not None else replace(scenario.arrivals, rate=None)
    return replace(scenario, workload=WorkloadChoice(trace=trace, requests=None), arrivals=arrivals)
