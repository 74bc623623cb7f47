"""least-kv: the worker with the fewest KV tokens."""

from __future__ import annotations

import numpy as np

from brproxy.routing.policy import OneByOnePolicy, PolicyParams, RoundState, least, register_policy
from brproxy.routing.view import IntArray


@register_policy("least-kv")
class LeastKvPolicy(OneByOnePolicy[PolicyParams]):
    """``argmin kv_tokens[g]`` over the booked load; ties by fewest requests, then at random.

    The greedy balance of KV load: it fills the emptiest worker, whatever the prompt does to the envelope.
    """

    def choose(self, state: RoundState, eligible: IntArray, rng: np.random.Generator) -> int:
        """See OneByOnePolicy.choose."""
        kv_tokens = state.kv_tokens[eligible]
        lightest = eligible[kv_tokens == kv_tokens.min()]
        return int(lightest[least(state.requests[lightest], rng)])
