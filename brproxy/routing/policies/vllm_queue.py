"""vllm-queue: the balancer inside vLLM, the baseline that most data-parallel users run today."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from brproxy.routing.policy import OneByOnePolicy, PolicyParams, register_policy
from brproxy.routing.view import KV_UNLIMITED_TOKENS, RoundState


class VllmQueueParams(PolicyParams):
    """Parameters of ``vllm-queue``."""

    formula: Literal["waiting-weighted", "0.33"] = Field(
        default="0.33",
        description='"waiting-weighted": 4 * waiting + running (older vLLM); "0.33": vLLM 0.33\'s score.',
    )
    client_count: int = Field(
        default=1, ge=1, description='API server processes in front of the engines ("0.33" only).'
    )


@register_policy("vllm-queue")
class VllmQueuePolicy(OneByOnePolicy[VllmQueueParams]):
    """Least score first, scanning from a start that moves on by one worker with each decision.

    Older vLLM: ``score = waiting * 4 + running``. vLLM 0.33 (``v1/engine/core_client.py``):
    ``score = max(client_count * inflight, waiting + running)``, plus
    ``waiting * 6 * max(0, kv_usage - 0.5)`` where any request waits. The picked worker's count is bumped
    locally. Here running = min(requests, slots) and waiting is the rest; ``inflight`` is the requests bound
    by this proxy, and kv_usage counts as 0 where the KV capacity is unknown.
    """

    Params: ClassVar[type[PolicyParams]] = VllmQueueParams

    def __init__(self, params: VllmQueueParams) -> None:
        super().__init__(params)
        self._scan_start = 0

    def choose(self, state: RoundState, eligible: list[int], rng: np.random.Generator) -> int:
        """See OneByOnePolicy.choose. Ties go to the first in scan order, as in vLLM."""
        workers = len(state.requests)
        start = self._scan_start
        self._scan_start = (start + 1) % workers
        return min(eligible, key=lambda g: (self._score(state, g), (g - start) % workers))

    def _score(self, state: RoundState, worker: int) -> float:
        requests, capacity = state.requests[worker], state.kv_capacity[worker]
        running = min(requests, state.slots[worker])
        waiting = requests - running
        if self.params.formula == "waiting-weighted":
            return 4 * waiting + running
        kv_usage = state.kv_tokens[worker] / max(capacity, 1) if capacity < KV_UNLIMITED_TOKENS else 0.0
        queue = max(self.params.client_count * requests, waiting + running)
        return queue + waiting * 6.0 * max(0.0, kv_usage - 0.5)
