"""The grid of lengths, windows of them, and tables of curves by key: against plain loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.prediction.curve_table import NO_SLOT, CurveTable, _passed_on
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


@given(st.lists(st.integers(0, 4096), min_size=1, max_size=200))
def test_the_sum_of_the_lengths_of_a_curve(lengths):
    grid = LengthGrid(4096)
    window = LengthWindow(grid, 1000)
    for length in lengths:
        window.add(length)
    # Between two points of the grid a curve does not say where a length is.
    assert grid.sum(window.alive) == pytest.approx(sum(lengths), rel=0.011, abs=1e-6)


outputs = st.lists(st.tuples(st.integers(0, 60), st.booleans()), min_size=1, max_size=40)
"""Lengths on the exact part of the grid, and whether the output ended there."""


def kaplan_meier(known, running, weight, age):
    """P(longer than age), spelt out: at each length the share of those at risk that does not end there."""
    survival = 1.0
    for length in sorted({length for length, ended in known if ended and length <= age}):
        at_risk = sum(other >= length for other, _ in known) + weight * sum(r >= length for r in running)
        survival *= 1 - sum(other == length and ended for other, ended in known) / at_risk
    return survival


@given(outputs, st.lists(st.integers(0, 60), max_size=20), st.sampled_from([0.25, 1.0]), st.integers(1, 40))
def test_a_curve_is_the_kaplan_meier_estimate(known, running, weight, size):
    window = LengthWindow(LengthGrid(300), size)
    for length, ended in known:
        window.add(length, ended=ended)
    kept = known[-size:]
    alive = window.counts().alive(np.array(running, dtype=np.int64), weight, 20.0)
    most = len(kept) + weight * len(running)
    seen = max([length for length, _ in kept] + running)
    for age in range(61):
        beyond = math.exp(-max(0, age - seen) / 20)
        expected = most * kaplan_meier(kept, running, weight, age) * beyond
        assert alive[age] == pytest.approx(expected, abs=1e-9)
    assert (np.diff(alive) <= 1e-9).all()
    assert alive[-1] == 0, "nobody is longer than the grid"


@given(outputs, st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_of_a_key_those_that_were_cut_count_for_the_longer_ones(known, sharp):
    table = CurveTable(LengthGrid(300), keys_max=9, window=64)
    # Lengths far apart for one key and equal ones for another: wide and narrow kernels.
    for length, ended in known:
        table.add("own", length, ended=ended)
    own = table.alive[table.find("own")]
    assert (np.diff(own) <= 1e-9).all()
    assert own[0] <= len(known) + 1e-6
    for length in sharp:
        table.add("ended", length)
        table.add("cut", length, ended=length < max(sharp))
    # Made anew together: the kernels, whose width is learnt as lengths come, are then as wide for both.
    again = CurveTable(LengthGrid(300), keys_max=9, window=64)
    again.restore(table.items())
    cut, ended = (again.alive[again.find(key)][: max(sharp)] for key in ("cut", "ended"))
    assert cut == pytest.approx(ended, abs=1e-6), "the longest counts as ended"


@given(outputs)
def test_passing_weights_on_is_the_kaplan_meier_estimate(known):
    lengths, weights = _passed_on(np.array([n if ended else -1 - n for n, ended in known], dtype=np.float64))
    assert weights.sum() == pytest.approx(len(known))
    longest = max(length for length, _ in known)
    for age in range(longest):
        longer = weights[lengths > age].sum()
        assert longer == pytest.approx(len(known) * kaplan_meier(known, [], 0.0, age), abs=1e-9)
