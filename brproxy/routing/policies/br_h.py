"""br-h: BalanceRoute with a short lookahead."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from brproxy.routing.balance import BalanceParams, BalanceRound
from brproxy.routing.fscore import FScore
from brproxy.routing.policy import PolicyParams, RoutingPolicy, register_policy
from brproxy.routing.view import ClusterView, IntArray

HORIZON_STEPS_MAX = 512
"""Longest horizon: the forecast holds G * (H+1) numbers and later admissions correct the course anyway."""


class BrHParams(BalanceParams):
    """Parameters of ``br-h``."""

    horizon_steps: int = Field(
        default=20,
        ge=0,
        le=HORIZON_STEPS_MAX,
        description="H: how far ahead loads are projected (decode steps). About mean output tokens / slots: "
        "beyond that, later admissions correct the course. The paper uses 80.",
    )
    gamma: float = Field(default=0.95, gt=0, le=1, description="γ: discount for each step ahead (ratio).")
    alpha: float = Field(default=1.0, gt=0, description="α: what a token of filled margin is worth (weight).")
    beta_per_worker: float = Field(
        default=8.0,
        gt=0,
        description="β / G, the price of raising the projected envelope (times G). The paper uses 1.",
    )


@register_policy("br-h")
class BrHPolicy(RoutingPolicy[BrHParams]):
    """``F_g(Q) = α (Σ_h d_h) D(Q) - β Σ_h d_h (D(Q) - m_{g,h})+`` over projected margins, d_h = γ^h.

    Source: arXiv 2605.06113, BR-H. The view's forecast comes from a predictor; the round adds the prompt of
    what it admits to every step of it.
    """

    Params: ClassVar[type[PolicyParams]] = BrHParams

    @property
    def horizon_steps(self) -> int:
        """See RoutingPolicy.horizon_steps."""
        return self.params.horizon_steps

    @property
    def lookahead_requests(self) -> int:
        """See RoutingPolicy.lookahead_requests."""
        return self.params.window

    def route(self, view: ClusterView, rng: np.random.Generator) -> IntArray:
        """See RoutingPolicy.route."""
        params = self.params
        fscore = FScore.make(
            params.horizon_steps, params.gamma, params.alpha, params.beta_per_worker * view.workers
        )
        return BalanceRound(view, params, fscore, rng).run()
