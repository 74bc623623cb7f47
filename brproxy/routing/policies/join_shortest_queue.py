"""join-shortest-queue: the worker with the fewest requests."""

from __future__ import annotations

import numpy as np

from brproxy.routing.policy import OneByOnePolicy, PolicyParams, least, register_policy
from brproxy.routing.view import RoundState


@register_policy("join-shortest-queue")
class JoinShortestQueuePolicy(OneByOnePolicy[PolicyParams]):
    """``argmin requests[g]``, running and queued alike; ties at random.

    What most routers for LLM workers ship as "least load": it counts requests, not their KV tokens.
    """

    def choose(self, state: RoundState, eligible: list[int], rng: np.random.Generator) -> int:
        """See OneByOnePolicy.choose."""
        return least(eligible, state.requests, rng)
