"""Every subset of a window of waiting requests, up to a size, as sums in one array.

The window is small (about 32), so all subsets of up to four requests are 41,448 sums: enumerating them is
exact. Each size is built from the one before it with two gathers, by cached index tables.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import combinations

import numpy as np

from brproxy.routing.view import FloatArray, IntArray

SUBSET_SIZE_MAX = 4
"""Largest subset: the paper's R_max. Five of 32 would be 200,000 more sums."""

SUBSET_WINDOW_MAX = 32
"""Most requests to choose a subset from: with 64 the tables would hold 679,120 sums."""


@lru_cache(maxsize=256)
def _members(window: int, size: int) -> IntArray:
    """Return int64[C(window, size), size]: the members of every subset, in lexicographic order."""
    return np.array(list(combinations(range(window), size)), dtype=np.int64).reshape(-1, size)


@lru_cache(maxsize=256)
def _all_but_last(window: int, size: int) -> IntArray:
    """Return, for each subset, the position of its first ``size - 1`` members among the smaller ones."""
    positions = {tuple(members): i for i, members in enumerate(_members(window, size - 1).tolist())}
    return np.array([positions[tuple(m[:-1])] for m in _members(window, size).tolist()], dtype=np.int64)


def subset_sums(prompt_tokens: FloatArray, size_max: int) -> FloatArray:
    """Return the sums of all subsets of ``prompt_tokens`` (float64[W]) with 1 to ``size_max`` members.

    The single requests come first, in window order, then the pairs, and so on: the first of equal scores is
    therefore the smallest set of the oldest requests.
    """
    window = len(prompt_tokens)
    sums = [prompt_tokens]
    for size in range(2, min(size_max, window) + 1):
        last = _members(window, size)[:, -1]
        sums.append(sums[-1][_all_but_last(window, size)] + prompt_tokens[last])
    return np.concatenate(sums) if len(sums) > 1 else prompt_tokens


def subset_members(window: int, index: int) -> list[int]:
    """Return the window positions of the subset whose sum is at ``index``, oldest first."""
    for size in range(1, window + 1):
        table = _members(window, size)
        if index < len(table):
            chosen: list[int] = table[index].tolist()
            return chosen
        index -= len(table)
    msg = "no subset has that index"
    raise IndexError(msg)


def set_sums(prompt_tokens: FloatArray, size_max: int) -> FloatArray:
    """Return what can be chosen from a window, as sums: all subsets of its oldest, and each that is younger.

    ``prompt_tokens``: float64[W]. Subsets are of SUBSET_WINDOW_MAX requests at most.
    """
    sums = subset_sums(prompt_tokens[:SUBSET_WINDOW_MAX], size_max)
    younger = prompt_tokens[SUBSET_WINDOW_MAX:]
    return np.concatenate((sums, younger)) if len(younger) else sums


def set_members(window: int, size_max: int, index: int) -> list[int]:
    """Return the window positions of what stands at ``index`` of ``set_sums``, oldest first."""
    oldest = min(window, SUBSET_WINDOW_MAX)
    subsets = sum(math.comb(oldest, size) for size in range(1, min(size_max, oldest) + 1))
    return subset_members(oldest, index) if index < subsets else [oldest + index - subsets]
