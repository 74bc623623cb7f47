"""The grid of lengths, windows of them, and tables of curves by key: against plain loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.prediction.curve_table import NO_SLOT, CurveTable
from brproxy.prediction.lengths import LengthGrid, LengthWindow, length_grid


def test_the_grid_is_exact_for_short_lengths_and_two_per_cent_for_long_ones():
    grid = length_grid(32768)
    assert grid.points[:65].tolist() == list(range(65))
    assert grid.points[-1] == 32768
    assert (np.diff(grid.points)[64:] <= np.maximum(1, 0.02 * grid.points[64:-1])).all()
    assert len(grid) < 450
    assert grid.positions(np.array([0, 64, 10**9])).tolist() == [0, 64, len(grid) - 1]


@given(st.lists(st.integers(0, 400), max_size=20), st.integers(1, 400))
def test_the_rows_of_a_curve_are_the_lengths_ahead(lengths, steps):
    grid = LengthGrid(300)
    window = LengthWindow(grid, 20)
    for length in lengths:
        window.add(length)
    alive = window.alive.astype(np.float32)
    later = grid.positions(grid.points[:, None] + np.arange(steps))
    assert (grid.ahead(alive, steps) == alive[later]).all()


@given(st.lists(st.integers(0, 500), max_size=40), st.integers(1, 20))
def test_a_window_counts_what_is_above_each_point(lengths, size):
    grid = LengthGrid(300)
    window = LengthWindow(grid, size)
    for length in lengths:
        window.add(length)
    kept = [min(length, 300) for length in lengths][-size:]
    assert window.alive.tolist() == [sum(length > point for length in kept) for point in grid.points.tolist()]
    assert len(window) == len(kept)


def test_a_table_forgets_the_key_that_was_used_longest_ago():
    table = CurveTable(LengthGrid(50), keys_max=2, window=5)
    for key, length in (("a", 10), ("b", 20), ("a", 12), ("c", 30)):
        table.add(key, length)
    assert table.find("b") == table.find(None) == NO_SLOT
    assert table.samples[table.find("a")] == 2
    assert table.alive[table.find("c"), 5] == pytest.approx(1, abs=1e-3), "nothing of the key it replaced"
    assert dict(table.items()) == {"a": [10, 12], "c": [30]}
    table.add(None, 5)
    assert not table.samples[NO_SLOT]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60)), max_size=30),
    st.integers(1, 8),
)
def test_a_length_stands_for_those_around_it(observed, size):
    """The formula of the module with plain loops, σ included."""
    table = CurveTable(LengthGrid(64), keys_max=9, window=size)
    seen, squares = {}, []
    for key, length in observed:
        table.add(key, length)
        logs = seen.setdefault(key, [])[-size:]
        own = math.log(max(length, 1))
        if logs:
            squares.append((own - sum(logs) / len(logs)) ** 2 * len(logs) / (len(logs) + 1))
        seen[key].append(own)
    if not observed:
        return
    key = observed[-1][0]
    logs = seen[key][-size:]
    kept = [length for other, length in observed if other == key][-size:]
    width = math.sqrt(sum(squares) / max(1, len(squares))) * len(logs) ** -0.2
    for age in (0, 3, 20, 64):
        if width < 0.01:
            expected = sum(length > age for length in kept)
        else:
            steepness = math.pi / (math.sqrt(3) * width)
            expected = sum(
                1 / (1 + math.exp(min(40, (math.log(age + 0.5) - own) * steepness))) for own in logs
            )
        assert table.alive[table.find(key), age] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_equal_lengths_of_a_key_stay_sharp_and_few_of_a_varied_law_do_not():
    sharp, varied = (CurveTable(LengthGrid(4096), keys_max=99, window=64) for _ in range(2))
    for key in range(20):
        for i in range(6):
            sharp.add(key, 100 + 50 * key)
            varied.add(key, int((100 + 50 * key) * (1 + 0.1 * (-1) ** i)))
    grid = LengthGrid(4096)
    before, after = grid.positions(np.array([95, 106]))
    for table in (sharp, varied):
        table.add("new", 100)
    new = sharp.alive[sharp.find("new")]
    assert (new[before], new[after]) == (1, 0)
    new = varied.alive[varied.find("new")]
    assert 0.55 < new[before] < 0.9
    assert 0.1 < new[after] < 0.45
