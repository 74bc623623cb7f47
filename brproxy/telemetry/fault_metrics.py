"""Faults of barrier groups and what became of them: counters by group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from brproxy.fault_tolerance import Event, Recovery, State

_FAMILIES = {
    "incidents": (Event.FAULT, "Faults that ranks of a group waited to be told about"),
    "retries": (Event.TELL, "Times that the ranks of a group were told to retry"),
    "retries_failed": (Event.FAILED, "Of these, those that left ranks waiting"),
    "recoveries": (Event.RECOVERED, "Faults after which ranks of a group are healthy"),
    "given_up": (Event.GIVEN_UP, "Faults that retries did not end in time"),
}


class FaultMetrics(Collector):
    """``recoveries`` gives them by the name of the group; no group, no series."""

    def __init__(self, recoveries: Callable[[], Mapping[str, Recovery]]) -> None:
        self._recoveries = recoveries

    def collect(self) -> Iterator[Metric]:
        """Yield a family for each thing that is counted, and whether a group has a fault now."""
        recoveries = self._recoveries()
        if not recoveries:
            return
        for name, (event, text) in _FAMILIES.items():
            family = CounterMetricFamily(f"brproxy_fault_{name}", text, labels=["group"])
            for group, recovery in recoveries.items():
                family.add_metric([group], recovery.counts[event])
            yield family
        active = GaugeMetricFamily("brproxy_fault_active", "1 while a fault is not over", labels=["group"])
        for group, recovery in recoveries.items():
            active.add_metric([group], recovery.state is not State.WELL)
        yield active
