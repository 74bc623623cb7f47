"""Tables of simulations in Markdown, and putting them into a text between marker comments. Pure.

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``; all else of the text stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from brproxy.types import InvalidInputError
from loadgen.report.paired import Difference, is_worse, paired_difference
from loadgen.report.schema import PolicyResult, Report

_UNKNOWN = "-"
_BEGIN = re.compile(r"<!-- table (\S+) -->")
_END = "<!-- end -->"


class Figure(NamedTuple):
    """How a figure of the report is shown, ``factor`` times as much."""

    heading: str
    style: str
    factor: float = 1.0


FIGURES = {
    "imbalance_kv_tokens": Figure("imbalance, k KV tokens", ".1f", 1e-3),
    "mean_kv_tokens": Figure("mean load, k KV tokens", ".0f", 1e-3),
    "idle_fraction": Figure("idle, %", ".1f", 100),
    "prefill_balance": Figure("prefill balance, %", ".0f", 100),
    "throughput_of_perfect": Figure("of perfect, %", ".1f", 100),
    "output_tokens_per_s": Figure("output tokens/s", ",.0f"),
    "tpot_ms_p95": Figure("TPOT P95, ms", ".1f"),
    "ttft_ms_p50": Figure("TTFT P50, s", ".2f", 1e-3),
    "ttft_ms_p95": Figure("TTFT P95, s", ".2f", 1e-3),
    "wait_ms_p99": Figure("waiting P99, s", ".0f", 1e-3),
    "makespan_s": Figure("makespan, s", ".0f"),
    "makespan_of_packed": Figure("of a perfect packing", ".3f"),
    "preemptions": Figure("preemptions", ",.0f"),
}

KEYS = {
    "workload": "workload",
    "workers": "G",
    "rate": "rate",
    "prefill_us_per_token": "µs a prompt token",
    "prefill_tokens_max": "chunk, tokens",
}
"""What a report says of its scenario that may tell one run from another, and its heading."""

_NONE = {"rate": "own times", "prefill_tokens_max": "whole"}


def figure_text(result: PolicyResult | None, name: str) -> str:
    """Return a figure with its interval's half-width, as a table has it; a dash where it is not known."""
    value: float | None = getattr(result, name, None)
    if result is None or value is None:
        return _UNKNOWN
    figure = FIGURES[name]
    half_width = result.intervals.get(name)
    spread = "" if half_width is None else f" ± {half_width * figure.factor:{figure.style}}"
    return f"{value * figure.factor:{figure.style}}{spread}"


def policies_rows(
    reports: Sequence[Report],
    keys: Sequence[str],
    figures: Sequence[str],
    policies: Sequence[str],
    labels: Mapping[str, str],
) -> list[list[str]]:
    """Return a row for each of ``policies`` in each report."""
    return [
        [*_key_cells(report, keys), labels.get(policy, policy)]
        + [figure_text(result, figure) for figure in figures]
        for report in reports
        for policy in policies
        for result in report.policies
        if result.policy == policy
    ]


def policies_header(keys: Sequence[str], figures: Sequence[str]) -> list[str]:
    """Return the headings of ``policies_rows``."""
    return [*(KEYS[key] for key in keys), "policy", *(FIGURES[name].heading for name in figures)]


def runs_rows(
    reports: Sequence[Report], keys: Sequence[str], figures: Sequence[str], policies: Sequence[str]
) -> list[list[str]]:
    """Return a row for each report and a column for each policy, with all ``figures`` in a cell."""
    rows = []
    for report in reports:
        by_policy = {result.policy: result for result in report.policies}
        cells = (
            " / ".join(figure_text(by_policy.get(policy), name) for name in figures) for policy in policies
        )
        rows.append([*_key_cells(report, keys), *cells])
    return rows


def runs_header(keys: Sequence[str], policies: Sequence[str], labels: Mapping[str, str]) -> list[str]:
    """Return the headings of ``runs_rows``."""
    return [*(KEYS[key] for key in keys), *(labels.get(policy, policy) for policy in policies)]


def differences_rows(
    reports: Sequence[Report],
    keys: Sequence[str],
    figures: Sequence[str],
    policies: Sequence[str],
    labels: Mapping[str, str],
) -> list[list[str]]:
    """Return by how many % the first policy's figures differ from each other's, and where it is worse."""
    first, *others = policies
    rows = []
    for report in reports:
        by_policy = {result.policy: result for result in report.policies}
        cells, worse, compared = [], [], 0
        for name in figures:
            found = {
                other: paired_difference(by_policy[first], by_policy[other], name)
                for other in others
                if {first, other} <= by_policy.keys()
            }
            cells.append(" / ".join(_difference_text(found.get(other)) for other in others))
            compared += sum(difference is not None for difference in found.values())
            short = FIGURES[name].heading.partition(",")[0]
            worse += [
                f"{short} ({labels.get(other, other)})"
                for other, difference in found.items()
                if difference is not None and is_worse(difference, name)
            ]
        rows.append([*_key_cells(report, keys), *cells, ", ".join(worse) or ("no" if compared else _UNKNOWN)])
    return rows


def differences_header(
    keys: Sequence[str], figures: Sequence[str], policies: Sequence[str], labels: Mapping[str, str]
) -> list[str]:
    """Return the headings of ``differences_rows``."""
    against = " / ".join(labels.get(other, other) for other in policies[1:])
    shorts = (FIGURES[name].heading.partition(",")[0] for name in figures)
    named = (f"{short}, % against {against}" if not i else f"{short}, %" for i, short in enumerate(shorts))
    return [*(KEYS[key] for key in keys), *named, "worse beyond the interval"]


def _difference_text(difference: Difference | None) -> str:
    if difference is None:
        return _UNKNOWN
    spread = "" if difference.half_width is None else f" ± {difference.half_width:.1f}"
    return f"{difference.percent:+.1f}{spread}"


def _key_cells(report: Report, keys: Sequence[str]) -> list[str]:
    values = ((key, report.scenario.get(key)) for key in keys)
    return [_NONE.get(key, _UNKNOWN) if value is None else _shown(value) for key, value in values]


def _shown(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:,g}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as it is written in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def marked(text: str) -> dict[str, str]:
    """Return what stands between the markers of each table, by name; raises InvalidInputError."""
    return {name: text[start:end] for name, start, end in _places(text)}


def renewed(text: str, tables: Mapping[str, str]) -> str:
    """Return ``text`` with ``tables`` between their markers; those that it has no markers for are left out.

    Raises InvalidInputError for markers that do not pair, or stand twice.
    """
    parts, at = [], 0
    for name, start, end in _places(text):
        if name in tables:
            parts += [text[at:start], f"\n{tables[name]}"]
            at = end
    return "".join([*parts, text[at:]])


def _places(text: str) -> list[tuple[str, int, int]]:
    """Return for each table its name, and where what is between its markers begins and ends."""
    places: list[tuple[str, int, int]] = []
    for begin in _BEGIN.finditer(text):
        name, start = begin.group(1), begin.end()
        end = text.find(_END, start)
        following = _BEGIN.search(text, start)
        if end < 0 or (following is not None and following.start() < end):
            msg = f"the table {name!r} has no {_END} behind it"
            raise InvalidInputError(msg)
        if any(name == other for other, *_ in places):
            msg = f"the table {name!r} has two places; it needs one"
            raise InvalidInputError(msg)
        places.append((name, start, end))
    return places
