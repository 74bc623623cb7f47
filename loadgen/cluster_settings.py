"""What a DP deployment is in the barrier-step model: its size, and what a step of it costs. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from brproxy.step_costs import StepCosts
from brproxy.types import InvalidInputError

IntArray = NDArray[np.int64]

DISPATCH_STEPS_MAX = 1000
"""A router that is so many steps behind is none."""


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """A deployment: ``step_base_s`` is t0, ``step_s_per_kv_token`` is a; seconds and tokens throughout.

    ``prefill_tokens_max``: most prompt tokens that a worker prefills in one step, less what it decodes in it
    (chunked prefill, as vLLM's ``max_num_batched_tokens``); None: whole prompts, as many as there are.
    ``dispatch_steps``: how many steps later a request takes part than the one in which a router decides on
    it; only the simulator looks at it, in a real or emulated deployment it follows from the network.
    """

    workers: int = 8
    slots: int = 64
    kv_capacity_tokens: int | None = None
    step_base_s: float = 0.030
    step_s_per_kv_token: float = 100e-9
    prefill_s_per_token: float = 0.0
    prefill_tokens_max: int | None = None
    dispatch_steps: int = 1

    def __post_init__(self) -> None:
        """Refuse what is no deployment."""
        if self.workers < 1 or self.slots < 1:
            msg = f"workers and slots must be at least 1, got {self.workers} and {self.slots}"
            raise InvalidInputError(msg)
        if self.kv_capacity_tokens is not None and self.kv_capacity_tokens < 1:
            msg = f"kv_capacity_tokens must be at least 1, got {self.kv_capacity_tokens}"
            raise InvalidInputError(msg)
        if self.step_base_s <= 0 or self.step_s_per_kv_token < 0 or self.prefill_s_per_token < 0:
            msg = "step_base_s must be positive, the cost of KV and prefill tokens at least 0"
            raise InvalidInputError(msg)
        if self.prefill_tokens_max is not None and self.prefill_tokens_max < self.slots:
            # As engines refuse it: with every slot decoding but one, nothing would ever be prefilled.
            msg = (
                f"prefill_tokens_max must be at least the slots, {self.slots}, got {self.prefill_tokens_max}"
            )
            raise InvalidInputError(msg)
        if not 0 <= self.dispatch_steps <= DISPATCH_STEPS_MAX:
            msg = f"dispatch_steps must be 0 to {DISPATCH_STEPS_MAX}, got {self.dispatch_steps}"
            raise InvalidInputError(msg)

    @property
    def costs(self) -> StepCosts:
        """Return what a step costs, as a router may know it."""
        return StepCosts(
            self.step_base_s, self.step_s_per_kv_token, self.prefill_s_per_token, self.prefill_tokens_max
        )

    def step_s(self, kv_tokens: IntArray, prefill_tokens: IntArray) -> float:
        """Return what a step takes in which the workers hold and prefill so many tokens, int64[G] (s)."""
        return (
            self.step_base_s
            + self.step_s_per_kv_token * float(kv_tokens.max())
            + self.prefill_s_per_token * float(prefill_tokens.max())
        )
