"""br-0: BalanceRoute without prediction."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from brproxy.routing.balance import BalanceParams, BalanceRound
from brproxy.routing.fscore import FScore
from brproxy.routing.policy import PolicyParams, RoutingPolicy, register_policy
from brproxy.routing.view import ClusterView, IntArray


class Br0Params(BalanceParams):
    """Parameters of ``br-0``."""


@register_policy("br-0")
class Br0Policy(RoutingPolicy[Br0Params]):
    """``F_g(Q) = D(Q) - β * (D(Q) - m_g)+``: fill margins, do not raise the envelope.

    Source: arXiv 2605.06113, BR-0, where β = G. Needs nothing but the current loads.
    """

    Params: ClassVar[type[PolicyParams]] = Br0Params

    @property
    def lookahead_requests(self) -> int:
        """See RoutingPolicy.lookahead_requests."""
        return self.params.window

    def route(self, view: ClusterView, rng: np.random.Generator) -> IntArray:
        """See RoutingPolicy.route."""
        beta = self.params.beta_per_worker * view.workers
        fscore = FScore.make(horizon_steps=0, gamma=1.0, alpha=1.0, beta=beta)
        return BalanceRound(view, self.params, fscore, rng).run()
