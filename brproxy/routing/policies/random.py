"""random: a worker drawn uniformly from those that are eligible."""

from __future__ import annotations

import numpy as np

from brproxy.routing.policy import OneByOnePolicy, PolicyParams, register_policy
from brproxy.routing.view import RoundState


@register_policy("random")
class RandomPolicy(OneByOnePolicy[PolicyParams]):
    """Uniform random choice; needs no state of the workers. The floor that any router should beat."""

    def choose(self, state: RoundState, eligible: list[int], rng: np.random.Generator) -> int:
        """See OneByOnePolicy.choose."""
        return eligible[rng.integers(len(eligible))]
