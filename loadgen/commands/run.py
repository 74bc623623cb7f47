"""``loadgen run``: replay a workload against a URL and report what its users would have seen."""

from __future__ import annotations

from collections.abc import Callable

from loadgen.client import ClientSettings, Outcome, Replay
from loadgen.commands.scenario import Scenario
from loadgen.report.schema import PolicyResult, Report
from loadgen.report.statistics import (
    LatencySummary,
    Slo,
    client_warnings,
    failures,
    goodput_requests_per_s,
    latencies,
    run_length_s,
)
from loadgen.workload import Workload


async def run(
    workload: Workload,
    scenario: Scenario,
    settings: ClientSettings,
    slo: Slo,
    label: str,
    on_finished: Callable[[Outcome], None],
) -> Report:
    """Replay ``workload`` and report it as one policy called ``label``."""
    outcomes = await Replay(workload, settings, on_finished).run()
    length_s = run_length_s(outcomes)
    tokens = sum(outcome.output_tokens for outcome in outcomes)
    result = policy_result(
        label,
        outcomes,
        latencies(outcomes),
        output_tokens_per_s=tokens / length_s if length_s > 0 else None,
        warnings=client_warnings(outcomes, settings.speed),
    )
    result.goodput_requests_per_s = goodput_requests_per_s(outcomes, slo)
    described = scenario.describe(workload) | {"target": settings.target, "speed": settings.speed}
    return Report(scenario=described, policies=[result])


def policy_result(
    label: str,
    outcomes: list[Outcome],
    summary: LatencySummary,
    *,
    output_tokens_per_s: float | None,
    imbalance_kv_tokens: float | None = None,
    idle_fraction: float | None = None,
    throughput_of_perfect: float | None = None,
    warnings: list[str],
) -> PolicyResult:
    """Put a run's figures into the report's form; what the command cannot know is left None."""
    lost = failures(outcomes)
    return PolicyResult(
        policy=label,
        imbalance_kv_tokens=imbalance_kv_tokens,
        idle_fraction=idle_fraction,
        throughput_of_perfect=throughput_of_perfect,
        output_tokens_per_s=output_tokens_per_s,
        tpot_ms_p95=summary.tpot_ms.p95 if summary.tpot_ms else None,
        ttft_ms_p95=summary.ttft_ms.p95 if summary.ttft_ms else None,
        wait_ms_p99=None,
        requests=len(outcomes),
        lost=sum(lost.values()),
        failures=lost,
        ttft_ms=summary.ttft_ms,
        tpot_ms=summary.tpot_ms,
        itl_ms=summary.itl_ms,
        e2e_ms=summary.e2e_ms,
        warnings=warnings,
    )
