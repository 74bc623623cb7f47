"""Output lengths on a grid that is fine where it matters: exact for short ones, two per cent for long ones.

A curve is ``alive[B]``: how many of the remembered lengths are above each grid point. Grid points are
lengths; a length between two points belongs to the lower one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from functools import lru_cache, partial
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
        # The number of grid points below a length: at those, an output that long is still alive. No method of
        # its own: each request asks for it.
        self.points_below: Callable[[int], int] = partial(bisect_left, points)
        self.points: IntArray = np.array(points, dtype=np.int64)
        self.position: IntArray = np.searchsorted(self.points, np.arange(length_max + 1), side="right") - 1
        # Between two points a curve falls evenly: half of each fall is before the middle of the gap.
        gaps = np.diff(self.points)
        self._sum_weights: FloatArray = np.zeros(len(points))
        self._sum_weights[:-1] += (gaps + 1) / 2
        self._sum_weights[1:] += (gaps - 1) / 2

    def positions(self, lengths: IntArray) -> IntArray:
        """Return the grid positions of ``lengths`` (any shape, >= 0); the last for longer ones."""
        return self.position.take(lengths, mode="clip")

    def sum(self, alive: FloatArray) -> float:
        """Return the sum of the lengths whose curve (float64[B]) this is, as if even between two points."""
        return float(alive @ self._sum_weights)

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


class LengthCounts:
    """What a LengthWindow has at one moment, from which a curve can be made later.

    At p: ``left`` is how many lengths have p grid points below them, ``ended`` how many of those ended there.
    """

    __slots__ = ("_ended", "_grid", "_left")

    def __init__(self, grid: LengthGrid, left: list[int], ended: list[int]) -> None:
        self._grid = grid
        self._left = left
        self._ended = ended

    def alive(
        self,
        running: IntArray = _NOBODY,
        weight: float = 0.0,
        tail_tokens: float = 1.0,
        assumed_tokens: float = inf,
    ) -> FloatArray:
        """Return the curve where outputs of ``running`` tokens (int64[R]) go on, each counting ``weight``.

        It is the Kaplan-Meier estimate (1958, "Nonparametric estimation from incomplete observations") times
        the number of outputs: an output counts for the ages that it was seen at, and says nothing of those
        beyond. Beyond the longest that was seen the curve falls exponentially, by a mean of ``tail_tokens``.
        Since few ends do not tell, that is no more than the longest that was seen, or ``assumed_tokens``.
        """
        left = np.array(self._left, dtype=np.float64)
        if self._ended is self._left and not len(running):
            alive: FloatArray = left.sum() - left[:-1].cumsum()
            return alive
        ended = left.copy() if self._ended is self._left else np.array(self._ended, dtype=np.float64)
        if len(running):
            points, position = self._grid.points, self._grid.positions(running)
            position += points[position] < running
            left += weight * np.bincount(position, minlength=len(left))
        at_risk = left[::-1].cumsum()[::-1]
        last = min(int(np.count_nonzero(at_risk)), len(left) - 1) - 1
        alive = np.zeros(len(left) - 1)
        hazard = ended[: last + 1] / np.maximum(at_risk[: last + 1], _RISK_MIN)
        np.subtract(1.0, hazard, out=hazard)
        np.maximum(hazard, 0.0, out=hazard)
        hazard.cumprod(out=alive[: last + 1])
        alive[: last + 1] *= at_risk[0]
        if alive[last] > 0.0:
            # Not all of the longest ended there.
            beyond = self._grid.points[last:]
            longest = float(beyond[0])
            tail_tokens = min(max(tail_tokens, 1.0), max(longest, assumed_tokens))
            alive[last:] = alive[last] * np.exp((longest - beyond) / tail_tokens)
            alive[-1] = 0.0
        return alive


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
        # As LengthCounts has them: one number changes with each length, where the curve would change up to
        # there; it is asked for less often.
        self._left = [0] * (len(grid) + 1)
        self._ended = [0] * (len(grid) + 1)
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
        return self.counts().alive()

    def counts(self, *, cut_is_end: bool = False) -> LengthCounts:
        """Return what makes the curve of outputs, or with ``cut_is_end`` that of how long requests stay."""
        left = self._left.copy()
        return LengthCounts(self._grid, left, self._ended.copy() if self.cut and not cut_is_end else left)

    def add(self, length: int, *, ended: bool = True) -> None:
        """Remember one more length (>= 0), and forget the oldest beyond the window."""
        length = min(length, self._grid.length_max)
        if len(self.lengths) == self._window:
            self._count(self.lengths.popleft(), -1)
        known = length if ended else -1 - length
        self.lengths.append(known)
        self._count(known, 1)

    def _count(self, known: int, change: int) -> None:
        # As as_told has it, without the call: each request that ends comes by here, mostly twice.
        ended = known >= 0
        length = known if ended else -1 - known
        below = self._grid.points_below(length)
        self._left[below] += change
        self._length_sum += change * length
        if ended:
            self._ended[below] += change
        else:
            self.cut += change
