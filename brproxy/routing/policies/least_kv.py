"""least-kv: the worker with the fewest KV tokens."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from brproxy.routing.policy import OneByOnePolicy, PolicyParams, least, register_policy
from brproxy.routing.view import RoundState


@register_policy("least-kv")
class LeastKvPolicy(OneByOnePolicy[PolicyParams]):
    """``argmin kv_tokens[g]`` over the booked load; ties by fewest requests, then at random.

    The greedy balance of KV load: it fills the emptiest worker, whatever the prompt does to the envelope.
    """

    TAKES_AFFINITY: ClassVar[bool] = True

    def choose(self, state: RoundState, eligible: list[int], rng: np.random.Generator) -> int:
        """See OneByOnePolicy.choose."""
        lowest = min(state.kv_tokens[g] for g in eligible)
        lightest = [g for g in eligible if state.kv_tokens[g] == lowest]
        return least(lightest, state.requests, rng)
