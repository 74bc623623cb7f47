"""The page of metrics of an emulated vLLM server."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loadgen.emulator.deployment import Deployment
from loadgen.emulator.settings import EmulatorSettings

_LABEL_NAMES = ("model_name", "engine")


class VllmCollector(Collector):
    """The metrics of the workers behind one port under vLLM's names and labels."""

    def __init__(self, ranks: range, settings: EmulatorSettings, deployment: Deployment) -> None:
        self._ranks = ranks
        self._settings = settings
        self._deployment = deployment

    def collect(self) -> list[Metric]:
        """Return the families that load balancers read."""
        deployment, cluster = self._deployment, self._deployment.cluster
        running = [int(requests) for requests in cluster.running]
        return [
            self._family(GaugeMetricFamily, "vllm:num_requests_running", "Requests that run", running),
            self._family(
                GaugeMetricFamily, "vllm:num_requests_waiting", "Requests that wait", cluster.queued
            ),
            *self._cache(),
            self._family(CounterMetricFamily, "vllm:num_preemptions", "Preemptions", cluster.preempted),
            self._family(
                CounterMetricFamily, "vllm:prompt_tokens", "Prefill tokens", deployment.prompt_tokens_total
            ),
            self._family(
                CounterMetricFamily,
                "vllm:generation_tokens",
                "Generation tokens",
                deployment.output_tokens_total,
            ),
            *self._external(),
        ]

    def _cache(self) -> list[Metric]:
        """Return what workers with a KV cache of known size say of it; usage has no meaning without."""
        capacity = self._settings.cluster.kv_capacity_tokens
        if capacity is None:
            return []
        config = GaugeMetricFamily(
            "vllm:cache_config_info", "The cache's configuration", labels=("engine", "kv_cache_size_tokens")
        )
        for rank in self._ranks:
            config.add_metric([str(rank), str(capacity)], 1)
        usage = [int(tokens) / capacity for tokens in self._deployment.cluster.kv_used_tokens]
        text = "KV-cache usage, 1 is full"
        return [self._family(GaugeMetricFamily, "vllm:kv_cache_usage_perc", text, usage), config]

    def _external(self) -> list[Metric]:
        """Return what a worker that may fetch KV says of it."""
        if self._settings.transfer is None:
            return []
        name, text = "vllm:external_prefix_cache", "Prompt tokens, from elsewhere"
        queries, hits = self._deployment.prompt_tokens_total, self._deployment.fetched_tokens_total
        return [
            self._family(CounterMetricFamily, f"{name}_queries", f"{text}: asked for", queries),
            self._family(CounterMetricFamily, f"{name}_hits", f"{text}: fetched", hits),
        ]

    def _family(
        self,
        kind: type[GaugeMetricFamily | CounterMetricFamily],
        name: str,
        text: str,
        values: Sequence[float],
    ) -> Metric:
        """Return a family with the value of each worker here, of ``values`` by worker."""
        family = kind(name, text, labels=_LABEL_NAMES)
        for rank in self._ranks:
            family.add_metric([self._settings.model, str(rank)], values[rank])
        return family
