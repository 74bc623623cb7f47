"""Tables for people, with rich."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from rich import box
from rich.table import Table

from loadgen.report.schema import Percentiles, PolicyResult, Report

BEST_BASELINE = "best-baseline"
"""Stands for the policy of a published row that does not say which baseline was the best."""

BALANCING_PREFIX = "br-"
"""Policies of ours; all others are baselines."""

_PREFILL = (
    "busiest by\nmean",
    "most held\nKV tok.",
    "of its\nKV",
    "done\nagain",
    "lease\nended",
    "not\nfetched",
)


class _Figure(NamedTuple):
    """A figure of the report: its name there, and how it is shown, ``factor`` times as much."""

    name: str
    heading: str
    style: str
    factor: float = 1.0


_COMPARED = (
    _Figure("imbalance_kv_tokens", "imbal.\nKV tok.", ",.0f"),
    _Figure("idle_fraction", "idle", ".1%"),
    _Figure("prefill_balance", "prefill\nbalance", ".0%"),
    _Figure("output_tokens_per_s", "output\ntok/s", ",.0f"),
    _Figure("throughput_of_perfect", "of per-\nfect", ".1%"),
    _Figure("tpot_ms_p95", "TPOT\nP95 ms", ",.0f"),
    _Figure("ttft_ms_p95", "TTFT\nP95 ms", ",.0f"),
    _Figure("lost", "lost", ",d"),
)

_AS_THEY_ARE = {"prefill_balance", "throughput_of_perfect", "lost"}
"""Of those the ones that are no times of the baseline's: shares of what can be, and counts."""

_SIMULATED = (
    _Figure("imbalance_kv_tokens", "imbal.\nKV tok.", ",.0f"),
    _Figure("mean_kv_tokens", "mean\nk tok.", ",.0f", 1e-3),
    _Figure("idle_fraction", "idle\n%", ".2f", 100),
    _Figure("prefill_balance", "prefill\nbal. %", ".1f", 100),
    _Figure("throughput_of_perfect", "of per-\nfect %", ".1f", 100),
    _Figure("tpot_ms_p95", "TPOT\nP95 ms", ".1f"),
    _Figure("ttft_ms_p50", "TTFT\nP50 s", ".2f", 1e-3),
    _Figure("ttft_ms_p95", "TTFT\nP95 s", ".2f", 1e-3),
    _Figure("wait_ms_p99", "wait\nP99 s", ".1f", 1e-3),
    _Figure("makespan_s", "make-\nspan s", ",.0f"),
    _Figure("makespan_of_packed", "of the\npacked", ".3f"),
    _Figure("preemptions", "pre-\nempted", ",.0f"),
)

_PUBLISHED = (
    _Figure("output_tokens_per_s", "output\ntok/s", ",.0f"),
    _Figure("imbalance_kv_tokens", "imbal.\nKV tok.", ",.0f"),
    _Figure("tpot_ms_p95", "TPOT\nP95 ms", ".1f"),
)


@dataclass(frozen=True, slots=True)
class PublishedFigures:
    """What a publication says of a policy, in the report's names and units; None: nothing."""

    output_tokens_per_s: float
    imbalance_kv_tokens: float | None = None
    tpot_ms_p95: float | None = None


def latency_table(result: PolicyResult) -> Table:
    """Return the latencies of one run."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("milliseconds")
    for column in ("mean", "P50", "P95", "P99"):
        table.add_column(column, justify="right")
    rows = (
        ("TTFT", result.ttft_ms),
        ("TPOT", result.tpot_ms),
        ("ITL", result.itl_ms),
        ("end to end", result.e2e_ms),
    )
    for name, values in rows:
        table.add_row(name, *_cells(values))
    return table


def _cells(values: Percentiles | None) -> list[str]:
    if values is None:
        return ["-"] * 4
    return [f"{value:,.1f}" for value in (values.mean, values.p50, values.p95, values.p99)]


def outcome_table(result: PolicyResult) -> Table:
    """Return throughput, goodput and losses of one run."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("requests", f"{result.requests:,}")
    table.add_row("lost", f"{result.lost:,}")
    for kind, count in result.failures.items():
        table.add_row(f"  {kind}", f"{count:,}")
    table.add_row("output tokens/s", number(result.output_tokens_per_s, ",.1f"))
    if result.goodput_requests_per_s is not None:
        table.add_row("goodput requests/s", f"{result.goodput_requests_per_s:,.2f}")
    return table


def strongest_baseline(report: Report) -> PolicyResult | None:
    """Return the baseline with the highest throughput, None when no baseline ran."""
    baselines = [
        result
        for result in report.policies
        if not result.policy.startswith(BALANCING_PREFIX) and result.output_tokens_per_s is not None
    ]
    return max(baselines, key=lambda result: result.output_tokens_per_s or 0.0, default=None)


def comparison_table(report: Report) -> Table:
    """Return all policies side by side, each figure also relative to the strongest baseline's."""
    baseline = strongest_baseline(report)
    # Eight columns have to fit into eighty characters: where prefill has one, losses are told below.
    prefills = bool(report.scenario.get("prefill_us_per_token"))
    shown = [figure for figure in _COMPARED if figure.name != ("lost" if prefills else "prefill_balance")]
    caption = [] if baseline is None else [f"×: relative to {baseline.policy}, the strongest baseline"]
    if prefills:
        lost = [f"{result.policy} {result.lost:,}" for result in report.policies if result.lost]
        caption.append(f"lost: {', '.join(lost) or 'nothing'}")
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption="; ".join(caption) or None,
        caption_justify="left",
    )
    table.add_column("policy", no_wrap=True)
    for figure in shown:
        table.add_column(figure.heading, justify="right", no_wrap=True)
    for result in report.policies:
        table.add_row(result.policy, *(_compared(result, baseline or result, figure) for figure in shown))
    return table


def comparison_tables(report: Report) -> list[Table]:
    """Return all policies side by side, the prefill side by itself where it is apart, and the simulator's."""
    more = [_prefill_table(report), _beside_table(report)]
    return [comparison_table(report), *(table for table in more if table is not None)]


def _compared(result: PolicyResult, base: PolicyResult, figure: _Figure) -> str:
    value = getattr(result, figure.name)
    if figure.name in _AS_THEY_ARE:
        return number(value, figure.style)
    return relative(value, getattr(base, figure.name), figure.style)


def _beside_table(report: Report) -> Table | None:
    """Return what the simulator says beside what was measured, None where it was not asked."""
    if not report.simulated:
        return None
    baseline = strongest_baseline(report)
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title="beside the simulator",
        title_justify="left",
        caption=None if baseline is None else f"of base: output relative to {baseline.policy}'s",
        caption_justify="left",
    )
    table.add_column("policy", no_wrap=True)
    for base in ("of per-\nfect %", *([] if baseline is None else ["of\nbase %"])):
        for column in (base, "simu-\nlated %", "apart\npoints"):
            table.add_column(column, justify="right", no_wrap=True)
    by_policy = {result.policy: result for result in report.simulated}
    for result in report.policies:
        simulated = by_policy[result.policy]
        cells = _apart(result.throughput_of_perfect, simulated.throughput_of_perfect)
        if baseline is not None:
            bases = baseline.output_tokens_per_s, by_policy[baseline.policy].output_tokens_per_s
            pairs = zip((result.output_tokens_per_s, simulated.output_tokens_per_s), bases, strict=True)
            cells += _apart(*(value / base if value and base else None for value, base in pairs))
        table.add_row(result.policy, *cells)
    return table


def _apart(measured: float | None, simulated: float | None) -> list[str]:
    """Return two shares and how many points the first is above the second."""
    apart = None if measured is None or simulated is None else 100 * (measured - simulated)
    in_percent = (None if share is None else 100 * share for share in (measured, simulated))
    return [*(number(share, ".1f") for share in in_percent), number(apart, "+.1f")]


def _prefill_table(report: Report) -> Table | None:
    """Return what the prefill side did under each policy, None where there is none apart."""
    if all(result.prefill is None for result in report.policies):
        return None
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title="prefill side", title_justify="left"
    )
    table.add_column("policy", no_wrap=True)
    for column in _PREFILL:
        table.add_column(column, justify="right", no_wrap=True)
    for result in report.policies:
        prefill = result.prefill
        if prefill is not None:
            held_tokens, capacity = max(prefill.held_tokens_max), prefill.kv_capacity_tokens
            table.add_row(
                result.policy,
                number(prefill.unevenness, ".3f"),
                f"{held_tokens:,}",
                number(held_tokens / capacity if capacity else None, ".0%"),
                *(f"{count:,}" for count in (prefill.again, prefill.expired, prefill.failed)),
            )
    return table


def number(value: float | None, style: str) -> str:
    """Return a figure as text; one that is not known is a dash."""
    return "-" if value is None else format(value, style)


def relative(value: float | None, base: float | None, style: str) -> str:
    """Return a figure, and below it what it is times ``base``."""
    ratio = f"\n[dim]×{value / base:.2f}[/dim]" if value is not None and base else ""
    return number(value, style) + ratio


def simulation_tables(
    report: Report, title: str, published: Mapping[str, PublishedFigures]
) -> list[str | Table]:
    """Return a line that says what was simulated, the figures, and the published ones beside ours."""
    scenario = report.scenario
    rate = "the trace's own times" if scenario["rate"] is None else f"{scenario['rate']:g} × capacity"
    if scenario.get("at_once"):
        rate = f"all at once (packed: {scenario['packed_makespan_s']:,.0f} s)"
    line = (
        f"{title or 'simulated'}: {scenario['workload']}, {scenario['workers']} workers, {rate}, "
        f"{scenario['requests']:,} requests, seeds: {scenario['seeds']}"
    )
    tables = [simulation_table(report)]
    if published:
        tables.append(published_table(report, published))
    return [line, *tables]


def simulation_table(report: Report) -> Table:
    """Return simulated policies side by side, ± the confidence interval; what is nothing has no column."""
    is_closed = bool(report.scenario.get("at_once"))
    # Workers that only prefill decode no second token, and the KV that they hold is no load.
    is_prefill = all(result.tpot_ms_p95 is None for result in report.policies)
    nothing_said = {
        **dict.fromkeys(
            ("imbalance_kv_tokens", "mean_kv_tokens", "idle_fraction", "tpot_ms_p95"), is_prefill
        ),
        **dict.fromkeys(("ttft_ms_p50", "ttft_ms_p95"), not is_prefill),
        "throughput_of_perfect": is_closed,
        "wait_ms_p99": is_closed,
        "makespan_s": not is_closed,
        "makespan_of_packed": not is_closed,
        "prefill_balance": not report.scenario.get("prefill_us_per_token"),
        "preemptions": not any(result.preemptions for result in report.policies),
    }
    shown = [figure for figure in _SIMULATED if not nothing_said.get(figure.name)]
    # Nine columns have to fit into eighty characters.
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("policy", overflow="fold", min_width=19)
    for figure in shown:
        table.add_column(figure.heading, justify="right", no_wrap=True)
    for result in report.policies:
        table.add_row(result.policy, *(_measured(result, figure) for figure in shown))
    return table


def published_table(report: Report, published: Mapping[str, PublishedFigures]) -> Table:
    """Return our figures beside published ones, each also relative to the strongest baseline's.

    Hardware and traffic differ: the ratios are what can be compared. ``published`` is by the report's
    policies; the row of BEST_BASELINE stands beside our strongest one.
    """
    ours = strongest_baseline(report)
    baselines = {name: row for name, row in published.items() if not name.startswith(BALANCING_PREFIX)}
    theirs = max(baselines, key=lambda name: baselines[name].output_tokens_per_s, default=None)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left")
    table.add_column("policy", overflow="fold", min_width=19)
    if ours is not None and theirs is not None:
        table.caption = f"×: relative to the strongest baseline (ours: {ours.policy}; paper: {theirs})"
    shown = [f for f in _PUBLISHED if any(getattr(row, f.name) is not None for row in published.values())]
    for figure in shown:
        table.add_column(figure.heading, justify="right", no_wrap=True)
        table.add_column("paper", justify="right", no_wrap=True)
    for result in report.policies:
        row = published.get(result.policy)
        if row is None and result is ours:
            row = published.get(BEST_BASELINE)
        cells = [
            relative(getattr(value, figure.name, None), getattr(base, figure.name, None), figure.style)
            for figure in shown
            for value, base in ((result, ours), (row, baselines.get(theirs or "")))
        ]
        table.add_row(result.policy, *cells)
    return table


def _measured(result: PolicyResult, figure: _Figure) -> str:
    value: float | None = getattr(result, figure.name)
    if value is None:
        return "-"
    interval = result.intervals.get(figure.name)
    spread = "" if interval is None else f"\n[dim]±{interval * figure.factor:{figure.style}}[/dim]"
    return f"{value * figure.factor:{figure.style}}{spread}"
