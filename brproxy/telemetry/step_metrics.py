"""What a step of each group costs, with standard errors, as it is known when somebody scrapes."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from brproxy.fleet import Fleet

_COSTS = {
    "base_seconds": "A step without load, learnt or configured",
    "seconds_per_kv_token": "What a KV token of the heaviest worker makes a step longer by",
    "seconds_per_prefill_token": "What a prompt token makes a step longer by in which it is prefilled",
}
"""By the order of the costs."""


class StepMetrics(Collector):
    """The groups of ``fleet`` that have a model of their steps; what is not known yet has no series."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        models = [(group.name, group.steps) for group in self._fleet.groups if group.steps is not None]
        for number, (name, text) in enumerate(_COSTS.items()):
            cost = GaugeMetricFamily(f"brproxy_step_{name}", f"{text}", labels=["group"])
            error = GaugeMetricFamily(f"brproxy_step_{name}_error", "Its standard error", labels=["group"])
            for group, model in models:
                learnt = model.learnt()
                if learnt is not None:
                    cost.add_metric([group], learnt.costs[number])
                    error.add_metric([group], learnt.errors[number])
            yield from (cost, error)
        chunk = GaugeMetricFamily(
            "brproxy_step_prefill_tokens_max",
            "Most prompt tokens that a worker prefills in one step; no series: whole prompts",
            labels=["group"],
        )
        windows = GaugeMetricFamily(
            "brproxy_step_windows", "Windows of some steps each that this is learnt from", labels=["group"]
        )
        for group, model in models:
            windows.add_metric([group], model.count)
            if model.prefill_tokens_max is not None:
                chunk.add_metric([group], model.prefill_tokens_max)
        yield from (chunk, windows)
        yield from self._workers()

    def _workers(self) -> Iterator[Metric]:
        """Yield how slow the workers are, as far as they are known to differ."""
        labels = ["group", "worker"]
        slowness = GaugeMetricFamily(
            "brproxy_step_slowness",
            "How much longer than the group's mean a worker takes for its KV tokens",
            labels=labels,
        )
        error = GaugeMetricFamily("brproxy_step_slowness_error", "Its standard error", labels=labels)
        differs = GaugeMetricFamily(
            "brproxy_step_slowness_measurable", "1 if decisions reckon with it", labels=labels
        )
        for group in self._fleet.groups:
            model = group.steps
            if model is None or model.fit is None:
                continue
            for place, member in enumerate(model.members):
                for family, values in zip((slowness, error, differs), model.slowness, strict=True):
                    family.add_metric([group.name, member.key], float(values[place]))
        yield from (slowness, error, differs)
