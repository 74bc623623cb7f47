"""Ratios learnt online, and streams counted in integers that add up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy import estimate
from brproxy.estimate import LearntRatio, RatioLimits, StreamCounter, TokenEstimator
from brproxy.types import NO_TEXT, TOKENS_MAX

LIMITS = RatioLimits(4.0, 0.5, 16.0)


def letters(text_bytes):
    return (text_bytes, 0, 0, 0, 0, 0, 0, 0)


def test_a_new_model_has_the_configured_bytes_in_a_token():
    estimator = TokenEstimator(bytes_per_token=5.0, models_max=4)
    assert estimator.prompt_tokens("m", "", letters(100)) == 20
    for _ in range(9):
        estimator.learn_prompt("m", "", letters(300), 100)
    assert estimator.prompt_tokens("m", "", letters(300)) == pytest.approx(100, abs=2)
    assert estimator.prompt_tokens("other", "", letters(100)) == 20


def test_the_estimate_is_rounded_up():
    assert TokenEstimator(4.0, 4).prompt_tokens("m", "", letters(1)) == 1
    assert TokenEstimator(4.0, 4).prompt_tokens("m", "", NO_TEXT) == 0


def test_a_new_user_starts_from_the_model_and_becomes_his_own():
    estimator = TokenEstimator(4.0, 4)
    for _ in range(40):
        estimator.learn_prompt("m", "terse", letters(2000), 400)
        estimator.learn_prompt("m", "dense", letters(2000), 600)
    assert 440 < estimator.prompt_tokens("m", "new", letters(2000)) < 560
    assert estimator.prompt_tokens("m", "terse", letters(2000)) == pytest.approx(400, rel=0.05)
    assert estimator.prompt_tokens("m", "dense", letters(2000)) == pytest.approx(600, rel=0.05)
    for _ in range(3):
        estimator.learn_prompt("m", "new", letters(2000), 600)
    assert estimator.prompt_tokens("m", "new", letters(2000)) == pytest.approx(600, rel=0.1)


@given(st.floats(1.0, 8.0), st.lists(st.integers(100, 100_000), min_size=5, max_size=40))
def test_learns_a_constant_ratio(ratio, sizes):
    learnt = LearntRatio(LIMITS, keys_max=4)
    for size in sizes:
        learnt.learn("m", size, size / ratio)
    assert learnt.value("m") == pytest.approx(ratio)


def test_follows_a_change():
    learnt = LearntRatio(LIMITS, keys_max=4)
    for ratio in [2.0] * 500 + [6.0] * 500:
        learnt.learn("m", 1000 * ratio, 1000)
    assert learnt.value("m") == pytest.approx(6.0, rel=0.01)


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
        estimator.learn_prompt("m", "", letters(400), 100)
    estimator.learn_prompt("m", "", letters(560_000), 40_000)
    assert estimator.prompt_tokens("m", "", letters(4000)) > 600, "half a megabyte of what is few tokens"
    for _ in range(50):
        estimator.learn_prompt("m", "", letters(400), 100)
    assert 800 < estimator.prompt_tokens("m", "", letters(4000)) <= 1010


many = st.integers(0, 1 << 64)
texts = st.tuples(many, many, many, many, many, many, many, st.integers(0, 1))
reports = st.lists(st.tuples(st.sampled_from("mn"), st.sampled_from("uv"), texts, many), max_size=8)


@given(reports, texts, st.integers(0, 1 << 40))
def test_a_guess_is_never_more_than_a_worker_holds_or_its_bytes_can_be(taught, text, tokens_max):
    estimator = TokenEstimator(4.0, 4)
    for model, user, learnt, tokens in taught:
        estimator.learn_prompt(model, user, learnt, tokens)
    assert 0 <= estimator.prompt_tokens("m", "u", text, tokens_max) <= tokens_max
    assert estimator.prompt_tokens("m", "u", text) <= TOKENS_MAX
    most = 2 * sum(text[:-2]) + 256 * sum(text[-2:])
    assert estimator.prompt_tokens("m", "u", text, 1 << 80) <= most * (1 + 1e-9) + 1


@given(reports, st.lists(st.tuples(texts, many), min_size=1, max_size=8))
def test_what_was_estimated_when_a_request_came_is_learnt_against(taught, seen):
    told, untold = TokenEstimator(4.0, 4), TokenEstimator(4.0, 4)
    for model, user, learnt, tokens in taught:
        told.learn_prompt(model, user, learnt, tokens)
        untold.learn_prompt(model, user, learnt, tokens)
    for text, tokens in seen:
        told.learn_prompt("m", "u", text, tokens, told.prompt_tokens("m", "u", text))
        untold.learn_prompt("m", "u", text, tokens)
        assert told.prompt_tokens("m", "u", text) == untold.prompt_tokens("m", "u", text)


def test_of_what_was_expected_few_reports_are_learnt_from():
    estimator = TokenEstimator(4.0, 4)
    for _ in range(estimate._EXPECTED_PER_LESSON - 1):
        estimator.learn_prompt("m", "u", letters(400), 100)
    assert not estimator._models
    estimator.learn_prompt("m", "u", letters(400), 100)
    assert "m" in estimator._models


def test_a_report_that_cannot_be_true_is_of_no_user_either():
    estimator = TokenEstimator(4.0, 4)
    for tokens in (0, 1, 1000, TOKENS_MAX):
        estimator.learn_prompt("m", "u", letters(400), tokens)
    assert estimator.prompt_tokens("m", "u", letters(400)) == 100


def test_only_so_many_models_and_users_are_remembered(monkeypatch):
    monkeypatch.setattr(estimate, "_USERS_MAX", 3)
    estimator = TokenEstimator(4.0, 2)
    for model in ("a", "b", "a", "c"):
        for user in ("u", "v"):
            for _ in range(20):
                estimator.learn_prompt(model, user, letters(2000), 1000)
    # Reports within a hundredth of what was expected are mostly not learnt from.
    estimates = [estimator.prompt_tokens(model, "x", letters(100)) for model in "abc"]
    assert estimates == pytest.approx([50, 25, 50], abs=1)
    assert len(estimator._users._sums) == 3
    assert len(estimator._models) == 2


@pytest.mark.parametrize(("above", "below"), [(0, 5), (5, 0), (-1, 5), (5, -1), (1000, 10), (1, 1000)])
def test_a_report_that_says_nothing_changes_nothing(above, below):
    learnt = LearntRatio(LIMITS, keys_max=4)
    learnt.learn("m", above, below)
    assert learnt.value("m") == LIMITS.initial


def test_only_so_many_models_are_remembered():
    learnt = LearntRatio(LIMITS, keys_max=2)
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
