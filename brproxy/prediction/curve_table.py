"""Length distributions by key, in one matrix: bounded, the least recently used keys make room. Pure.

Most keys are seen a few times only, and a few lengths are a poor distribution. What all keys have in common
is how much the lengths of one key differ: so each length stands for a little distribution around itself, as
wide as that says, and the narrower the more lengths of the key there are. Source: kernel smoothing with
Scott's rule (Scott 1992, "Multivariate Density Estimation"), here in the logarithm of the length::

    alive[t] = Σ_i K((ln l_i - ln(t + 1/2)) / b),    b = σ · n^(-1/5)

with σ the standard deviation of ln l within keys, pooled over all of them, and K the logistic distribution.
An output that was cut counts for those of its key that became longer, in equal parts (Efron 1967, "The two
sample problem with censored data": the Kaplan-Meier estimate as weights); the longest counts as ended.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator

import numpy as np

from brproxy.prediction.lengths import FloatArray, LengthGrid, LengthWindow, as_told

NO_SLOT = 0
"""Slot of a key that is not known: a curve without any length."""

_SPREAD_SAMPLES = 1000
"""Lengths over which σ is averaged."""

_SPREAD_MIN = 0.01
"""A narrower kernel changes nothing: the grid itself is two per cent wide."""

_LOGISTIC_SCALE = math.sqrt(3) / math.pi
"""Scale of a logistic distribution of standard deviation 1."""

_EXPONENT_MAX = 40.0


class CurveTable:
    """Up to ``keys_max`` keys with their last ``window`` output lengths each.

    ``alive[slot, B]`` are the smoothed curves on the grid and ``samples[slot]`` their sizes; slot 0 is always
    empty.
    """

    def __init__(self, grid: LengthGrid, keys_max: int, window: int) -> None:
        self._grid = grid
        self._window = window
        self._log_points = np.log(grid.points + 0.5)[:, None]
        self._variance = 0.0
        self._variance_samples = 0
        self._slots: OrderedDict[Hashable, int] = OrderedDict()
        # Made when a key comes: a table for thousands of keys takes a start no time.
        self._windows: dict[int, LengthWindow] = {}
        self.alive: FloatArray = np.zeros((keys_max + 1, len(grid)))
        self.samples: FloatArray = np.zeros(keys_max + 1)

    def find(self, key: Hashable | None) -> int:
        """Return the slot of ``key``, NO_SLOT when nothing is known of it; None is no key."""
        slot = NO_SLOT if key is None else self._slots.get(key, NO_SLOT)
        if slot != NO_SLOT:
            self._slots.move_to_end(key)
        return slot

    def add(self, key: Hashable | None, length: int, *, ended: bool = True) -> None:
        """Remember that an output for ``key`` had ``length`` tokens when it ended, or was cut."""
        if key is None:
            return
        slot = self._remember(key, length, ended=ended)
        self.alive[slot] = self._smoothed(self._windows[slot])

    def restore(self, items: Iterable[tuple[Hashable, Iterable[int]]]) -> None:
        """Remember what ``items`` gave once; curves come last, when the spread is known."""
        for key, lengths in items:
            for known in lengths:
                length, ended = as_told(known)
                self._remember(key, length, ended=ended)
        for slot in self._slots.values():
            self.alive[slot] = self._smoothed(self._windows[slot])

    def items(self) -> Iterator[tuple[Hashable, list[int]]]:
        """Yield every key with its lengths as LengthWindow has them, least recently used first."""
        for key, slot in self._slots.items():
            yield key, list(self._windows[slot].lengths)

    def _learn_spread(self, window: LengthWindow, length: int) -> None:
        """Compare a length with those of its key before: (n + 1) / n times the variance within a key."""
        seen = len(window) - window.cut
        lengths = np.array(window.lengths, dtype=np.float64)
        deviation = math.log(max(length, 1)) - float(_logs(lengths[lengths >= 0]).mean())
        self._variance_samples = min(self._variance_samples + 1, _SPREAD_SAMPLES)
        self._variance += (deviation**2 * seen / (seen + 1) - self._variance) / self._variance_samples

    def _smoothed(self, window: LengthWindow) -> FloatArray:
        """Return the curve of a key, float64[B]."""
        width = math.sqrt(self._variance) * len(window) ** -0.2
        if width < _SPREAD_MIN:
            return window.alive
        lengths = np.array(window.lengths, dtype=np.float64)
        weights = np.ones(len(lengths))
        if window.cut:
            lengths, weights = _passed_on(lengths)
        exponent = (self._log_points - _logs(lengths)) / (width * _LOGISTIC_SCALE)
        np.clip(exponent, -_EXPONENT_MAX, _EXPONENT_MAX, out=exponent)
        np.exp(exponent, out=exponent)
        exponent += 1.0
        alive: FloatArray = (1.0 / exponent) @ weights
        return alive

    def _remember(self, key: Hashable, length: int, *, ended: bool) -> int:
        """Put a length into the window of ``key``, without a new curve; return the slot."""
        slot = self.find(key)
        if slot == NO_SLOT:
            slot = self._take_slot(key)
        window = self._windows[slot]
        if ended and len(window) > window.cut:
            self._learn_spread(window, length)
        window.add(length, ended=ended)
        self.samples[slot] = len(window)
        return slot

    def _take_slot(self, key: Hashable) -> int:
        if len(self._slots) + 1 < len(self.samples):
            slot = len(self._slots) + 1
        else:
            _, slot = self._slots.popitem(last=False)
        self._windows[slot] = LengthWindow(self._grid, self._window)
        self._slots[key] = slot
        return slot


def _passed_on(known: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return lengths in order, float64[n], and their weights, once those that were cut have passed theirs on.

    ``known`` has the lengths as LengthWindow does.
    """
    was_cut = known < 0
    lengths = np.where(was_cut, -1 - known, known)
    # Of equal lengths those that ended come first: who was cut there became longer.
    order = np.lexsort((was_cut, lengths))
    weights, each = np.zeros(len(known)), 1.0
    for i, cut in enumerate(was_cut[order].tolist()):
        longer = len(known) - i - 1
        if cut and longer:
            each += each / longer
        else:
            weights[i] = each
    return lengths[order], weights


def _logs(lengths: FloatArray) -> FloatArray:
    """Return the logarithms of lengths; an empty output counts as one token."""
    logs: FloatArray = np.log(np.maximum(lengths, 1.0))
    return logs
