"""``loadgen demo``: a three-minute comparison with defaults that show the difference, and what to do next."""

from __future__ import annotations

from loadgen.cluster_settings import ClusterSettings
from loadgen.commands.compare import ComparisonSettings
from loadgen.commands.scenario import Arrivals, Scenario, WorkloadChoice
from loadgen.report.schema import PolicyResult, Report

BASELINE = "join-shortest-queue"
BALANCED = "br-0"
IMBALANCE_RATIO_MAX = 0.45
"""What the demonstration is expected to show, or to say that it did not."""

SETTINGS = ComparisonSettings(policies=("round-robin", BASELINE, "least-kv", BALANCED), speed=3.0)

SCENARIO = Scenario(
    workload=WorkloadChoice(name="short", requests=3600),
    arrivals=Arrivals(rate=1.1),
    # Small enough for a laptop: half the slots of a large deployment and shorter prompts. So that KV tokens
    # weigh as much in a step as they do there, each costs more of it.
    cluster=ClusterSettings(workers=8, slots=32, step_s_per_kv_token=0.5e-6),
    seed=1,
)

NEXT_STEPS = """\
Next steps
  1. Copy config/brproxy.toml, put the URLs of your DP workers into its [[worker]] tables, and check it:
       brproxy check --config brproxy.toml
  2. Start the proxy and point your clients at it:
       brproxy serve --config brproxy.toml
  3. Replay your own traffic, or a public trace, against it:
       loadgen run --target http://127.0.0.1:8080 --model NAME --trace FILE
  4. Compare policies on a deployment like yours:
       loadgen compare --policies join-shortest-queue,least-kv,br-0,br-h --workers 16 --slots 32"""


def verdict(report: Report) -> str:
    """Return in words what the run has shown, or that it has not."""
    results = {result.policy: result for result in report.policies}
    baseline, balanced = results[BASELINE], results[BALANCED]
    imbalance = _ratio(balanced.imbalance_kv_tokens, baseline.imbalance_kv_tokens)
    throughput = _ratio(balanced.output_tokens_per_s, baseline.output_tokens_per_s)
    if imbalance is None or throughput is None:
        return "This run was too short to say anything."
    facts = (
        f"{BALANCED} had {imbalance:.2f} × the imbalance of {BASELINE} and "
        f"{throughput:.2f} × its throughput; "
        f"idle at the barrier fell from {_idle(baseline)} to {_idle(balanced)}."
    )
    lost = sum(result.lost for result in report.policies)
    warnings = sorted({warning for result in report.policies for warning in result.warnings})
    if imbalance <= IMBALANCE_RATIO_MAX and throughput > 1 and not lost and not warnings:
        return facts
    doubts = [f"{lost} requests were lost"] if lost else []
    if imbalance > IMBALANCE_RATIO_MAX or throughput <= 1:
        doubts.append(f"at most {IMBALANCE_RATIO_MAX} × the imbalance and a higher throughput were expected")
    return f"{facts}\nThis run does not show what it should: {'; '.join(doubts + warnings)}."


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


def _idle(result: PolicyResult) -> str:
    return "-" if result.idle_fraction is None else f"{result.idle_fraction:.1%}"
