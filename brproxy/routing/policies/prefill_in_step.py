"""prefill-in-step: whole prompts for workers that share a barrier, equal prompt tokens for each at once."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
from pydantic import Field

from brproxy.routing.in_step import next_step, spread
from brproxy.routing.policies.least_prefill import FewestPromptTokensPolicy, LeastPrefillParams
from brproxy.routing.policy import register_policy
from brproxy.routing.view import NOT_ADMITTED, ClusterView, FloatArray, IntArray, RoundState
from brproxy.step_costs import BASE_TOKENS, StepCosts

_AHEAD, _AHEAD_S_MAX = 0.2, 0.1
"""The next step is sent when this share of the one that runs is left, or so many seconds: then all of it is
there when that ends, and not only what comes first."""

_URGENT_S = 0.5
"""A request is twice as urgent once it has waited for as long as a mean prompt takes; that where nobody says
what it takes (seconds)."""

_WAITS_MAX = 0.4
"""Share of the pool's limit in time that is waited at most, twice: to be due, and then for a step to end."""


class PrefillInStepParams(LeastPrefillParams):
    """The table of ``prefill-in-step``."""

    window: int = Field(
        default=256,
        ge=1,
        le=4096,
        description="Oldest waiting requests that a step is chosen from (requests).",
    )
    wait_s_max: float = Field(
        default=5.0,
        ge=0,
        strict=False,
        description="A request that has waited for so long goes with the next step; and no step is waited "
        "for longer (seconds).",
    )


@register_policy("prefill-in-step")
class PrefillInStepPolicy(FewestPromptTokensPolicy[PrefillInStepParams]):
    """Hold prompts until the workers have prefilled what they have, then send those that suit one step.

    See ``in_step.py``. In chunks nothing is held, and each goes to the worker with the fewest prompt tokens.
    """

    Params = PrefillInStepParams
    WAITED_FROM: ClassVar[float] = 0.0

    def lookahead_requests(self, waiting: int, costs: StepCosts | None) -> int:
        """See RoutingPolicy.lookahead_requests."""
        return self.params.window

    def holds(self, state: RoundState, costs: StepCosts | None, bound_s: float, wait_s_max: float) -> bool:
        """See RoutingPolicy.holds."""
        most = max(state.prefill_tokens, default=0)
        if not most or _is_in_chunks(costs):
            return False
        until_s = self._wait_s_max(wait_s_max)
        if costs is not None and costs.s_per_prefill_token > 0:
            step_s = costs.base_s + costs.s_per_prefill_token * most
            until_s = min(until_s, step_s - min(_AHEAD * step_s, _AHEAD_S_MAX))
        return bound_s < until_s

    def route(self, view: ClusterView, rng: np.random.Generator) -> IntArray:
        """See RoutingPolicy.route."""
        if view.waiting < 2 or _is_in_chunks(view.costs):
            return super().route(view, rng)
        decision = np.full(view.waiting, NOT_ADMITTED, dtype=np.int64)
        slots_free = int(view.slots_free.sum())
        if not slots_free:
            return decision
        count = min(view.waiting, self.params.window)
        by_size = np.argsort(view.prompt_tokens[:count], kind="stable")
        prompts = view.prompt_tokens[by_size].astype(np.float64)
        waited_s = np.zeros(count) if view.waited is None else view.waited[by_size] * view.wait_s_max
        is_due = waited_s >= self._wait_s_max(view.wait_s_max)
        goes = next_step(
            prompts,
            _urgency(waited_s, prompts, view.costs),
            _base_tokens(view.costs),
            int((view.slots_free > 0).sum()),
            slots_free,
            int(np.flatnonzero(is_due).max(initial=-1)) + 1,
        )
        # Where slots are short the next step may not reach to all that are due.
        suits = is_due | (np.arange(count) < goes)
        requests = by_size[suits]
        sequences = view.each_sequences()
        decision[requests] = spread(
            # What runs is over when they begin.
            replace(RoundState.of(view), prefill_tokens=[0] * view.workers),
            view.prompt_tokens[requests].tolist(),
            [sequences[i] for i in requests.tolist()],
            is_due[suits].tolist(),
        )
        return decision

    def _wait_s_max(self, limit_s: float) -> float:
        return min(self.params.wait_s_max, _WAITS_MAX * limit_s)


def _is_in_chunks(costs: StepCosts | None) -> bool:
    return costs is not None and costs.prefill_tokens_max is not None


def _base_tokens(costs: StepCosts | None) -> float:
    if costs is None or costs.s_per_prefill_token <= 0:
        return BASE_TOKENS
    return costs.base_s / costs.s_per_prefill_token


def _urgency(waited_s: FloatArray, prompts: FloatArray, costs: StepCosts | None) -> FloatArray:
    """Return what a second more weighs for each, float64[N]: 1 for who has just come."""
    urgent_s = _URGENT_S
    if costs is not None and costs.s_per_prefill_token > 0:
        urgent_s = costs.base_s + costs.s_per_prefill_token * float(prompts.mean())
    return 1.0 + waited_s / max(urgent_s, 1e-3)
