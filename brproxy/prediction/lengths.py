"""Output lengths on a grid that is fine where it matters: exact for short ones, two per cent for long ones.

A curve is ``alive[B]``: how many of the remembered lengths are above each grid point. Grid points are
lengths; a length between two points belongs to the lower one.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import deque
from functools import lru_cache
from math import inf

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

_EXACT_BELOW = 64
_RATIO = 1.02

_RISK_MIN = 1e-12
"""Stands for nobody at risk: nobody ends there either."""

_NOBODY: IntArray = np.empty(0, dtype=np.int64)


class LengthGrid:
    """Grid points from 0 to ``length_max``, and the position of every length among them."""

    def __init__(self, length_max: int) -> None:
        points = list(range(min(_EXACT_BELOW, length_max) + 1))
        while points[-1] < length_max:
            points.append(min(length_max, max(points[-1] + 1, int(points[-1] * _RATIO))))
        self.length_max = length_max
        self._points = points
        self.points: IntArray = np.array(points, dtype=np.int64)
        self.position: IntArray = np.searchsorted(self.points, np.arange(length_max + 1), side="right") - 1

    def positions(self, lengths: IntArray) -> IntArray:
        """Return the grid positions of ``lengths`` (any shape, >= 0); the last for longer ones."""
        return self.position.take(lengths, mode="clip")

    def points_below(self, length: int) -> int:
        """Return the number of grid points below ``length``: at those, an output that long is still alive."""
        return bisect_left(self._points, length)

    def sum(self, alive: FloatArray) -> float:
        """Return the sum of the lengths whose curve (float64[B]) this is, as if even between two points."""
        gaps, fallen = np.diff(self.points), -np.diff(alive)
        return float((alive[:-1] * gaps - fallen * (gaps - 1) / 2).sum())

    def ahead(self, alive: NDArray[np.float32], steps: int) -> NDArray[np.float32]:
        """Return float32[B, steps]: a curve (float32[B]) at each grid point and at the lengths after it."""
        # The curve is spelt out for every length up to the longest, and 0 from there on: rows are then copied
        # from it as they stand, which takes no table of positions for each number of steps.
        lengths = np.zeros(self.length_max + 1 + steps, dtype=np.float32)
        longest = self._points[np.count_nonzero(alive)]
        np.take(alive, self.position[:longest], out=lengths[:longest], mode="clip")
        shape, strides = (self.length_max + 1, steps), (lengths.itemsize, lengths.itemsize)
        rows: NDArray[np.float32] = as_strided(lengths, shape, strides, writeable=False)[self.points]
        return rows

    def __len__(self) -> int:
        return len(self._points)


@lru_cache(maxsize=8)
def length_grid(length_max: int) -> LengthGrid:
    """Return the grid for lengths up to ``length_max``; predictors share it."""
    return LengthGrid(length_max)


def as_told(known: int) -> tuple[int, bool]:
    """Return the length (tokens) that ``known`` is, as LengthWindow has it, and whether the output ended."""
    return (known, True) if known >= 0 else (-1 - known, False)


class LengthWindow:
    """The last ``window`` lengths, and the curve that they make on the grid.

    Each is that of an output that *ended* by itself, or that was *cut* there and would have become longer.
    ``lengths`` has them oldest first, -1 - length for one that was cut.
    """

    def __init__(self, grid: LengthGrid, window: int) -> None:
        self._grid = grid
        self._window = window
        self._length_sum = 0
        self.cut = 0
        # At p: how many of the lengths have p grid points below them, and of those that ended. One number
        # changes with each length, where the curve would change up to there; it is asked for less often.
        self._left = array("q", bytes(8 * (len(grid) + 1)))
        self._ended = array("q", bytes(8 * (len(grid) + 1)))
        self.lengths: deque[int] = deque()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def length_sum(self) -> int:
        """Sum of the remembered lengths (tokens)."""
        return self._length_sum

    @property
    def alive(self) -> FloatArray:
        """The curve, float64[B]: how many of the remembered outputs are longer than each grid point."""
        return self.alive_with(_NOBODY, 0.0, 1.0)

    def alive_with(
        self,
        running: IntArray,
        weight: float,
        tail_tokens: float,
        assumed_tokens: float = inf,
        *,
        cut_is_end: bool = False,
    ) -> FloatArray:
        """Return the curve where outputs of ``running`` tokens (int64[R]) go on, each counting ``weight``.

        It is the Kaplan-Meier estimate (1958, "Nonparametric estimation from incomplete observations") times
        the number of outputs: an output counts for the ages that it was seen at, and says nothing of those
        beyond. Beyond the longest that was seen the curve falls exponentially, by a mean of ``tail_tokens``.
        Since few ends do not tell, that is no more than the longest that was seen, or ``assumed_tokens``.

        With ``cut_is_end`` it is the curve of how long requests stay, however they leave.
        """
        left = np.array(self._left, dtype=np.float64)
        ended = left.copy() if cut_is_end else np.array(self._ended, dtype=np.float64)
        if (cut_is_end or not self.cut) and not len(running):
            alive: FloatArray = len(self.lengths) - np.cumsum(left[:-1])
            return alive
        position = self._grid.positions(running)
        left += weight * np.bincount(position + (self._grid.points[position] < running), minlength=len(left))
        at_risk = np.cumsum(left[::-1])[::-1]
        hazard = ended / np.maximum(at_risk, _RISK_MIN)
        alive = at_risk[0] * np.cumprod(1.0 - np.minimum(hazard, 1.0))[:-1]
        last = min(int(np.flatnonzero(left)[-1]), len(alive) - 1)
        longest = self._grid.points[last]
        tail_tokens = min(max(tail_tokens, 1.0), max(float(longest), assumed_tokens))
        alive[last:] *= np.exp((longest - self._grid.points[last:]) / tail_tokens)
        alive[-1] = 0.0
        return alive

    def add(self, length: int, *, ended: bool = True) -> None:
        """Remember one more length (>= 0), and forget the oldest beyond the window."""
        length = min(length, self._grid.length_max)
        if len(self.lengths) == self._window:
            self._count(self.lengths.popleft(), -1)
        known = length if ended else -1 - length
        self.lengths.append(known)
        self._count(known, 1)

    def _count(self, known: int, change: int) -> None:
        length, ended = as_told(known)
        below = self._grid.points_below(length)
        self._left[below] += change
        self._length_sum += change * length
        if ended:
            self._ended[below] += change
        else:
            self.cut += change
