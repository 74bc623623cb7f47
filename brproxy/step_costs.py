"""What a step of a barrier group costs, given or learnt from what passes through. Pure.

A step takes ``base_s + s_per_kv_token * max_g L_g + s_per_prefill_token * max_g P_g`` seconds: L_g are the KV
tokens of worker g, P_g the prompt tokens that it prefills in the step.
"""

from __future__ import annotations

from typing import NamedTuple


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
