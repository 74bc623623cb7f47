"""The F-score: what admitting a set of requests to a worker does for the barrier.

BR-0 (paper, section on prediction-free routing)::

    F_g(Q) = D(Q) - G * (D(Q) - m_g)+

BR-H (paper, section on lookahead routing), discounts d_h = γ^h, margins m_{g,h} = M_h - L_g(k+h)::

    F_g(Q) = α * (Σ_h d_h) * D(Q) - β * Σ_h d_h * (D(Q) - m_{g,h})+

``D(Q)`` is the sum of the prompt tokens in ``Q``. With H = 0 and (α, β) = (1, G) the second is the first,
so one implementation serves both. F depends on Q only through the scalar D, and is concave and piecewise
linear in it with a breakpoint at each margin: one sorted pass over the margins of a worker makes scoring
any number of candidate sums a table look-up, whatever the horizon.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from brproxy.routing.view import FloatArray


@dataclass(frozen=True, slots=True)
class FScore:
    """The weights of the F-score: ``discounts[H+1]`` (d_0 = 1), ``alpha``, ``beta``."""

    discounts: FloatArray
    alpha: float
    beta: float

    @classmethod
    def make(cls, horizon_steps: int, gamma: float, alpha: float, beta: float) -> FScore:
        """Build the weights for d = (1, γ, …, γ^H)."""
        return cls(gamma ** np.arange(horizon_steps + 1, dtype=np.float64), alpha, beta)

    def headroom(self, margins: FloatArray) -> FloatArray:
        """Return float64[G]: the discounted mean margin of each worker, in KV tokens.

        ``margins`` is float64[G, H+1]. Workers are ordered by it (not by free slots, which below
        saturation are plentiful everywhere and say nothing about load).
        """
        headroom: FloatArray = margins @ self.discounts / self.discounts.sum()
        return headroom

    def score(self, margins: FloatArray, demands: FloatArray) -> FloatArray:
        """Return F for each of ``demands`` (float64[K], candidate values of D) on one worker.

        ``margins`` is float64[H+1]. Costs one sort of the margins and one look-up for each demand.
        """
        order = np.argsort(margins)
        weights = self.discounts[order]
        # With the margins sorted, those that a demand exceeds are a prefix: keep the prefix sums.
        weight_below = np.concatenate(([0.0], np.cumsum(weights)))
        moment_below = np.concatenate(([0.0], np.cumsum(weights * margins[order])))
        exceeded = np.searchsorted(margins[order], demands)
        overflow = demands * weight_below[exceeded] - moment_below[exceeded]
        score: FloatArray = self.alpha * self.discounts.sum() * demands - self.beta * overflow
        return score


def margins(forecast: FloatArray) -> FloatArray:
    """Return float64[G, H+1]: the envelope of each step less each worker's load, never negative."""
    below_envelope: FloatArray = forecast.max(axis=0) - forecast
    return below_envelope
