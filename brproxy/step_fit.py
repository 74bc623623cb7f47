"""What a step costs, from windows of steps: least squares that outliers do not move, with errors. Pure.

A window of so many seconds has ``(seconds - b · P) / (t0 + a · L)`` steps, and the count of them is what is
not exact, so that is what is fitted: seconds and prompt tokens divided by the count would show a b that there
is not.
The time of a step is ``t0 + a · max_g s_g L_g + b · P``: t0 its base, a for a KV token, b for a prompt token
that the worker prefills which prefills most, s_g how much longer than the others worker g takes.

*Base and slope are told apart only as load varies.* Until it has, the best known of them is one sum; a weak
prior, that KV is half of a step's time as it is seen (give or take 30 %), shares it out, and the errors say
so. b is told as soon as some windows have prefills and others have fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

_KV_SHARE, _KV_SHARE_ERROR = 0.5, 0.3
"""Prior: the share of KV in a step's time, and its standard deviation."""

_PREFILL_ERROR = 4.0
"""Prior of b, beside 0: steps that a window's prefill may take, its standard deviation."""

_HUBER = 2.5
"""Errors count in full to so many standard deviations (Huber), and beyond by their size alone."""

_ROUNDS = 6
"""Repetitions of the weights."""

_MAD_TO_DEVIATION = 1.4826
"""Standard deviation over the median absolute deviation, of the normal distribution."""

_ALIKE_MAX = 0.9
"""Most correlation of neighbouring windows' errors that is reckoned with."""

_NOISE_MIN = 1e-3
"""Least relative error of a count of steps that is believed: clocks and networks have more."""

_PREFILL_MAX = 0.9
"""Most of a window that is taken to be prefill, while the costs are still far off."""

_TINY = 1e-15
"""Stands for no time and no error, where it must not be divided by nothing."""


class Costs(NamedTuple):
    """t0 (seconds), a and b (seconds a token), or their standard errors."""

    base_s: float
    s_per_kv_token: float
    s_per_prefill_token: float


Given = tuple[float | None, float | None, float | None]
"""Costs that somebody knows, in the order of ``Costs``; None: they are to be found."""


class Known(NamedTuple):
    """What is known before: costs and their standard errors."""

    costs: Costs
    errors: Costs


class Counts(NamedTuple):
    """K windows, float64[K] each: seconds, steps as counted, and the KV tokens that held up all.

    ``prefill_tokens``: summed over the steps, of the worker that prefilled most in each.
    """

    duration_s: FloatArray
    steps: FloatArray
    kv_tokens: FloatArray
    prefill_tokens: FloatArray

    def decoding_s(self, s_per_prefill_token: float) -> FloatArray:
        """Return how long each window was but for its prefills (seconds)."""
        prefill_s = np.minimum(s_per_prefill_token * self.prefill_tokens, _PREFILL_MAX * self.duration_s)
        return self.duration_s - prefill_s

    def weights(self, s_per_prefill_token: float) -> FloatArray:
        """Return what each window counts: more with many steps, less where little is left beside prefill."""
        weights = self.steps * self.decoding_s(s_per_prefill_token) / self.duration_s
        result: FloatArray = weights / weights.mean()
        return result


class Loads(NamedTuple):
    """KV tokens of each worker at both ends of each window, float64[K, G]."""

    before: FloatArray
    after: FloatArray

    def most(self, factors: FloatArray) -> FloatArray:
        """Return the load that holds all up, each worker's times its factor: the mean of both ends."""
        result: FloatArray = 0.5 * sum((end * factors).max(axis=1) for end in self)
        return result


@dataclass(frozen=True, slots=True)
class Fit:
    """``costs`` with ``errors``, and the ``noise`` of a window's count of steps (relative, its deviation).

    ``off``: how far the windows are from it, for comparison with other fits of the same windows.
    """

    costs: Costs
    errors: Costs
    noise: float
    off: float


def fit_costs(windows: Counts, given: Given = (None, None, None), before: Known | None = None) -> Fit:
    """Return the costs that ``windows`` (K >= 2) show; those that are ``given`` stay so, without error.

    None is less than zero. The errors are standard errors, larger where neighbouring windows are alike.
    ``before`` is what was known without these windows, None: a prior that knows only their sizes.
    """
    free = [number for number, value in enumerate(given) if value is None]
    costs = np.array([0.0 if value is None else value for value in given])
    means, deviations = _prior(windows) if before is None else map(np.array, before)
    # As counted to begin with; from then on what the costs say, as counts are not exact.
    expected, plain_s = windows.steps, windows.duration_s / windows.steps
    share = windows.weights(0.0)
    weights, noise, columns, errors = share, 1.0, np.ones((len(share), 3)), share
    for number in range(_ROUNDS):
        # Gauss-Newton about the costs so far: by how much is the count off, relative to what they say.
        columns = np.stack(
            [np.ones(len(share)), windows.kv_tokens, windows.prefill_tokens / expected], axis=1
        )
        columns /= plain_s[:, None]
        rest = 2 - windows.steps / expected + (costs[2] * columns[:, 2] if number else 0.0)
        known = np.array([0.0 if value is None else value for value in given])
        prior = means, (noise / np.maximum(deviations, _TINY)) ** 2
        costs = known + _least_squares(columns, rest - columns @ known, weights, prior, free)
        plain_s = np.maximum(costs[0] + costs[1] * windows.kv_tokens, _TINY)
        expected = windows.decoding_s(float(costs[2])) / plain_s
        share = windows.weights(float(costs[2]))
        errors = (windows.steps / expected - 1) * np.sqrt(share)
        noise = max(_MAD_TO_DEVIATION * float(np.median(np.abs(errors))), _NOISE_MIN)
        # By their size alone at first: so the first fit cannot be pulled to what is far from all others.
        bound = noise * (0.5 if number < _ROUNDS // 2 else _HUBER)
        weights = share * np.minimum(1.0, bound / np.maximum(np.abs(errors), _TINY))
    noise = _noise(errors, noise)
    found = _errors(columns, weights, noise, deviations, free)
    return Fit(Costs(*costs.tolist()), Costs(*found.tolist()), noise, float(np.abs(errors).sum()))


def _prior(windows: Counts) -> tuple[FloatArray, FloatArray]:
    """Return means and standard deviations of t0, a and b before anything is known but their sizes."""
    # Of windows with little prefill, if there are any.
    typical_s = float(np.quantile(windows.duration_s / windows.steps, 0.25))
    kv_tokens = max(float(np.median(windows.kv_tokens)), 1.0)
    prefill = windows.prefill_tokens / windows.steps
    busy = prefill[prefill > 0]
    means = np.array([typical_s * (1 - _KV_SHARE), typical_s * _KV_SHARE / kv_tokens, 0.0])
    deviations = np.array(
        [
            # The sum is known; how it is shared out is what the prior of a says.
            typical_s * 10.0,
            typical_s * _KV_SHARE_ERROR / kv_tokens,
            typical_s * _PREFILL_ERROR / (float(busy.mean()) if len(busy) else 1.0),
        ]
    )
    return means, deviations


def _least_squares(
    columns: FloatArray,
    rest: FloatArray,
    weights: FloatArray,
    prior: tuple[FloatArray, FloatArray],
    free: Sequence[int],
) -> FloatArray:
    """Return the best of the coefficients that are ``free``, none of them negative, float64[3].

    By looking at each choice of those that are zero: there are eight.
    """
    means, precision = prior
    squares = columns.T @ (weights[:, None] * columns) + np.diag(precision)
    products = columns.T @ (weights * rest) + precision * means
    best, best_value = np.zeros(3), 0.0
    choices = chain.from_iterable(combinations(free, size) for size in range(len(free), 0, -1))
    for chosen in choices:
        rows = list(chosen)
        part = np.linalg.solve(squares[np.ix_(rows, rows)], products[rows])
        value = -float(part @ products[rows])
        if (part >= 0).all() and value < best_value:
            best, best_value = np.zeros(3), value
            best[rows] = part
            if len(rows) == len(free):
                break
    return best


def _noise(errors: FloatArray, noise: float) -> float:
    """Return what the errors are as if each told by itself; ``noise`` is their deviation as it is."""
    clipped = np.clip(errors, -_HUBER * noise, _HUBER * noise)
    variance = max(float((clipped**2).mean()), noise**2)
    # Where one window's error says the next one's, they tell less than so many would.
    alike = float((clipped[1:] * clipped[:-1]).mean()) / variance
    alike = min(max(alike, 0.0), _ALIKE_MAX)
    return float(np.sqrt(variance * (1 + alike) / (1 - alike)))


def _errors(
    columns: FloatArray, weights: FloatArray, noise: float, deviations: FloatArray, free: Sequence[int]
) -> FloatArray:
    """Return the standard errors of the coefficients, 0 of those that are given, float64[3]."""
    squares = columns.T @ (weights[:, None] * columns) / noise**2 + np.diag(1 / deviations**2)
    result = np.zeros(3)
    if free:
        inverse = np.linalg.inv(squares[np.ix_(free, free)])
        result[free] = np.sqrt(np.maximum(np.diag(inverse), 0.0))
    return result
