"""br-0: BalanceRoute without prediction."""

from __future__ import annotations

from typing import ClassVar

from brproxy.routing.balance import BalanceParams, BalancePolicy
from brproxy.routing.fscore import FScore
from brproxy.routing.policy import PolicyParams, register_policy
from brproxy.routing.view import ClusterView


class Br0Params(BalanceParams):
    """Parameters of ``br-0``."""


@register_policy("br-0")
class Br0Policy(BalancePolicy[Br0Params]):
    """``F_g(Q) = D(Q) - β * (D(Q) - m_g)+``: fill margins, do not raise the envelope.

    Source: arXiv 2605.06113, BR-0, where β = G. Needs nothing but the current loads.
    """

    Params: ClassVar[type[PolicyParams]] = Br0Params

    def fscore(self, view: ClusterView) -> FScore:
        """See BalancePolicy.fscore."""
        beta = self.params.beta_per_worker * view.workers
        return FScore.make(horizon_steps=0, gamma=1.0, alpha=1.0, beta=beta)
