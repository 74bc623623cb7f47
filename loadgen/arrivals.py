"""When the requests of a workload arrive and leave: a Poisson or bursty process, or the trace's own times."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from brproxy.types import InvalidInputError
from loadgen.workload import Workload


def with_gamma_arrivals(
    workload: Workload, rate_per_s: float, cv: float, rng: np.random.Generator
) -> Workload:
    """Return the workload with gamma-distributed gaps of mean ``1 / rate_per_s``, its order kept.

    ``cv`` is the gaps' coefficient of variation: 1 is a Poisson process, more is bursty, 0 is uniform.
    Raises InvalidInputError.
    """
    if not 0 < rate_per_s < float("inf"):
        msg = f"the arrival rate must be a positive number of requests a second, got {rate_per_s}"
        raise InvalidInputError(msg)
    if not 0 <= cv <= 100:
        msg = f"the coefficient of variation must be between 0 and 100, got {cv}"
        raise InvalidInputError(msg)
    count = len(workload.requests)
    if cv == 0:
        gaps = np.full(count, 1 / rate_per_s)
    else:
        shape = 1 / cv**2
        gaps = rng.gamma(shape, 1 / (rate_per_s * shape), count)
    arrivals = np.cumsum(gaps) - gaps[0]
    timed = zip(workload.requests, arrivals.tolist(), strict=True)
    return replace(workload, requests=tuple(replace(request, arrival_s=at_s) for request, at_s in timed))


def with_aborts(workload: Workload, fraction: float, rng: np.random.Generator) -> Workload:
    """Return the workload with the clients of a random ``fraction`` of its requests leaving before the end.

    Each of them leaves at a point of its output that is drawn uniformly. Raises InvalidInputError.
    """
    if not 0 <= fraction <= 1:
        msg = f"the share of requests that are aborted must be between 0 and 1, got {fraction}"
        raise InvalidInputError(msg)
    aborted = rng.random(len(workload.requests)) < fraction
    points = rng.random(len(workload.requests))
    drawn = zip(workload.requests, aborted.tolist(), points.tolist(), strict=True)
    return replace(
        workload,
        requests=tuple(
            replace(request, aborted_after_tokens=1 + int(point * request.output_tokens))
            if leaves
            else request
            for request, leaves, point in drawn
        ),
    )


def at_once(workload: Workload) -> Workload:
    """Return the workload as a closed batch: all of it arrives at 0, and says that it belongs together."""
    requests = tuple(replace(r, arrival_s=0.0, batch=workload.name) for r in workload.requests)
    return replace(workload, requests=requests)


def faster(workload: Workload, speed: float) -> Workload:
    """Return the workload with its own times divided by ``speed`` (> 0)."""
    if not 0 < speed < float("inf"):
        msg = f"the speed must be a positive factor, got {speed}"
        raise InvalidInputError(msg)
    return replace(
        workload, requests=tuple(replace(r, arrival_s=r.arrival_s / speed) for r in workload.requests)
    )
