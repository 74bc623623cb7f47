"""Output lengths on a grid that is fine where it matters: exact for short ones, two per cent for long ones.

A curve is ``alive[B]``: how many of the remembered lengths are above each grid point. Grid points are
lengths; a length between two points belongs to the lower one.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import deque
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

_EXACT_BELOW = 64
_RATIO = 1.02


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


class LengthWindow:
    """The last ``window`` lengths, and how many of them are above each grid point."""

    def __init__(self, grid: LengthGrid, window: int) -> None:
        self._grid = grid
        self._window = window
        self._length_sum = 0
        # At p: how many of the lengths have p grid points below them. One number changes with each length,
        # where the curve would change up to there; it is asked for less often.
        self._above = array("q", bytes(8 * (len(grid) + 1)))
        self.lengths: deque[int] = deque()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def mean(self) -> float:
        """Mean of the remembered lengths (tokens); raises ZeroDivisionError without any."""
        return self._length_sum / len(self.lengths)

    @property
    def alive(self) -> FloatArray:
        """The curve, float64[B]: how many of the remembered lengths are above each grid point."""
        above = np.array(self._above, dtype=np.float64)
        alive: FloatArray = len(self.lengths) - np.cumsum(above[:-1])
        return alive

    def add(self, length: int) -> None:
        """Remember one more length (>= 0), and forget the oldest beyond the window."""
        length = min(length, self._grid.length_max)
        if len(self.lengths) == self._window:
            oldest = self.lengths.popleft()
            self._above[self._grid.points_below(oldest)] -= 1
            self._length_sum -= oldest
        self.lengths.append(length)
        self._above[self._grid.points_below(length)] += 1
        self._length_sum += length
