"""Subset sums against itertools."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.routing.subsets import subset_members, subset_sums


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=9), st.integers(1, 4))
def test_every_subset_once_smallest_and_oldest_first(prompts, size_max):
    sums = subset_sums(np.array(prompts, dtype=float), size_max)
    expected = [
        list(members)
        for size in range(1, min(size_max, len(prompts)) + 1)
        for members in combinations(range(len(prompts)), size)
    ]
    assert [subset_members(len(prompts), i) for i in range(len(sums))] == expected
    assert sums.tolist() == [sum(prompts[i] for i in members) for members in expected]


def test_beyond_the_last_subset():
    with pytest.raises(IndexError):
        subset_members(2, 3)
