"""``loadgen simulate``: policies side by side in virtual time, repeated over seeds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from loadgen.commands.scenario import Scenario
from loadgen.packing import packed_makespan_s
from loadgen.report.schema import Percentiles, PolicyResult, Report
from loadgen.report.statistics import half_width_95, percentiles
from loadgen.simulator import SimulatedPolicy, Simulation, simulate

FloatArray = NDArray[np.float64]

_FIGURES = (
    "imbalance_kv_tokens",
    "idle_fraction",
    "throughput_of_perfect",
    "output_tokens_per_s",
    "tpot_ms_p95",
    "ttft_ms_p95",
    "wait_ms_p99",
    "mean_kv_tokens",
    "prefill_balance",
    "preemptions",
    "ttft_ms_p50",
    "makespan_s",
    "makespan_of_packed",
)


@dataclass(frozen=True, slots=True)
class _Job:
    label: str
    choice: SimulatedPolicy
    scenario: Scenario


def simulate_all(
    scenario: Callable[[int], Scenario],
    policies: Mapping[str, SimulatedPolicy],
    seeds: Sequence[int],
    on_done: Callable[[str], None],
    processes: int | None = None,
) -> Report:
    """Simulate every policy with every seed; ``scenario`` gives the scenario of a seed.

    ``processes`` run at once, by default one for each core. The report has means over the seeds, and
    half-widths of 95 % confidence intervals where there are several.
    """
    jobs = [_Job(label, choice, scenario(seed)) for (label, choice), seed in product(policies.items(), seeds)]
    results: dict[str, list[PolicyResult]] = {label: [] for label in policies}
    for job, result in zip(jobs, _run(jobs, processes or os.cpu_count() or 1), strict=True):
        results[job.label].append(result)
        on_done(job.label)
    described = describe(scenario(seeds[0]), len(seeds))
    return Report(scenario=described, policies=[mean_of(runs) for runs in results.values()])


def describe(first: Scenario, seeds: int) -> dict[str, str | int | float | None]:
    """Return what is simulated as it goes into the report; ``first`` is the first seed's."""
    workload, capacity = first.draw()
    packed_s = packed_makespan_s(workload, first.cluster) if first.arrivals.at_once else None
    return first.describe(workload) | {
        "seeds": seeds,
        "dispatch_steps": first.cluster.dispatch_steps,
        "perfect_output_tokens_per_s": capacity.output_tokens_per_s,
        "perfect_requests_per_s": capacity.requests_per_s,
        "packed_makespan_s": packed_s,
    }


def _run(jobs: Sequence[_Job], processes: int) -> Iterator[PolicyResult]:
    if processes == 1 or len(jobs) == 1:
        yield from map(_one, jobs)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(_one, jobs)


def _one(job: _Job) -> PolicyResult:
    workload, capacity = job.scenario.draw()
    scenario = job.scenario
    cluster, seed = scenario.cluster, scenario.seed
    learnt = None
    for epoch in scenario.earlier_epochs():
        learnt = simulate(epoch, cluster, job.choice, seed, learnt=learnt).learnt
    simulation = simulate(workload, cluster, job.choice, seed, learnt=learnt)
    if scenario.transfer_s_per_token:
        sent_s = np.array([request.prompt_tokens for request in workload.requests])
        sent_s = sent_s * scenario.transfer_s_per_token
        simulation = replace(simulation, ttft_s=simulation.ttft_s + sent_s)
    result = policy_result(job.label, simulation, capacity.output_tokens_per_s)
    if not scenario.arrivals.at_once or simulation.makespan_s is None:
        return result
    of_packed = simulation.makespan_s / packed_makespan_s(workload, cluster)
    return result.model_copy(update={"makespan_of_packed": of_packed})


def policy_result(label: str, simulation: Simulation, perfect_tokens_per_s: float) -> PolicyResult:
    """Put a simulation's figures into the report's form; over its steady part, except for losses."""
    from_s, to_s = simulation.steady_s
    length_s = to_s - from_s
    tokens_per_s = simulation.barrier.output_tokens / length_s if length_s > 0 else None
    steady = simulation.steady
    tpot_ms, ttft_ms = _percentiles(simulation.tpot_s[steady]), _percentiles(simulation.ttft_s[steady])
    wait_ms = _percentiles(simulation.wait_s[steady])
    return PolicyResult(
        policy=label,
        imbalance_kv_tokens=simulation.barrier.imbalance_kv_tokens,
        idle_fraction=simulation.barrier.idle_fraction,
        throughput_of_perfect=tokens_per_s / perfect_tokens_per_s if tokens_per_s else None,
        output_tokens_per_s=tokens_per_s,
        tpot_ms_p95=tpot_ms.p95 if tpot_ms else None,
        ttft_ms_p95=ttft_ms.p95 if ttft_ms else None,
        wait_ms_p99=wait_ms.p99 if wait_ms else None,
        mean_kv_tokens=simulation.barrier.mean_kv_tokens,
        prefill_balance=simulation.barrier.prefill_balance,
        preemptions=simulation.preemptions,
        makespan_s=simulation.makespan_s,
        ttft_ms_p50=ttft_ms.p50 if ttft_ms else None,
        requests=len(simulation.finished),
        lost=int((~simulation.finished & ~simulation.aborted).sum()),
        tpot_ms=tpot_ms,
        ttft_ms=ttft_ms,
    )


def _percentiles(values_s: FloatArray) -> Percentiles | None:
    return percentiles(values_s[~np.isnan(values_s)].tolist())


def mean_of(runs: Sequence[PolicyResult]) -> PolicyResult:
    """Return the means over runs that differ by their seed, with the intervals' half-widths."""
    if len(runs) == 1:
        return runs[0]
    means: dict[str, float] = {}
    intervals: dict[str, float] = {}
    by_seed: dict[str, list[float]] = {}
    for figure in _FIGURES:
        values = [value for run in runs if (value := getattr(run, figure)) is not None]
        if len(values) < len(runs):
            continue
        by_seed[figure] = values
        means[figure] = float(np.mean(values))
        intervals[figure] = half_width_95(values)
    totals = {"requests": sum(run.requests for run in runs), "lost": sum(run.lost for run in runs)}
    spread = {"intervals": intervals, "by_seed": by_seed}
    return runs[0].model_copy(update=means | totals | spread | {"tpot_ms": None, "ttft_ms": None})
