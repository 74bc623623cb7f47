"""round-robin: the workers in turn."""

from __future__ import annotations

import numpy as np

from brproxy.routing.policy import OneByOnePolicy, PolicyParams, RoundState, register_policy
from brproxy.routing.view import IntArray


@register_policy("round-robin")
class RoundRobinPolicy(OneByOnePolicy[PolicyParams]):
    """Each request to the next worker in index order, skipping those that are not eligible.

    The only policy with memory between rounds: the worker it chose last. It starts at worker 0.
    """

    def __init__(self, params: PolicyParams) -> None:
        super().__init__(params)
        self._last = -1

    def choose(self, state: RoundState, eligible: IntArray, rng: np.random.Generator) -> int:
        """See OneByOnePolicy.choose."""
        after = eligible[eligible > self._last]
        self._last = int(after[0] if len(after) else eligible[0])
        return self._last
