"""Subset sums against itertools."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.routing.subsets import set_members, set_sums, subset_members, subset_sums


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


@given(st.integers(1, 40), st.integers(2, 3))
def test_a_set_is_a_subset_of_the_oldest_or_one_that_is_younger(window, size_max):
    prompts = [7 + 3**0.5 * i for i in range(window)]
    sums = set_sums(np.array(prompts), size_max)
    members = [set_members(window, size_max, i) for i in range(len(sums))]
    assert sums.tolist() == pytest.approx([sum(prompts[i] for i in chosen) for chosen in members])
    oldest = min(window, 32)
    assert members[len(members) - (window - oldest) :] == [[i] for i in range(oldest, window)]
    subsets = {tuple(chosen) for chosen in members if max(chosen) < oldest}
    assert len(subsets) == len(members) - (window - oldest)
    assert len(subsets) == sum(math.comb(oldest, size) for size in range(1, min(size_max, oldest) + 1))
