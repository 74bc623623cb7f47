"""What the simulator says of a comparison over sockets: the same requests, deployment and policies.

A proxy learns what a step costs from what passes through it, so the simulated one does. It learns, ticks and
waits in real seconds, so a deployment that is emulated faster than real time is simulated as it is: with
steps that are as much shorter.
"""

from __future__ import annotations

from dataclasses import replace

from brproxy.types import InvalidInputError
from loadgen.arrivals import faster
from loadgen.capacity import Capacity
from loadgen.commands.scenario import Scenario
from loadgen.commands.simulate import policy_result
from loadgen.report.schema import PolicyResult
from loadgen.simulator import SimulatedPolicy, simulate
from loadgen.workload import Workload

_TIMES = ("tpot_ms_p95", "ttft_ms_p95", "ttft_ms_p50", "wait_ms_p99", "makespan_s")


def must_be_simulated(scenario: Scenario) -> None:
    """Raise InvalidInputError for what only a comparison over sockets has."""
    if scenario.prefill is not None:
        msg = "the simulator has no prefill workers: leave out --beside-simulator, or them"
        raise InvalidInputError(msg)


def simulated_result(
    policy: str, workload: Workload, capacity: Capacity, scenario: Scenario, speed: float
) -> PolicyResult:
    """Simulate ``policy``, by its name, at ``speed``; figures are at normal speed, as the comparison's."""
    cluster = scenario.cluster
    emulated = replace(
        cluster,
        step_base_s=cluster.step_base_s / speed,
        step_s_per_kv_token=cluster.step_s_per_kv_token / speed,
        prefill_s_per_token=cluster.prefill_s_per_token / speed,
    )
    choice = SimulatedPolicy(policy, learns_costs=True)
    simulation = simulate(faster(workload, speed), emulated, choice, scenario.seed)
    result = policy_result(policy, simulation, capacity.output_tokens_per_s * speed)
    # Of the latencies the percentiles that are compared are enough.
    figures: dict[str, float | None] = {"tpot_ms": None, "ttft_ms": None}
    for name, factor in (*((name, speed) for name in _TIMES), ("output_tokens_per_s", 1 / speed)):
        value = getattr(result, name)
        figures[name] = None if value is None else value * factor
    return result.model_copy(update=figures)
