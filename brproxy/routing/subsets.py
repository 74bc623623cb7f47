"""Every subset of a window of waiting requests, up to a size, as sums in one array.

The window is small (about 32), so all subsets of up to four requests are 41,448 sums: enumerating them with
cached index tables is exact and takes one gather per size.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import numpy as np

from brproxy.routing.view import FloatArray, IntArray

SUBSET_SIZE_MAX = 4
"""Largest subset: the paper's R_max. Five of 32 would be 200,000 more sums."""

WINDOW_MAX = 64
"""Largest window: with four of 64 the tables hold 679,120 subsets."""


@lru_cache(maxsize=256)
def _index_table(window: int, size: int) -> IntArray:
    return np.array(list(combinations(range(window), size)), dtype=np.int64).reshape(-1, size)


class SubsetSums:
    """The sums of all subsets of ``prompt_tokens`` (float64[W]) with 1 to ``size_max`` members.

    ``sums[K]`` starts with the single requests in window order, then the pairs, and so on: the first of
    equal scores is therefore the smallest set of the oldest requests.
    """

    def __init__(self, prompt_tokens: FloatArray, size_max: int) -> None:
        self._sizes = range(1, min(size_max, len(prompt_tokens)) + 1)
        self._window = len(prompt_tokens)
        self.sums: FloatArray = np.concatenate(
            [prompt_tokens[_index_table(self._window, size)].sum(axis=1) for size in self._sizes]
        )

    def members(self, index: int) -> list[int]:
        """Return the window positions of the subset whose sum is ``sums[index]``, oldest first."""
        for size in self._sizes:
            table = _index_table(self._window, size)
            if index < len(table):
                chosen: list[int] = table[index].tolist()
                return chosen
            index -= len(table)
        msg = "no subset has that index"
        raise IndexError(msg)
