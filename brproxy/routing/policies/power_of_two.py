"""power-of-two: the better of two random workers."""

from __future__ import annotations

import numpy as np

from brproxy.routing.policy import OneByOnePolicy, PolicyParams, least, register_policy
from brproxy.routing.view import RoundState


@register_policy("power-of-two")
class PowerOfTwoPolicy(OneByOnePolicy[PolicyParams]):
    """Draw two distinct workers, take the one with fewer requests; ties at random.

    Mitzenmacher 2001, "The power of two choices in randomized load balancing".
    """

    def choose(self, state: RoundState, eligible: list[int], rng: np.random.Generator) -> int:
        """See OneByOnePolicy.choose."""
        if len(eligible) == 1:
            return eligible[0]
        pair: list[int] = rng.choice(eligible, size=2, replace=False).tolist()
        return least(pair, state.requests, rng)
