"""What became of prefills that another worker decodes: counters by group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

_FAMILIES = {
    "split": "Requests that one worker prefills and another decodes",
    "alone": "Requests that one worker does as a whole although others only prefill",
    "again": "Prefills that were repeated, as what there was had been lost",
    "recomputed": "Requests that a decode worker gave up for want of KV cache, and that were served again",
    "expired": "Prefills that nobody fetched before their lease ended",
    "unfetched": "Prefills that the worker which decodes did not get, and did by itself",
    "stranded": "Prefills that no worker will fetch, as the client left or the one that decodes was lost",
    "freed": "Of these, those that the worker which had them was told to free",
}


class HandoverMetrics(Collector):
    """``counts`` gives them by the name of the group that decodes, and by what has happened."""

    def __init__(self, counts: Callable[[], Mapping[str, Mapping[str, int]]]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """Yield a family for each thing that is counted, none where no group has workers that prefill."""
        groups = self._counts()
        for what, text in _FAMILIES.items():
            family = CounterMetricFamily(f"brproxy_prefills_{what}", text, labels=["group"])
            for group, counts in groups.items():
                family.add_metric([group], counts[what])
            if groups:
                yield family
