"""What ``bench-proxy`` reports: the JSON document, the tables, and doubts about the load itself."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pydantic import Field
from rich import box
from rich.table import Table

from loadgen.dataplane.loads import LoadResult, Phase
from loadgen.report.schema import Document, Percentiles
from loadgen.report.tables import relative

BUSY_SHARE_MAX = 0.9
"""A load generator that uses more of its core than this may be what limits a rate or makes a delay."""

SKIPPED_SHARE_MAX = 0.01
"""Of the workers' ticks; more, and the load was not what it was to be."""

DELIVERED_SHARE_MIN = 0.95
"""Of a paced load; less, and the proxy is saturated, unless the load generator is."""

_NOT_ALONE = "rates and delays are partly its own"


class ProxyLoad(LoadResult):
    """One load on one proxy."""

    proxy: str
    phase: str
    round: int
    units: int = Field(description="What CPU time is counted per: requests, streams or events.")
    cpu_us_per_unit: float | None = Field(description="The proxy's CPU time for each of them (µs).")
    offered_per_s: float | None = Field(description="Events that were to be sent in a second, if paced.")
    generator_busy: float = Field(description="Share of its core that the load generator used.")
    ticks_skipped: float = Field(description="Share of the workers' ticks that they could not keep.")

    @property
    def units_per_s(self) -> float:
        """Requests, streams or events that arrived in a second."""
        return self.units / self.window_s

    @property
    def delivered(self) -> float:
        """Share of the events that were to be sent, if paced; else 1."""
        return self.units_per_s / self.offered_per_s if self.offered_per_s else 1.0


class ProxyReport(Document):
    """What was run, every load in order, and which proxies could not be measured."""

    settings: dict[str, str | int | float | bool | None]
    loads: list[ProxyLoad]
    errors: dict[str, str] = Field(description="Proxies that could not be started or ended, and why.")

    def warnings(self) -> list[str]:
        """Return what was lost, and why figures may not be the proxies'."""
        groups: dict[tuple[str, str], list[ProxyLoad]] = {}
        for load in self.loads:
            groups.setdefault((load.phase, load.proxy), []).append(load)
        return [
            f"{phase}, {proxy}: {text}" for (phase, proxy), loads in groups.items() for text in _doubts(loads)
        ]


def _doubts(loads: Sequence[ProxyLoad]) -> Iterator[str]:
    """Yield the doubts about the rounds of one proxy in one phase."""
    lost = sum(load.lost for load in loads)
    if lost:
        first = next(load.first_failure for load in loads if load.lost)
        yield f"{lost} requests lost, the first: {first}"
    delivered = min(
        (load.delivered for load in loads if load.ticks_skipped <= SKIPPED_SHARE_MAX), default=1.0
    )
    if delivered < DELIVERED_SHARE_MIN:
        yield f"only {delivered:.0%} of the load came through: the delays are a saturated proxy's"
    skipped = max(load.ticks_skipped for load in loads)
    if skipped > SKIPPED_SHARE_MAX:
        yield f"the load generator skipped {skipped:.0%} of its ticks: {_NOT_ALONE}"
    busy = max(load.generator_busy for load in loads)
    if busy > BUSY_SHARE_MAX:
        yield f"the load generator used {busy:.0%} of its core: {_NOT_ALONE}"


@dataclass(frozen=True, slots=True)
class _Figure:
    header: str
    value: Callable[[ProxyLoad], float | None]
    style: str
    spread: bool = True


def _percentile(latencies: str, which: str) -> Callable[[ProxyLoad], float | None]:
    def value(load: ProxyLoad) -> float | None:
        found: Percentiles | None = getattr(load, latencies)
        return None if found is None else float(getattr(found, which))

    return value


def _latency(name: str, latencies: str, which: str, style: str = ",.1f", *, spread: bool = True) -> _Figure:
    return _Figure(f"{name}\n{which.upper()} ms", _percentile(latencies, which), style, spread)


_RSS = _Figure("RSS\nMB", lambda load: load.rss_bytes / 1e6 or None, ",.0f", spread=False)


def _figures(phase: Phase) -> list[_Figure]:
    """Return what a phase's table shows: with a name of usual length it fits into eighty characters."""
    if phase.unit == "event":
        latencies = [
            _latency("first", "first_ms", "p50", spread=False),
            _latency("delay", "delay_ms", "p50"),
            _latency("delay", "delay_ms", "p99"),
            _latency("gap", "gap_ms", "p99", spread=False),
        ]
    else:
        latencies = [_latency("whole", "whole_ms", "p50", ",.2f"), _latency("whole", "whole_ms", "p99")]
        if phase.stream:
            latencies.insert(0, _latency("first", "first_ms", "p50", ",.2f"))
    cpu = _Figure(f"CPU µs\n/{phase.unit}", lambda load: load.cpu_us_per_unit, ",.1f")
    rate = _Figure(f"{phase.unit}s\n/s", lambda load: load.units_per_s, ",.0f", spread=False)
    return [cpu, rate, *latencies, _RSS]


def proxy_table(report: ProxyReport, phase: Phase) -> Table:
    """Return the proxies side by side in one phase: median, min-max over rounds, × the first proxy's."""
    loads: dict[str, list[ProxyLoad]] = {}
    for load in report.loads:
        if load.phase == phase.name:
            loads.setdefault(load.proxy, []).append(load)
    figures = _figures(phase)
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=f"{phase.name}: {phase.text}",
        title_justify="left",
    )
    table.add_column("proxy", overflow="fold", min_width=8)
    for header in (*(figure.header for figure in figures), "lost"):
        table.add_column(header, justify="right", no_wrap=True)
    first = next(iter(loads.values()), [])
    for name, rounds in loads.items():
        cells = [_cell(figure, rounds, first) for figure in figures]
        table.add_row(name, *cells, f"{sum(load.lost for load in rounds):,}")
    return table


def _cell(figure: _Figure, rounds: Sequence[ProxyLoad], base: Sequence[ProxyLoad]) -> str:
    values = _known(figure, rounds)
    text = relative(_median(values), _median(_known(figure, base)), figure.style)
    if len(values) < 2 or not figure.spread:
        return text
    value, _, ratio = text.partition("\n")
    spread = f"[dim]{min(values):{figure.style}}-{max(values):{figure.style}}[/dim]"
    return "\n".join(filter(None, (value, spread, ratio)))


def _known(figure: _Figure, loads: Sequence[ProxyLoad]) -> list[float]:
    return [value for load in loads if (value := figure.value(load)) is not None]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
