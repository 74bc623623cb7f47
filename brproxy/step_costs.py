"""What a step of a barrier group costs, given or learnt from what passes through. Pure.

A step takes ``base_s + s_per_kv_token * max_g L_g + s_per_prefill_token * max_g P_g`` seconds: L_g are the KV
tokens of worker g, P_g the prompt tokens that it prefills in the step.

A step is one token of each request, here and wherever it is what outputs, turnover and horizons are counted
in. Where an engine's step yields several tokens (multi-token prediction), it is as much of that as yields
one: then loads grow by a token a step, and lengths are numbers of steps, whatever the engine does.
"""

from __future__ import annotations

from typing import NamedTuple

BASE_TOKENS = 512.0
"""What a step without prompts costs workers that only prefill, where nobody says it (prompt tokens)."""


class StepCosts(NamedTuple):
    """The cost of a step: seconds, and seconds a token.

    ``prefill_tokens_max``: most prompt tokens that a worker prefills in one step (chunked prefill); None:
    whole prompts. ``slowness``: how much longer each worker takes than the group's mean for the same KV
    tokens, float per place, None: all alike.
    """

    base_s: float
    s_per_kv_token: float
    s_per_prefill_token: float
    prefill_tokens_max: int | None = None
    slowness: tuple[float, ...] | None = None

    def of_a_token(self, tokens_per_step: float) -> StepCosts:
        """Return the costs of a step as it is meant here, if these are of an engine's with so many tokens.

        A prompt token costs what it does; of a chunk a step has its part.
        """
        chunk = self.prefill_tokens_max
        return self._replace(
            base_s=self.base_s / tokens_per_step,
            s_per_kv_token=self.s_per_kv_token / tokens_per_step,
            prefill_tokens_max=None if chunk is None else max(1, round(chunk / tokens_per_step)),
        )
