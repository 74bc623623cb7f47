"""Subset sums against itertools."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.routing.subsets import SubsetSums


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=9), st.integers(1, 4))
def test_every_subset_once_smallest_and_oldest_first(prompts, size_max):
    sums = SubsetSums(np.array(prompts, dtype=float), size_max)
    expected = [
        list(members)
        for size in range(1, min(size_max, len(prompts)) + 1)
        for members in combinations(range(len(prompts)), size)
    ]
    assert [sums.members(i) for i in range(len(sums.sums))] == expected
    assert sums.sums.tolist() == [sum(prompts[i] for i in members) for members in expected]


def test_beyond_the_last_subset():
    sums = SubsetSums(np.array([1.0, 2.0]), 2)
    with pytest.raises(IndexError):
        sums.members(3)
