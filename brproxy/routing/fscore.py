"""The F-score: what admitting a set of requests to a worker does for the barrier.

BR-0 (paper, section on prediction-free routing)::

    F_g(Q) = D(Q) - G * (D(Q) - m_g)+

BR-H (paper, section on lookahead routing), discounts d_h = γ^h, margins m_{g,h} = M_h - L_g(k+h)::

    F_g(Q) = α * (Σ_h d_h) * D(Q) - β * Σ_h d_h * (D(Q) - m_{g,h})+

``D(Q)`` is the sum of the prompt tokens in ``Q``. With H = 0 and (α, β) = (1, G) the second is the first, so
one implementation serves both. F depends on Q only through the scalar D, and is concave and piecewise linear
in it with a breakpoint at each margin. So it has one flat top, and of any number of candidate sums the best
is one inside the top, else the nearest below or the nearest above: no other needs a score.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from brproxy.routing.view import FloatArray

_FLAT = 1e-12
"""Slopes of less than this share of the steepest rise are none: they are differences of sums of floats."""


@lru_cache(maxsize=64)
def discounts_for(horizon_steps: int, gamma: float) -> FloatArray:
    """Return d = (1, γ, …, γ^H), float64[H+1], read-only."""
    discounts: FloatArray = gamma ** np.arange(horizon_steps + 1, dtype=np.float64)
    discounts.flags.writeable = False
    return discounts


@dataclass(frozen=True, slots=True)
class FScore:
    """The weights of the F-score: ``discounts[H+1]`` (d_0 = 1), their sum, ``alpha``, ``beta``."""

    discounts: FloatArray
    discount_sum: float
    alpha: float
    beta: float

    @staticmethod
    @lru_cache(maxsize=64)
    def make(horizon_steps: int, gamma: float, alpha: float, beta: float) -> FScore:
        """Return the weights for d = (1, γ, …, γ^H)."""
        discounts = discounts_for(horizon_steps, gamma)
        return FScore(discounts, float(discounts.sum()), alpha, beta)

    def score(self, margins: FloatArray, demands: FloatArray) -> FloatArray:
        """Return F for each of ``demands`` (float64[K], candidate values of D) on one worker.

        ``margins`` is float64[H+1]. For few demands: one product of a [K, H+1] matrix.
        """
        overflow = demands[:, None] - margins
        np.maximum(overflow, 0.0, out=overflow)
        score: FloatArray = self.alpha * self.discount_sum * demands - self.beta * (overflow @ self.discounts)
        return score

    def top(self, margins: FloatArray) -> tuple[float, float]:
        """Return the least and the greatest D at which F is largest, inf where it never falls.

        One sort of the margins: F rises until the discounts of the margins that D exceeds weigh more than
        what a filled token is worth.
        """
        order = np.argsort(margins)
        # Beyond the j smallest margins, F has this slope.
        slopes = self.alpha * self.discount_sum - self.beta * np.cumsum(self.discounts[order])
        # What is left of a flat piece by rounding: with one worker and β = G, all of F beyond its margins.
        flat = _FLAT * self.alpha * self.discount_sum
        rising = int((slopes > flat).sum())
        not_falling = int((slopes >= -flat).sum())
        edges = np.append(margins[order], np.inf)
        return float(edges[rising]), float(edges[not_falling])

    def best(self, margins: FloatArray, demands: FloatArray) -> tuple[int, float]:
        """Return the position of the best of ``demands`` (float64[K], K >= 1) and its score.

        The first of equally good ones. ``inf`` marks a demand that must not be chosen.
        """
        lowest, highest = self.top(margins)
        inside = demands >= lowest
        if highest < np.inf:
            below_top = demands < lowest
            inside &= demands <= highest
        else:
            below_top = ~inside
            inside &= demands < np.inf
        position = int(np.argmax(inside))
        if inside[position]:
            return position, float(self.score(margins, demands[position : position + 1])[0])
        below = demands.max(where=below_top, initial=-np.inf)
        above = demands.min(where=~below_top, initial=np.inf)
        sides = [side for side in (below, above) if np.isfinite(side)]
        if not sides:
            return 0, -np.inf
        scores = self.score(margins, np.array(sides)).tolist()
        best = max(scores)
        equals = [demands == side for side, score in zip(sides, scores, strict=True) if score == best]
        return int(np.argmax(np.logical_or.reduce(equals))), float(best)
