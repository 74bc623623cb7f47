"""Prometheus metrics of what engines say about their load; what one does not say has no series."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from brproxy.clock import Clock
from brproxy.engines.load import LoadReport
from brproxy.signals import GroupSignals, WorkerSignals

_LABELS = ("group", "worker")
_SIGNAL_LABELS = (*_LABELS, "signal")
_GAUGES: tuple[tuple[str, str, Callable[[LoadReport], int | None]], ...] = (
    ("kv_used_tokens", "KV tokens that the engine holds", lambda report: report.kv_used_tokens),
    (
        "kv_capacity_tokens",
        "KV tokens that the engine has room for",
        lambda report: report.kv_capacity_tokens,
    ),
    ("running_requests", "Requests that run in the engine", lambda report: report.running),
    ("waiting_requests", "Requests that wait in the engine", lambda report: report.waiting),
)


class EngineMetrics(Collector):
    """What is known of the members of ``groups``, by name as they are then, read when somebody scrapes."""

    def __init__(self, groups: Callable[[], Mapping[str, GroupSignals]], clock: Clock) -> None:
        self._groups = groups
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        for name, text, figure in _GAUGES:
            family = GaugeMetricFamily(f"brproxy_engine_{name}", text, labels=_LABELS)
            for labels, signals in self._workers():
                value = None if signals.report is None else figure(signals.report)
                if value is not None:
                    family.add_metric(labels, value)
            yield family
        preemptions = CounterMetricFamily(
            "brproxy_engine_preemptions", "Preemptions since the engine started", labels=_LABELS
        )
        for labels, signals in self._workers():
            if signals.report is not None and signals.report.preemptions is not None:
                preemptions.add_metric(labels, signals.report.preemptions)
        yield preemptions
        yield from self._drift()
        yield from self._quality()
        kept = CounterMetricFamily(
            "brproxy_silences_kept",
            "Responses not cut when they were silent for too long, as the engine has their request still",
            labels=["group"],
        )
        in_band = CounterMetricFamily(
            "brproxy_engine_in_band", "Reports of load that came with responses", labels=["group", "result"]
        )
        for name, group in self._groups().items():
            kept.add_metric([name], group.silences_kept)
            for result, count in group.in_band.items():
                in_band.add_metric([name, result], count)
        yield from (kept, in_band)

    def _drift(self) -> Iterator[Metric]:
        offset = GaugeMetricFamily(
            "brproxy_worker_offset_kv_tokens", "Load taken up beside what is booked", labels=_LABELS
        )
        for name, group in self._groups().items():
            offsets = group.offsets()
            for member, _ in group.known():
                offset.add_metric([name, member.key], offsets[member.index])
        yield offset

    def _quality(self) -> Iterator[Metric]:
        """Yield how good the signals are: their age, and what is missing or came by another name."""
        age = GaugeMetricFamily(
            "brproxy_engine_signal_age_seconds", "Since the engine last said its load", labels=_LABELS
        )
        missing = GaugeMetricFamily(
            "brproxy_engine_signal_missing", "1 for what the engine does not say", labels=_SIGNAL_LABELS
        )
        renamed = GaugeMetricFamily(
            "brproxy_engine_signal_renamed", "1 for what it says by another name", labels=_SIGNAL_LABELS
        )
        now_s = self._clock.now_s()
        for labels, signals in self._workers():
            if signals.read_s is not None:
                age.add_metric(labels, now_s - signals.read_s)
            for family, names in ((missing, signals.missing), (renamed, signals.renamed)):
                for name in sorted(names):
                    family.add_metric([*labels, name], 1)
        yield from (age, missing, renamed)

    def _workers(self) -> Iterator[tuple[list[str], WorkerSignals]]:
        for name, group in self._groups().items():
            for member, signals in group.known():
                yield [name, member.key], signals
