"""What came of counting prompts beside their requests, and how far estimates were off."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from brproxy.prompt_counts import CountStats


class CountMetrics(Collector):
    """``stats`` None: prompts are not counted, and there is nothing to tell."""

    def __init__(self, stats: CountStats | None) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        stats = self._stats
        if stats is None:
            return
        prompts = CounterMetricFamily(
            "brproxy_prompt_counts", "Prompts to be counted, by what came of it", labels=["outcome"]
        )
        for outcome, count in stats.prompts.items():
            prompts.add_metric([outcome], count)
        yield prompts
        for name, text, tokens in (
            ("counted", "Tokens of prompts that were counted", stats.counted_tokens),
            ("estimated", "Tokens that these prompts had been estimated to be", stats.estimated_tokens),
            (
                "estimate_error",
                "Tokens by which these estimates were off, to either side",
                stats.error_tokens,
            ),
        ):
            family = CounterMetricFamily(f"brproxy_prompt_{name}_tokens", text)
            family.add_metric([], tokens)
            yield family
