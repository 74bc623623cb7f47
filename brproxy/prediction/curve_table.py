"""Length distributions by key, in one matrix: bounded, the least recently used keys make room. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator

import numpy as np

from brproxy.prediction.lengths import FloatArray, LengthGrid, LengthWindow

NO_SLOT = 0
"""Slot of a key that is not known: a curve without any length."""


class CurveTable:
    """Up to ``keys_max`` keys with their last ``window`` output lengths each.

    ``alive[slot, B]`` are the curves on the grid and ``samples[slot]`` their sizes; slot 0 is always empty.
    """

    def __init__(self, grid: LengthGrid, keys_max: int, window: int) -> None:
        self._grid = grid
        self._window = window
        self._slots: OrderedDict[Hashable, int] = OrderedDict()
        self._windows: list[LengthWindow] = [LengthWindow(grid, window) for _ in range(keys_max + 1)]
        self.alive: FloatArray = np.zeros((keys_max + 1, len(grid)))
        self.samples: FloatArray = np.zeros(keys_max + 1)

    def find(self, key: Hashable | None) -> int:
        """Return the slot of ``key``, NO_SLOT when nothing is known of it; None is no key."""
        slot = NO_SLOT if key is None else self._slots.get(key, NO_SLOT)
        if slot != NO_SLOT:
            self._slots.move_to_end(key)
        return slot

    def add(self, key: Hashable | None, length: int) -> None:
        """Remember that an output for ``key`` had ``length`` tokens."""
        if key is None:
            return
        slot = self.find(key)
        if slot == NO_SLOT:
            slot = self._take_slot(key)
        window = self._windows[slot]
        window.add(length)
        self.alive[slot] = window.alive
        self.samples[slot] = len(window)

    def items(self) -> Iterator[tuple[Hashable, list[int]]]:
        """Yield every key with its lengths, least recently used first."""
        for key, slot in self._slots.items():
            yield key, list(self._windows[slot].lengths)

    def _take_slot(self, key: Hashable) -> int:
        if len(self._slots) + 1 < len(self._windows):
            slot = len(self._slots) + 1
        else:
            _, slot = self._slots.popitem(last=False)
            self._windows[slot] = LengthWindow(self._grid, self._window)
        self._slots[key] = slot
        return slot
