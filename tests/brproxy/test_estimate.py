"""Ratios learnt online, and streams counted in integers that add up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.estimate import BYTES_PER_TOKEN, LearntRatio, RatioLimits, StreamCounter, TokenEstimator
from brproxy.types import TOKENS_MAX


def test_the_initial_ratio_holds_until_a_report():
    estimator = TokenEstimator(bytes_per_token=5.0, models_max=4)
    assert estimator.prompt_tokens("m", 100) == 20
    estimator.learn_prompt("m", 300, 100)
    assert estimator.prompt_tokens("m", 300) == 100
    assert estimator.prompt_tokens("other", 100) == 20


def test_the_estimate_is_rounded_up():
    assert TokenEstimator(4.0, 4).prompt_tokens("m", 1) == 1
    assert TokenEstimator(4.0, 4).prompt_tokens("m", 0) == 0


@given(st.floats(1.0, 8.0), st.lists(st.integers(100, 100_000), min_size=5, max_size=40))
def test_learns_a_constant_ratio(ratio, sizes):
    learnt = LearntRatio(BYTES_PER_TOKEN, keys_max=4)
    for size in sizes:
        learnt.learn("m", size, size / ratio)
    assert learnt.value("m") == pytest.approx(ratio)


def test_follows_a_change():
    learnt = LearntRatio(BYTES_PER_TOKEN, keys_max=4)
    for ratio in [2.0] * 500 + [6.0] * 500:
        learnt.learn("m", 1000 * ratio, 1000)
    assert learnt.value("m") == pytest.approx(6.0, rel=0.01)


LIMITS = RatioLimits(4.0, 0.5, 16.0)
counts = st.integers(0, 1 << 70) | st.floats(0, allow_infinity=False)


@given(st.lists(st.tuples(counts, counts), max_size=20))
def test_a_ratio_stays_within_its_limits_and_what_cannot_be_true_teaches_nothing(reports):
    learnt, of_the_true = LearntRatio(LIMITS, keys_max=4), LearntRatio(LIMITS, keys_max=4)
    for above, below in reports:
        learnt.learn("m", above, below)
        if below and 0.5 <= above / below <= 16:
            of_the_true.learn("m", above, below)
    assert learnt.value("m") == of_the_true.value("m")
    assert 0.499 < learnt.value("m") < 16.001


def test_one_report_does_not_move_what_many_have_taught():
    estimator = TokenEstimator(4.0, 4)
    for _ in range(50):
        estimator.learn_prompt("m", 400, 100)
    estimator.learn_prompt("m", 560_000, 40_000)
    assert estimator.prompt_tokens("m", 4000) > 600, "some half a megabyte of spaces"
    for _ in range(50):
        estimator.learn_prompt("m", 400, 100)
    assert 800 < estimator.prompt_tokens("m", 4000) <= 1000


@given(st.integers(0, 1 << 70), st.integers(0, 1 << 40))
def test_a_guess_is_never_more_than_a_worker_holds(prompt_bytes, tokens_max):
    estimator = TokenEstimator(4.0, 4)
    assert 0 <= estimator.prompt_tokens("m", prompt_bytes, tokens_max) <= tokens_max
    assert estimator.prompt_tokens("m", prompt_bytes) <= TOKENS_MAX


@pytest.mark.parametrize(("above", "below"), [(0, 5), (5, 0), (-1, 5), (5, -1), (1000, 10), (1, 1000)])
def test_a_report_that_says_nothing_changes_nothing(above, below):
    learnt = LearntRatio(BYTES_PER_TOKEN, keys_max=4)
    learnt.learn("m", above, below)
    assert learnt.value("m") == BYTES_PER_TOKEN.initial


def test_only_so_many_models_are_remembered():
    learnt = LearntRatio(BYTES_PER_TOKEN, keys_max=2)
    for model in ("a", "b", "a", "c"):
        learnt.learn(model, 20, 10)
    assert [learnt.value(model) for model in ("a", "b", "c")] == [2.0, 4.0, 2.0]


@given(
    st.floats(0.1, 8.0),
    st.lists(st.one_of(st.none(), st.integers(0, 1000)), max_size=60),
)
def test_increments_add_up_to_the_count(ratio, steps):
    counter = StreamCounter(ratio)
    booked, reported, since = 0, 0, 0
    for step in steps:
        if step is None:
            since += 1
            booked += counter.count()
        else:
            reported, since = step, 0
            booked += counter.settle(step)
        assert booked == reported + round(since * ratio)
    assert counter.chunks == sum(step is None for step in steps)
