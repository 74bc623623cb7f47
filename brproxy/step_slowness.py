"""Which workers of a barrier group are slower than the others, from windows of steps. Pure.

All workers step at the pace of the one that holds all up, so only that one shows how slow it is: the time
of a step is ``t0 + a · max_g s_g L_g + b · P``, a maximum of linear functions (max-affine regression; Magnani
and Boyd, "Convex piecewise-linear fitting", 2009). The s_g are found one after the other, each by what the
windows' errors and a prior near 1 sum up to. Of a worker that never holds the others up there is only an
upper bound, and it counts as faster by no more than is seen; as load moves to it, more is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from brproxy.step_fit import Counts, Fit, Loads

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_PRIOR = 0.15
"""Standard deviation of the logarithm of s_g before anything is known."""

_BOUND = np.log(2.0)
"""No s_g is further from 1 than that, in logarithms: what is slower is no member of a barrier."""

_STEPS = (0.04, 0.005)
"""Distances between the values that are tried about the last one, coarse first (logarithms)."""

_TRIED = np.arange(-4, 5)
_HUBER = 2.5

_PARTS, _PARTS_AGREE, _OPPOSITE_MAX = 8, 3, 0.1
"""In how many parts of the windows it must show to be told, and how much of that others may show of the
opposite: a giant request, whose load is not known exactly, stays for minutes, and slowness for good."""

_SHOWS = 4.0
"""What a part's errors must sum up to less than with s_g = 1 to show it, in squared deviations."""

_WINDOWS_MIN = 96
"""From how many windows on it is told."""

_TOLD_MIN = 0.02
"""And what share of a step's time it must make out, more than a window is off by: less is worth no decision,
and no model is so exact."""

WORKERS_A_PASS = 8
"""Most workers looked at in one pass, in turn: it takes a tenth of a millisecond for each."""


class Slowness(NamedTuple):
    """By place: s_g, its standard error, and whether it is measurably not 1 (float64[G] twice, bool[G])."""

    factors: FloatArray
    errors: FloatArray
    is_told: BoolArray

    @staticmethod
    def alike(workers: int) -> Slowness:
        """Return what is known before anything is seen."""
        return Slowness(np.ones(workers), np.full(workers, _PRIOR), np.zeros(workers, dtype=bool))

    def told(self) -> tuple[float, ...] | None:
        """Return factors with mean 1, None where all workers are alike as far as is seen.

        Those that are not told are alike among each other.
        """
        if not self.is_told.any():
            return None
        others = self.factors[~self.is_told]
        factors = np.where(self.is_told, self.factors, others.mean() if len(others) else 1.0)
        return tuple((factors / factors.mean()).tolist())


def look_again(windows: Counts, loads: Loads, fit: Fit, before: Slowness, turn: int) -> Slowness:
    """Return what ``windows`` say, given the costs; begins with ``before``, and at worker ``turn``."""
    workers = len(before.factors)
    if workers < 2 or fit.costs.s_per_kv_token <= 0:
        return Slowness.alike(workers)
    costs = fit.costs
    plain_s = windows.decoding_s(costs.s_per_prefill_token) / windows.steps
    target = (plain_s - costs.base_s) / costs.s_per_kv_token
    expected_s = costs.base_s + costs.s_per_kv_token * windows.kv_tokens
    weights = windows.weights(costs.s_per_prefill_token)
    scale = np.sqrt(weights) * costs.s_per_kv_token / (fit.noise * expected_s)
    kv_share = float(np.median(windows.kv_tokens * windows.steps / windows.duration_s)) * costs.s_per_kv_token
    factors, errors, is_told = before.factors.copy(), before.errors.copy(), before.is_told.copy()
    for number in range(turn, turn + min(workers, WORKERS_A_PASS)):
        g = number % workers
        one = _One(loads, factors, g, target, scale)
        best = float(np.log(factors[g]))
        for step in _STEPS:
            tried = np.clip(best + step * _TRIED, -_BOUND, _BOUND)
            best = float(tried[np.argmin(one.off(tried))])
        matters = abs(best) * kv_share >= max(_TOLD_MIN, fit.noise)
        is_told[g] = len(scale) >= _WINDOWS_MIN and matters and one.shows(best)
        factors[g], errors[g] = np.exp(best), np.exp(best) * one.error(best)
    # What all have in common is the cost of a KV token.
    return Slowness(factors / factors.mean(), errors, is_told)


class _One:
    """How far off the windows are as the factor of worker ``g`` varies and those of the others stay."""

    def __init__(
        self, loads: Loads, factors: FloatArray, g: int, target: FloatArray, scale: FloatArray
    ) -> None:
        others = factors.copy()
        others[g] = 0.0
        self._ends = [(end[:, g], (end * others).max(axis=1)) for end in loads]
        self._target, self._scale = target, scale

    def off(self, logs: FloatArray) -> FloatArray:
        """Return what errors and prior sum up to for each of ``logs``, in squared deviations."""
        result: FloatArray = self._squares(logs).sum(axis=1) + (logs / _PRIOR) ** 2
        return result

    def _squares(self, logs: FloatArray) -> FloatArray:
        factors = np.exp(logs)[:, None]
        load = sum(0.5 * np.maximum(factors * own, most) for own, most in self._ends)
        errors = np.abs((self._target - load) * self._scale)
        # Huber's: what is far off counts by how far, not by its square.
        squares: FloatArray = np.where(errors < _HUBER, errors**2, 2 * _HUBER * errors - _HUBER**2)
        return squares

    def shows(self, log: float) -> bool:
        """Tell whether the windows show that factor and not 1, at one time as at another."""
        now, alike = self._squares(np.array([log, 0.0]))
        gains = np.array([float(part.sum()) for part in np.array_split(alike - now, _PARTS)])
        opposite = -gains[gains < 0].sum()
        return bool(
            (gains > _SHOWS).sum() >= _PARTS_AGREE and opposite <= _OPPOSITE_MAX * gains[gains > 0].sum()
        )

    def error(self, log: float) -> float:
        """Return the standard error of the factor's logarithm; if it never holds up others, the prior's."""
        factor = np.exp(log)
        held_up = sum(0.5 * factor * own * (factor * own >= most) for own, most in self._ends)
        return float(1 / np.sqrt(_PRIOR**-2 + ((held_up * self._scale) ** 2).sum()))
