"""br-h: BalanceRoute with a short lookahead."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

from pydantic import Field

from brproxy.routing.balance import BalanceParams, BalancePolicy
from brproxy.routing.fscore import FScore, discounts_for
from brproxy.routing.policy import PolicyParams, register_policy
from brproxy.routing.view import ClusterView, FloatArray

HORIZON_STEPS_MAX = 512
_TURNOVER_STEPS_MIN = 2.0
_DECAY_LENGTHS = 3.0


class Lookahead(NamedTuple):
    """H in decode steps and the discount γ of each."""

    horizon_steps: int
    gamma: float


def lookahead_for(turnover_steps: float, lookahead_turnovers: float) -> Lookahead:
    """Return how far to look ahead for a deployment whose slots turn over every ``turnover_steps``.

    A wrong admission is corrected by later ones, of which a worker gets one each turnover: so the decay
    length of the discounts is a multiple of it, ``lookahead_turnovers * (turnover - 2)`` steps, and H is
    three decay lengths. Where slots turn over in two steps or less there is nothing to foresee, and H = 0
    makes BR-H BR-0. Found by simulation over five workloads (see the architecture's decisions).
    """
    decay_steps = lookahead_turnovers * (turnover_steps - _TURNOVER_STEPS_MIN)
    if decay_steps <= 1:
        return Lookahead(0, 1.0)
    return Lookahead(min(HORIZON_STEPS_MAX, math.ceil(_DECAY_LENGTHS * decay_steps)), 1 - 1 / decay_steps)


class BrHParams(BalanceParams):
    """Parameters of ``br-h``."""

    horizon_steps: int | None = Field(
        default=None,
        ge=0,
        le=HORIZON_STEPS_MAX,
        description="H: how far ahead loads are projected (decode steps). Left out: follows how fast slots "
        "turn over. The paper uses 80.",
    )
    gamma: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="γ: discount for each step ahead (ratio). Left out: follows how fast slots turn over.",
    )
    alpha: float = Field(default=1.0, gt=0, description="α: what a token of filled margin is worth (weight).")
    beta_per_worker: float = Field(
        default=2.0,
        gt=0,
        description="β / G: the price of raising the projected envelope (times G). The paper uses 1.",
    )


@register_policy("br-h")
class BrHPolicy(BalancePolicy[BrHParams]):
    """``F_g(Q) = α (Σ_h d_h) D(Q) - β Σ_h d_h (D(Q) - m_{g,h})+`` over projected margins, d_h = γ^h.

    Source: arXiv 2605.06113, BR-H. The view's forecast comes from a predictor; the round adds the prompt of
    what it admits to every step of it.
    """

    Params: ClassVar[type[PolicyParams]] = BrHParams

    def discounts(self, turnover_steps: float, lookahead_turnovers: float) -> FloatArray:
        """See RoutingPolicy.discounts."""
        return discounts_for(*self._lookahead(turnover_steps, lookahead_turnovers))

    def fscore(self, view: ClusterView) -> FScore:
        """See BalancePolicy.fscore."""
        horizon_steps, gamma = self._lookahead(view.turnover_steps, view.lookahead_turnovers)
        beta = self.params.beta_per_worker * view.workers
        return FScore.make(horizon_steps, gamma, self.params.alpha, beta)

    def _lookahead(self, turnover_steps: float, lookahead_turnovers: float) -> Lookahead:
        followed = lookahead_for(turnover_steps, lookahead_turnovers)
        fixed = self.params
        return Lookahead(
            followed.horizon_steps if fixed.horizon_steps is None else fixed.horizon_steps,
            followed.gamma if fixed.gamma is None else fixed.gamma,
        )
