"""What ``loadgen simulate`` is asked to do: a scenario file, and what the command line puts in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from brproxy.routing.policy import make_policy
from brproxy.types import InvalidInputError
from loadgen.commands.calibration import Calibration
from loadgen.commands.policy_spec import parse_policies, parse_policy
from loadgen.commands.scenario import Scenario
from loadgen.commands.scenario_file import ScenarioFile, load_scenario
from loadgen.report.tables import BEST_BASELINE, PublishedFigures
from loadgen.simulator import SimulatedPolicy

DEFAULT_POLICIES = "join-shortest-queue,least-kv,br-0,br-h"


@dataclass(frozen=True, slots=True)
class SimulationPlan:
    """The scenario of each seed, and the policies and published figures by label."""

    title: str
    scenario: Callable[[int], Scenario]
    policies: Mapping[str, SimulatedPolicy]
    seeds: int
    published: Mapping[str, PublishedFigures]

    def with_requests(self, per_worker: int | None) -> SimulationPlan:
        """Return the plan with so many requests for each worker, of a trace the first; None: as it is.

        Published figures are of as many as the file says.
        """
        if per_worker is None:
            return self
        return replace(self, scenario=partial(_with_requests, self.scenario, per_worker), published={})


def _with_requests(scenario: Callable[[int], Scenario], per_worker: int, seed: int) -> Scenario:
    drawn = scenario(seed)
    workload = replace(drawn.workload, requests=per_worker * drawn.cluster.workers)
    return replace(drawn, workload=workload)


def plan_simulation(
    path: Path | None,
    policies: str | None,
    predictor: str | None,
    trace: Path | None,
    workers: int | None,
    rate: float | None,
    dispatch_steps: int | None = None,
    calibration: Calibration | None = None,
) -> SimulationPlan:
    """Put a scenario file and the command line's choices together; raises InvalidInputError.

    What is None on the command line is as the file says. ``calibration`` is the deployment instead of the
    file's.
    """
    if calibration is not None and workers is not None:
        msg = "--workers and --calibrated-from both say how many there are; give one of them"
        raise InvalidInputError(msg)
    file = ScenarioFile(policies=DEFAULT_POLICIES.split(",")) if path is None else load_scenario(path)
    if file.prefill is not None and not file.prefill.shares_barrier:
        msg = f"{path}: [prefill] is for loadgen compare: only workers that share a barrier are simulated"
        raise InvalidInputError(msg)
    folder = Path() if path is None else path.parent
    default_predictor = predictor or file.predictor
    if policies is None:
        chosen = {text: parse_policy(text, default_predictor) for text in file.policies}
    else:
        chosen = parse_policies(policies, default_predictor)
    same_deployment = (
        trace is None
        and calibration is None
        and workers in {None, file.cluster.workers}
        and rate in {None, file.arrivals.rate}
    )
    return SimulationPlan(
        file.title,
        partial(_scenario, file, folder, trace, workers, rate, dispatch_steps, calibration),
        chosen,
        file.seeds,
        _published(file, chosen) if same_deployment else {},
    )


def _published(file: ScenarioFile, chosen: Mapping[str, SimulatedPolicy]) -> dict[str, PublishedFigures]:
    """Return the published figures of ``chosen`` by label; ``br-h`` with the oracle is ``br-h@oracle``."""
    figures = {
        row.policy: PublishedFigures(row.output_tokens_per_s, row.imbalance_kv_tokens, row.tpot_ms_p95)
        for row in file.paper
    }
    best_baseline = figures.pop(BEST_BASELINE, None)
    by_choice = {_decisive(parse_policy(text, file.predictor)): row for text, row in figures.items()}
    published = {label: by_choice.get(_decisive(choice)) for label, choice in chosen.items()}
    return {
        label: row for label, row in {**published, BEST_BASELINE: best_baseline}.items() if row is not None
    }


def _decisive(choice: SimulatedPolicy) -> SimulatedPolicy:
    """Return ``choice`` without a predictor that its policy does not ask."""
    far_turnover_steps = 100.0
    discounts = make_policy(choice.policy, choice.policy_params).discounts(far_turnover_steps, 1.0)
    return choice if len(discounts) > 1 else replace(choice, predictor="")


def _scenario(
    file: ScenarioFile,
    folder: Path,
    trace: Path | None,
    workers: int | None,
    rate: float | None,
    dispatch_steps: int | None,
    calibration: Calibration | None,
    seed: int,
) -> Scenario:
    count = workers if calibration is None else calibration.cluster.workers
    if calibration is not None:
        # What the file says of each of its workers is of others.
        plain = file.cluster.model_copy(update={"slots_each": [], "slowness": []})
        file = file.model_copy(update={"cluster": plain})
    scenario = file.scenario(folder, seed, count, rate)
    if calibration is not None:
        scenario = calibration.of(scenario, rate)
    scenario = scenario.prefill_side()
    if dispatch_steps is not None:
        scenario = replace(scenario, cluster=replace(scenario.cluster, dispatch_steps=dispatch_steps))
    if trace is None:
        return scenario
    # A trace named on the command line comes with its own times unless a rate is given as well.
    arrivals = scenario.arrivals if rate is not None else replace(scenario.arrivals, rate=None)
    # A folder of clients is a day of a large service: of it come as many requests as the scenario has.
    requests = scenario.workload.requests if trace.is_dir() else None
    workload = replace(scenario.workload, trace=trace, requests=requests)
    return replace(scenario, workload=workload, arrivals=arrivals)
