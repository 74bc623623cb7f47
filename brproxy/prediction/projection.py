"""From what is known of each request to the expected load of each worker. Array arithmetic, no loops.

The load of a worker h steps ahead is ``Σ_i P(i runs after h steps) * (kv_tokens_i + sequences_i * h)`` over
its requests; without ``sequences`` (int64[N]) each grows by one token in a step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


def project_certain(
    worker: IntArray,
    kv_tokens: IntArray,
    remaining: IntArray,
    workers: int,
    horizon_steps: int,
    sequences: IntArray | None = None,
) -> FloatArray:
    """Project requests that run exactly ``remaining`` more steps; returns float64[G, H+1].

    Source: arXiv 2605.06113 with its cut-off ĉ_i. A bincount over (worker, cut-off) and a reversed
    cumulative sum: no loop over steps. A request counts now even if it should have ended.
    """
    steps = horizon_steps + 1
    cutoff = np.clip(remaining, 1, steps)
    cell = worker * (steps + 1) + cutoff
    cells = workers * (steps + 1)
    kv = np.bincount(cell, kv_tokens, minlength=cells).reshape(workers, steps + 1)
    count = np.bincount(cell, sequences, minlength=cells).reshape(workers, steps + 1)
    # Alive at step h: those whose cut-off is beyond h.
    kv_alive = np.cumsum(kv[:, ::-1], axis=1)[:, ::-1][:, 1:]
    count_alive = np.cumsum(count[:, ::-1], axis=1)[:, ::-1][:, 1:]
    forecast: FloatArray = kv_alive + count_alive * np.arange(steps)
    return forecast


def project_curves(
    worker: IntArray,
    kv_tokens: IntArray,
    survival: FloatArray,
    workers: int,
    sequences: IntArray | None = None,
    steps: IntArray | None = None,
) -> FloatArray:
    """Project requests with a survival curve each (float64[N, K]); returns float64[G, K].

    The curves are of ``steps`` (int64[K]), or else of each step from 0 on.
    """
    ahead = np.arange(survival.shape[1]) if steps is None else steps
    forecast = np.zeros((workers, len(ahead)))
    if not len(worker):
        return forecast
    order = np.argsort(worker, kind="stable")
    growth = ahead if sequences is None else sequences[order, None] * ahead
    expected = survival[order] * (kv_tokens[order, None] + growth)
    present, first = np.unique(worker[order], return_index=True)
    forecast[present] = np.add.reduceat(expected, first, axis=0)
    return forecast
