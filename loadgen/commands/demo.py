"""``loadgen demo``: a three-minute comparison with defaults that show the difference, and what to do next."""

from __future__ import annotations

from dataclasses import replace

from loadgen.cluster_settings import ClusterSettings
from loadgen.commands.compare import ComparisonSettings
from loadgen.commands.scenario import Arrivals, Scenario, WorkloadChoice
from loadgen.report.schema import PolicyResult, Report
from loadgen.report.tables import strongest_baseline

BALANCED = "br-0"
THROUGHPUT_RATIO_MIN = 1.2
"""What the demonstration is expected to show, or to say that it did not: output over the best baseline's."""

SETTINGS = ComparisonSettings(
    policies=("round-robin", "join-shortest-queue", "least-kv", BALANCED), speed=3.0
)

SCENARIO = Scenario(
    workload=WorkloadChoice(name="short", requests=1600),
    arrivals=Arrivals(rate=1.1),
    # Workers that prefill what they decode, in chunks: the case that most people have. Small enough for a
    # laptop: fewer slots than a large deployment and shorter prompts. So that KV tokens weigh as much in a
    # step as they do there, each costs more of it.
    cluster=ClusterSettings(
        workers=8,
        slots=24,
        step_s_per_kv_token=0.66e-6,
        prefill_s_per_token=20e-6,
        prefill_tokens_max=2048,
    ),
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


def settings_at(speed: float) -> ComparisonSettings:
    """Return what is compared, on an emulator ``speed`` times as fast as real time."""
    return replace(SETTINGS, speed=speed)


def introduction(speed: float) -> str:
    """Return in words what runs."""
    cluster = SCENARIO.cluster
    return (
        f"{cluster.workers} emulated workers with {cluster.slots} slots each that prefill in chunks of "
        f"{cluster.prefill_tokens_max} tokens and decode,\n{SCENARIO.workload.requests} chat requests at "
        f"{SCENARIO.arrivals.rate} × capacity, {speed:g} × real time. "
        "What a step costs the proxy learns from the streams."
    )


def verdict(report: Report) -> str:
    """Return in words what the run has shown, or that it has not."""
    baseline = strongest_baseline(report)
    balanced = next(result for result in report.policies if result.policy == BALANCED)
    ratio = _ratio(balanced.output_tokens_per_s, None if baseline is None else baseline.output_tokens_per_s)
    if baseline is None or ratio is None:
        return "This run was too short to say anything."
    name = baseline.policy
    facts = (
        f"{BALANCED} put out {ratio:.2f} × the tokens of {name}. Where prompts were prefilled, the average\n"
        f"worker did {_share(balanced.prefill_balance)} of what the busiest one did "
        f"({name}: {_share(baseline.prefill_balance)}); "
        f"{_share(balanced.idle_fraction)} of the KV work was idle ({_share(baseline.idle_fraction)})."
    )
    facts += f"\n{_learnt(balanced)}"
    doubts = [*_losses(report), *_shortcomings(ratio, baseline, balanced), *_warnings(report)]
    if not doubts:
        return facts
    lines = "".join(f"\n  - {doubt}" for doubt in doubts)
    return f"{facts}\nThis run does not show what it should:{lines}"


def _learnt(result: PolicyResult) -> str:
    learnt, cluster = result.learnt, SCENARIO.cluster
    if learnt is None:
        return "The proxy learnt nothing of what a step costs."
    chunk = learnt.prefill_tokens_max
    return (
        f"A step, as the proxy learnt it (and as it is emulated): {learnt.step_base_ms:.0f} ms "
        f"({cluster.step_base_s * 1e3:.0f}), {learnt.step_ns_per_kv_token:.0f} ns a KV token\n"
        f"({cluster.step_s_per_kv_token * 1e9:.0f}), {learnt.prefill_us_per_token:.0f} µs a prompt token "
        f"({cluster.prefill_s_per_token * 1e6:.0f}), "
        f"{'whole prompts' if chunk is None else f'chunks of {chunk}'} ({cluster.prefill_tokens_max})."
    )


def _losses(report: Report) -> list[str]:
    lost = sum(result.lost for result in report.policies)
    return [f"{lost} requests were lost"] if lost else []


def _shortcomings(ratio: float, baseline: PolicyResult, balanced: PolicyResult) -> list[str]:
    """Return what was expected and is not there."""
    shortcomings = []
    if ratio < THROUGHPUT_RATIO_MIN:
        shortcomings.append(f"at least {THROUGHPUT_RATIO_MIN} × the tokens were expected")
    shares = balanced.prefill_balance, baseline.prefill_balance
    if shares[0] is not None and shares[1] is not None and shares[0] <= shares[1]:
        shortcomings.append("prompts were not prefilled in step")
    return shortcomings


def _warnings(report: Report) -> list[str]:
    return [f"{result.policy}: {warning}" for result in report.policies for warning in result.warnings]


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
