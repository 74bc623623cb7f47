"""How high a worker is filled: below the envelope, since filling up to it raises it.

The F-score pays for every token up to the margin. With ``m_g = M - L_g`` each freed worker is filled to the
envelope M, all grow until their next departure, and the worker that waits longest for its own lifts M; then
everybody is filled up to the new M. What traffic fixes is the mean, so only a shortage of large prompts pulls
M down again, and the more workers there are, the higher it stands. So margins go to a *level* between mean
and envelope (arXiv 2605.06113 fills to M, an aim of 1)::

    m_{g,h} = mean_h + aim * (M_h - mean_h) - L_g(k+h)

Without a fixed aim the level follows the traffic, and nothing is kept from round to round:

* A worker grows after it was filled. The one of G that waits longest for a departure grows by ``growth``
  tokens: what a worker grows by between two departures on average, times 1 + 1/2 + … + 1/G, the mean of the
  largest of G exponential waits. Filled that far below M, it ends at M.
* Where M stands far above all others, as with a giant that nothing else can reach, filling up to it would use
  up the large prompts that wait, and the next workers would stay below. So the level is at most
  ``_PROMPTS`` mean prompts of the window above the mean. A pool with too few large prompts lowers it, one
  with too many raises it.
* It is at least ``_LEAST`` of the way up, where growth is more than all of M - mean.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from brproxy.routing.view import ClusterView, FloatArray

_PROMPTS = 2.0
_LEAST = 0.3


def growth_tokens(view: ClusterView) -> float:
    """Return how far the worker that waits longest for a departure grows until then (KV tokens).

    As far as the forecast does not have it already. Each running sequence grows by a token a step.
    """
    sequences = float(np.add.reduce(view.requests)) / view.workers
    unforeseen = 1.0 - view.growth_foreseen
    return unforeseen * view.turnover_steps * sequences * _longest_wait(view.workers)


@lru_cache(maxsize=64)
def _longest_wait(workers: int) -> float:
    """Return the mean of the largest of so many exponential waits, each 1 on average."""
    return sum(1 / k for k in range(1, workers + 1))


def level(
    mean: FloatArray, envelope: FloatArray, aim: float | None, growth: float, mean_prompt: float
) -> FloatArray:
    """Return how high a worker is filled, float64[H+1], for ``mean`` and ``envelope`` (float64[H+1]).

    ``aim``: share of the way from mean to envelope, None: it follows ``growth`` (see ``growth_tokens``) and
    ``mean_prompt``, the mean of the prompts to choose from (tokens).
    """
    gap = envelope - mean
    if aim is not None:
        return mean + aim * gap
    return mean + np.minimum(np.maximum(gap - growth, _LEAST * gap), _PROMPTS * mean_prompt)
