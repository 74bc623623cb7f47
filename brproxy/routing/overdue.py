"""Who has been passed over too often, or for too long. Pure."""

from __future__ import annotations

import numpy as np

from brproxy.routing.view import ClusterView, FloatArray

MAKE_ROOM_FROM = 0.5
"""Room is made for a request from here on; from 1 on it goes at any price."""

_WAITED_MAX = 0.9
"""The share of the pool's limit in time at which a request that was passed over goes at any price."""

OVERDUE_FROM = MAKE_ROOM_FROM * _WAITED_MAX
"""The share of that limit from which on it matters how long somebody has waited."""


def how_overdue(view: ClusterView, window: int, passed_over_max_per_worker: float) -> FloatArray:
    """Return how overdue each of the ``window`` oldest requests is (float64[W]), see ``MAKE_ROOM_FROM``.

    Time counts only once a window has been admitted before a request: where all wait long, nobody is overdue
    for that alone, and who is chosen is still chosen for its size.
    """
    passed_over = view.passed_over[:window]
    overdue: FloatArray = passed_over / (passed_over_max_per_worker * view.workers)
    if view.waited is None:
        return overdue
    return np.maximum(overdue, view.waited[:window] / _WAITED_MAX * (passed_over >= window))
