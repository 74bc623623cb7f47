"""Output lengths on a grid that is fine where it matters: exact for short ones, two per cent for long ones.

A curve is ``alive[B]``: how many of the remembered lengths are above each grid point. Grid points are
lengths; a length between two points belongs to the lower one.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache

import numpy as np
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
        self.points: IntArray = np.array(points, dtype=np.int64)
        self.position: IntArray = np.searchsorted(self.points, np.arange(length_max + 1), side="right") - 1

    def positions(self, lengths: IntArray) -> IntArray:
        """Return the grid positions of ``lengths`` (any shape, >= 0); the last for longer ones."""
        return self.position[np.minimum(lengths, self.length_max)]

    def __len__(self) -> int:
        return len(self.points)


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
        self.lengths: deque[int] = deque()
        self.alive: FloatArray = np.zeros(len(grid))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def mean(self) -> float:
        """Mean of the remembered lengths (tokens); raises ZeroDivisionError without any."""
        return self._length_sum / len(self.lengths)

    def add(self, length: int) -> None:
        """Remember one more length (>= 0), and forget the oldest beyond the window."""
        length = min(length, self._grid.length_max)
        if len(self.lengths) == self._window:
            oldest = self.lengths.popleft()
            self.alive[: self._above(oldest)] -= 1
            self._length_sum -= oldest
        self.lengths.append(length)
        self.alive[: self._above(length)] += 1
        self._length_sum += length

    def _above(self, length: int) -> int:
        """Return the number of grid points below ``length``: at those it is still alive."""
        position = int(self._grid.position[length])
        return position if int(self._grid.points[position]) == length else position + 1
