"""Prometheus metrics: what has happened, and what is.

Counters and histograms hold the first; the second is read from the ledger when somebody scrapes.

Nothing here runs per token: a request is counted once, when it ends, and gauges are computed when asked for.
Label values come from the configuration only, so the number of series is bounded by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from brproxy.fleet import Fleet, Group
from brproxy.ledger import Entry

_WAIT_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ROUND_S = (50e-6, 100e-6, 150e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3)

_GroupValue = Callable[[Group], float]
_WorkerValues = Callable[[Group], Sequence[float]]


def _pending(group: Group) -> float:
    return group.dispatcher.ledger.pending


def _imbalance(group: Group) -> float:
    kv_tokens = group.dispatcher.ledger.kv_tokens
    return max(kv_tokens) - min(kv_tokens)


def _envelope(group: Group) -> float:
    return max(group.dispatcher.ledger.kv_tokens)


def _kv_tokens(group: Group) -> Sequence[float]:
    return group.dispatcher.ledger.kv_tokens


def _requests(group: Group) -> Sequence[float]:
    return group.dispatcher.ledger.requests


def _routable(group: Group) -> Sequence[float]:
    routable: list[float] = group.health.routable().astype(float).tolist()
    return routable


class FleetCollector(Collector):
    """Gauges of every group and worker, read at the moment of the scrape."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield one family for each gauge."""
        yield self._per_group("brproxy_pool_requests", "Requests waiting in the proxy", _pending)
        yield self._per_group(
            "brproxy_imbalance_kv_tokens", "Booked load of the heaviest less the lightest worker", _imbalance
        )
        yield self._per_group("brproxy_envelope_kv_tokens", "Booked load of the heaviest worker", _envelope)
        yield from self._quality()
        yield self._per_worker("brproxy_worker_kv_tokens", "KV tokens booked on the worker", _kv_tokens)
        yield self._per_worker("brproxy_worker_requests", "Requests bound to the worker", _requests)
        yield self._per_worker("brproxy_worker_routable", "1 if the worker may be chosen", _routable)

    def _per_group(self, name: str, text: str, value: _GroupValue) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=["group"])
        for group in self._fleet.groups:
            family.add_metric([group.name], value(group))
        return family

    def _quality(self) -> Iterator[GaugeMetricFamily]:
        """Yield how good predictions are; a figure that cannot be told yet is absent, not zero."""
        families = {
            "samples": GaugeMetricFamily(
                "brproxy_prediction_samples", "Predictions compared with the truth", labels=["group"]
            ),
            "auc": GaugeMetricFamily(
                "brproxy_prediction_auc", "AUC of p_fin, termination within the horizon", labels=["group"]
            ),
            "mae_steps": GaugeMetricFamily(
                "brproxy_prediction_mae_steps", "Mean error of the remaining steps", labels=["group"]
            ),
            "calibration_error": GaugeMetricFamily(
                "brproxy_prediction_calibration_error",
                "Mean distance of p_fin from what happened",
                labels=["group"],
            ),
        }
        for group in self._fleet.groups:
            quality = group.dispatcher.quality.report()
            for name, family in families.items():
                value = getattr(quality, name)
                if value is not None:
                    family.add_metric([group.name], value)
        yield from families.values()

    def _per_worker(self, name: str, text: str, values: _WorkerValues) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=["group", "worker"])
        for group in self._fleet.groups:
            for worker, value in zip(group.worker_names, values(group), strict=True):
                family.add_metric([group.name, worker], value)
        return family


class Metrics:
    """The counters and histograms of one proxy, and their exposition."""

    def __init__(self, fleet: Fleet) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(FleetCollector(fleet))
        self.requests = self._counter("requests", "Requests that ended, by outcome", "group", "outcome")
        self.rejected = self._counter("rejected", "Requests that the proxy answered itself", "status")
        self.retries = self._counter("retries", "Requests taken back from a failed worker", "group", "worker")
        self.output_tokens = self._counter("output_tokens", "Tokens streamed to clients", "group")
        self.wait_s = self._histogram("wait_seconds", "Time in the pool", _WAIT_S, "group")
        self.ttft_s = self._histogram("ttft_seconds", "Arrival to first token", _WAIT_S, "group")
        self.round_s = self._histogram("round_seconds", "One decision round that admits", _ROUND_S, "group")
        self.admitted = self._counter("admitted", "Requests bound to a worker", "group")

    def exposition(self) -> bytes:
        """Return everything in the Prometheus text format."""
        return generate_latest(self._registry)

    def ended(self, group: str, entry: Entry) -> None:
        """Count a request that has ended."""
        self.requests.labels(group, entry.state.name.lower()).inc()
        self.output_tokens.labels(group).inc(entry.output_tokens)
        if entry.bound_s is not None:
            self.wait_s.labels(group).observe(entry.bound_s - entry.arrived_s)
        if entry.first_token_s is not None:
            self.ttft_s.labels(group).observe(entry.first_token_s - entry.arrived_s)

    def round(self, group: str, duration_s: float, admitted: int) -> None:
        """Count a decision round that admitted something."""
        self.round_s.labels(group).observe(duration_s)
        self.admitted.labels(group).inc(admitted)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"brproxy_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"brproxy_{name}", text, labels, buckets=buckets, registry=self._registry)
