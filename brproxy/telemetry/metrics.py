"""Prometheus metrics: what has happened, and what is.

Counters and histograms hold the first; the second is read from the ledger when somebody scrapes.

Nothing here runs per token, and a request costs a few list appends: values are sorted into their buckets many
at a time. Label values are the names of groups and of the members that are there: the number of series is
bounded by that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from brproxy.fleet import Fleet, Group
from brproxy.happenings import Observer
from brproxy.lifecycle import Entry, Event, State
from brproxy.roster import Change, Member, MemberState

_WAIT_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ROUND_S = (50e-6, 100e-6, 150e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3)
_UNSORTED_MAX = 1024

_GroupValue = Callable[[Group], float]
_WorkerValues = Callable[[Group], Sequence[float]]


class Histogram:
    """Values by bucket; ``bounds`` are the buckets' upper ends, the last is infinite."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = np.array(bounds)
        self._labels = [*map(repr, map(float, bounds)), "+Inf"]
        self._counts = np.zeros(len(bounds) + 1, dtype=np.int64)
        self._sum = 0.0
        self._unsorted: list[float] = []
        # Takes in one value. No method of its own: each request has several.
        self.observe: Callable[[float], None] = self._unsorted.append

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Put everything so far into ``family`` under ``labels``."""
        self.sort()
        cumulative = np.cumsum(self._counts).tolist()
        family.add_metric(labels, list(zip(self._labels, cumulative, strict=True)), self._sum)

    def sort(self) -> None:
        """Count what has been taken in, which grows until then."""
        bucket = np.searchsorted(self._bounds, self._unsorted, side="left")
        self._counts += np.bincount(bucket, minlength=len(self._counts))
        self._sum += sum(self._unsorted)
        self._unsorted.clear()


class GroupMetrics(Observer):
    """What has happened in one barrier group; ``retries`` are by member, whose name may change.

    ``failovers`` are by what came of them.
    """

    def __init__(self, group: Group) -> None:
        self.outcomes: Counter[State] = Counter()
        self.retries: dict[Member, int] = dict.fromkeys(group.roster.members, 0)
        self.failovers: Counter[str] = Counter()
        self.output_tokens = 0
        self.admitted = 0
        self.wait_s = Histogram(_WAIT_S)
        self.ttft_s = Histogram(_WAIT_S)
        self.round_s = Histogram(_ROUND_S)
        self._ended = 0
        group.roster.observe(self._member_changed)
        group.dispatcher.happenings.tell(self)

    def bound(self, entry: Entry, waited_s: float) -> None:
        """See Observer.bound."""
        self.wait_s.observe(waited_s)

    def retried(self, entry: Entry, member: Member) -> None:
        """See Observer.retried."""
        if member.state is not MemberState.GONE:
            self.retries[member] += 1

    def ended(self, entry: Entry, event: Event, waited_s: float | None) -> None:
        """See Observer.ended."""
        self.outcomes[entry.state] += 1
        self.output_tokens += entry.output_tokens
        if waited_s is not None:
            self.wait_s.observe(waited_s)
        if entry.first_token_s is not None:
            self.ttft_s.observe(entry.first_token_s - entry.arrived_s)
        # Of each there are about as many as requests that end.
        self._ended += 1
        if self._ended == _UNSORTED_MAX:
            self._ended = 0
            for histogram in (self.wait_s, self.ttft_s, self.round_s):
                histogram.sort()

    def decided(self, duration_s: float, admitted: int) -> None:
        """See Observer.decided."""
        self.round_s.observe(duration_s)
        self.admitted += admitted

    def _member_changed(self, member: Member, change: Change) -> None:
        # Members come and go: those that have gone must not stay for ever.
        if change is Change.ADDED:
            self.retries[member] = 0
        elif change is Change.GONE:
            del self.retries[member]


class Metrics(Collector):
    """The metrics of one proxy, and their exposition; the series of a group end when it goes."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._rejected: Counter[str] = Counter()
        self._groups = {group: GroupMetrics(group) for group in fleet.groups}
        self._registry = CollectorRegistry()
        self._registry.register(self)

    @property
    def groups(self) -> dict[str, GroupMetrics]:
        """What has happened in each group, by the name that it has now."""
        return {group.name: metrics for group, metrics in self._groups.items()}

    def group_came(self, group: Group) -> None:
        """Begin to count what happens in a group."""
        self._groups[group] = GroupMetrics(group)

    def group_gone(self, group: Group) -> None:
        """Forget what has happened in a group."""
        del self._groups[group]

    def failovers_of(self, group: Group) -> Counter[str]:
        """Return what failovers of a group are counted in; those of one that has gone are shown nowhere."""
        metrics = self._groups.get(group)
        return Counter() if metrics is None else metrics.failovers

    def exposition(self) -> bytes:
        """Return everything in the Prometheus text format."""
        return generate_latest(self._registry)

    def also(self, collector: Collector) -> None:
        """Have the exposition tell what ``collector`` has, too."""
        self._registry.register(collector)

    def reject(self, status: int | str) -> None:
        """Count a request that the proxy answered itself; "stream": within a stream that had begun."""
        self._rejected[str(int(status)) if isinstance(status, int) else status] += 1

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        yield from self._counters()
        yield from self._histograms()
        yield from self._state()
        yield from self._quality()

    def _counters(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "brproxy_requests", "Requests that ended, by outcome", labels=["group", "outcome"]
        )
        retries = CounterMetricFamily(
            "brproxy_retries", "Requests taken back from a failed worker", labels=["group", "worker"]
        )
        failovers = CounterMetricFamily(
            "brproxy_failovers",
            "Streams whose worker died, by whether another one went on to the end",
            labels=["group", "outcome"],
        )
        tokens = CounterMetricFamily("brproxy_output_tokens", "Tokens streamed to clients", labels=["group"])
        admitted = CounterMetricFamily("brproxy_admitted", "Requests bound to a worker", labels=["group"])
        for name, metrics in self.groups.items():
            for outcome, count in metrics.outcomes.items():
                requests.add_metric([name, outcome.name.lower()], count)
            for worker, count in metrics.retries.items():
                retries.add_metric([name, worker.key], count)
            for ending, count in metrics.failovers.items():
                failovers.add_metric([name, ending], count)
            tokens.add_metric([name], metrics.output_tokens)
            admitted.add_metric([name], metrics.admitted)
        rejected = CounterMetricFamily(
            "brproxy_rejected", "Requests that the proxy answered itself", labels=["status"]
        )
        for status, count in self._rejected.items():
            rejected.add_metric([status], count)
        errors = CounterMetricFamily(
            "brproxy_decision_errors", "Errors in decisions, by what failed", labels=["group", "part"]
        )
        for group in self._fleet.groups:
            for part, count in group.dispatcher.faults.counts.items():
                errors.add_metric([group.name, part], count)
        yield from (requests, retries, failovers, tokens, admitted, rejected, errors)
        yield from self._sessions()

    def _sessions(self) -> Iterator[Metric]:
        """Yield what became of the requests of sessions; of groups that remember none, nothing."""
        requests = CounterMetricFamily(
            "brproxy_session_requests", "Requests of sessions, by where they went", labels=["group", "went"]
        )
        cached = CounterMetricFamily(
            "brproxy_session_cached_tokens", "Prompt tokens sent to where they were cached", labels=["group"]
        )
        for group in self._fleet.groups:
            sessions = group.dispatcher.sessions
            if sessions is None:
                continue
            requests.add_metric([group.name, "new"], sessions.new)
            requests.add_metric([group.name, "home"], sessions.hits)
            requests.add_metric([group.name, "elsewhere"], sessions.moved)
            cached.add_metric([group.name], sessions.cached_tokens)
        yield from (requests, cached)

    def _histograms(self) -> Iterator[Metric]:
        wait = HistogramMetricFamily(
            "brproxy_wait_seconds", "Each wait for a worker, also those that found none", labels=["group"]
        )
        ttft = HistogramMetricFamily("brproxy_ttft_seconds", "Arrival to first token", labels=["group"])
        rounds = HistogramMetricFamily(
            "brproxy_round_seconds", "One decision round that admits", labels=["group"]
        )
        for name, metrics in self.groups.items():
            metrics.wait_s.add_to(wait, [name])
            metrics.ttft_s.add_to(ttft, [name])
            metrics.round_s.add_to(rounds, [name])
        yield from (wait, ttft, rounds)

    def _state(self) -> Iterator[Metric]:
        """Yield gauges of every group and worker, as they are now."""
        yield self._per_group("brproxy_pool_requests", "Requests waiting in the proxy", _pending)
        yield self._per_group(
            "brproxy_imbalance_kv_tokens", "Booked load of the heaviest less the lightest worker", _imbalance
        )
        yield self._per_group("brproxy_envelope_kv_tokens", "Booked load of the heaviest worker", _envelope)
        yield self._per_worker("brproxy_worker_kv_tokens", "KV tokens booked on the worker", _kv_tokens)
        yield self._per_worker("brproxy_worker_requests", "Requests bound to the worker", _requests)
        yield self._per_worker("brproxy_worker_slots", "Sequences that the worker runs at once", _slots)
        yield self._kv_capacity()
        yield self._per_worker("brproxy_worker_routable", "1 if the worker may be chosen", _routable)

    def _quality(self) -> Iterator[Metric]:
        """Yield how good predictions are; a figure that cannot be told yet is absent, not zero."""
        families = {
            name: GaugeMetricFamily(f"brproxy_prediction_{name}", text, labels=["group"])
            for name, text in (
                ("samples", "Predictions compared with the truth"),
                ("auc", "AUC of p_fin, termination within the horizon"),
                ("mae_steps", "Mean error of the remaining steps"),
                ("calibration_error", "Mean distance of p_fin from what happened"),
            )
        }
        for group in self._fleet.groups:
            quality = group.dispatcher.quality.report()
            for name, family in families.items():
                value = getattr(quality, name)
                if value is not None:
                    family.add_metric([group.name], value)
        yield from families.values()

    def _kv_capacity(self) -> GaugeMetricFamily:
        """Return the KV capacity of each worker whose capacity is known."""
        text = "KV tokens that the worker has room for"
        family = GaugeMetricFamily("brproxy_worker_kv_capacity_tokens", text, labels=["group", "worker"])
        for group in self._fleet.groups:
            for member in group.roster.members:
                capacity = member.limits.kv_capacity_tokens
                if capacity is not None:
                    family.add_metric([group.name, member.key], capacity)
        return family

    def _per_group(self, name: str, text: str, value: _GroupValue) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=["group"])
        for group in self._fleet.groups:
            family.add_metric([group.name], value(group))
        return family

    def _per_worker(self, name: str, text: str, values: _WorkerValues) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=["group", "worker"])
        for group in self._fleet.groups:
            by_index = values(group)
            for member in group.roster.members:
                family.add_metric([group.name, member.key], by_index[member.index])
        return family


def _pending(group: Group) -> float:
    return len(group.dispatcher.waiting)


def _imbalance(group: Group) -> float:
    kv_tokens = _kv_tokens(group)
    # A gap holds nothing, and is no worker.
    present = [kv_tokens[member.index] for member in group.roster.members]
    return max(present, default=0) - min(present, default=0)


def _envelope(group: Group) -> float:
    return max(_kv_tokens(group), default=0)


def _kv_tokens(group: Group) -> Sequence[float]:
    return group.dispatcher.ledger.kv_tokens


def _requests(group: Group) -> Sequence[float]:
    return group.dispatcher.ledger.requests


def _slots(group: Group) -> Sequence[float]:
    by_index = [0] * group.roster.columns
    for member in group.roster.members:
        by_index[member.index] = member.limits.slots
    return by_index


def _routable(group: Group) -> Sequence[float]:
    return group.roster.routable()
