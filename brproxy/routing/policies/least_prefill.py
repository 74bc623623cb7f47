"""least-prefill: the worker with the fewest prompt tokens that it has yet to prefill."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from pydantic import Field

from brproxy.routing.policy import OneByOnePolicy, PolicyParams, least, register_policy
from brproxy.routing.view import RoundState


class LeastPrefillParams(PolicyParams):
    """The table of ``least-prefill``."""

    late_binding: bool = Field(
        default=True,
        description="Hold requests in the proxy's pool until a slot and KV room are free, "
        "instead of binding on arrival and letting the worker queue.",
    )


L = TypeVar("L", bound=LeastPrefillParams)


class FewestPromptTokensPolicy(OneByOnePolicy[L]):
    """``argmin prefill_tokens[g]`` over what is booked and not prefilled; ties by fewest KV tokens.

    For prefill workers: a prompt waits for those before it, while what has been prefilled and waits to be
    fetched costs room and no time. Where all are idle the one that holds least is chosen.
    """

    def choose(self, state: RoundState, eligible: list[int], rng: np.random.Generator) -> int:
        """See OneByOnePolicy.choose."""
        prefill_tokens = state.prefill_tokens
        lowest = min(map(prefill_tokens.__getitem__, eligible))
        idlest = [g for g in eligible if prefill_tokens[g] == lowest]
        return least(idlest, state.kv_tokens, rng)


@register_policy("least-prefill")
class LeastPrefillPolicy(FewestPromptTokensPolicy[LeastPrefillParams]):
    """Prompts in the order in which they came, each to the worker with the fewest prompt tokens."""

    Params = LeastPrefillParams
