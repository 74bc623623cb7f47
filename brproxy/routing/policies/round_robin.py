"""round-robin: the workers in turn."""

from __future__ import annotations

import numpy as np

from brproxy.routing.policy import OneByOnePolicy, PolicyParams, register_policy
from brproxy.routing.view import RoundState


@register_policy("round-robin")
class RoundRobinPolicy(OneByOnePolicy[PolicyParams]):
    """Each request to the next worker in index order, skipping those that are not eligible.

    The only policy with memory between rounds: the worker it chose last. It starts at worker 0.
    """

    def __init__(self, params: PolicyParams) -> None:
        super().__init__(params)
        self._last = -1

    def choose(self, state: RoundState, eligible: list[int], rng: np.random.Generator) -> int:
        """See OneByOnePolicy.choose."""
        self._last = next((g for g in eligible if g > self._last), eligible[0])
        return self._last
