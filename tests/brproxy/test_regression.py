"""Tokens of each class of bytes, learnt from whole prompts."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from brproxy.regression import Regression, tokens_at_most

many = st.integers(0, 1 << 64) | st.integers(0, 10_000)
texts = st.tuples(many, many, many, many, many, many, many, st.integers(0, 1))
UNITS = [tuple(int(index == unit) for index in range(8)) for unit in range(8)]


def weights(regression):
    return [regression.tokens(unit) for unit in UNITS]


@given(st.floats(0.5, 16), st.lists(st.tuples(texts, st.integers(-(1 << 64), 1 << 64)), max_size=20), texts)
def test_no_reports_lead_beyond_the_bounds(bytes_per_token, reports, text):
    regression = Regression(bytes_per_token)
    for counts, tokens in reports:
        before = weights(regression)
        if not regression.learn(counts, tokens):
            assert weights(regression) == before
    assert all(0.02 <= weight <= 2 for weight in weights(regression)[:6])
    assert all(0 <= weight <= 256 for weight in weights(regression)[6:])
    assert math.isfinite(regression.tokens(text))
    assert 0.019 * sum(text[:6]) <= regression.tokens(text) <= tokens_at_most(text) * (1 + 1e-9)


@given(st.lists(st.tuples(texts, many), max_size=20))
@example([((0, 0, 0, 0, 0, 0, 1 << 50, 0), 1)] * 5)
def test_what_is_known_is_known_better_with_each_report_and_never_for_certain(reports):
    regression = Regression(4.0)
    prior = Regression(4.0)._variances
    for counts, tokens in reports:
        regression.learn(counts, tokens)
        assert all(0 < now <= then * 1.01 for now, then in zip(regression._variances, prior, strict=True))


@pytest.mark.parametrize("text", [(400, 0, 0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 300, 2, 1)])
@pytest.mark.parametrize("tokens", [0, -5, 1, 1 << 64])
def test_what_cannot_be_true_teaches_nothing(text, tokens):
    regression = Regression(4.0)
    assert not regression.learn(text, tokens) or tokens == 1
    assert regression.learn(text, 150)


def test_a_class_that_was_not_there_keeps_its_weight():
    regression = Regression(4.0)
    before = weights(regression)
    for _ in range(50):
        regression.learn((800, 200, 0, 0, 0, 0, 0, 0), 180)
    after = weights(regression)
    assert after[2:] == before[2:]
    assert regression.tokens((800, 200, 0, 0, 0, 0, 0, 0)) == pytest.approx(180, rel=0.01)
    regression.learn((0, 0, 0, 0, 0, 900, 0, 0), 600)
    assert regression.tokens((0, 0, 0, 0, 0, 900, 0, 0)) == pytest.approx(600, rel=0.1), "by one report"
    assert weights(regression)[:5] == after[:5]


def test_a_huge_report_weighs_no_more_than_an_ordinary_one():
    small, huge = Regression(4.0), Regression(4.0)
    for _ in range(5):
        small.learn((4_000, 0, 0, 0, 0, 0, 0, 0), 1_500)
        huge.learn((4_000_000_000, 0, 0, 0, 0, 0, 0, 0), 1_500_000_000)
    assert weights(huge)[0] == pytest.approx(weights(small)[0], rel=0.01)


def test_a_surprise_counts_no_more_than_a_large_one():
    one, other = Regression(4.0), Regression(4.0)
    for regression, tokens in ((one, 1_000), (other, 1_900)):
        for _ in range(30):
            regression.learn((1000, 0, 0, 0, 0, 0, 0, 0), 250)
        regression.learn((1000, 0, 0, 0, 0, 0, 0, 0), tokens)
    assert weights(one) == weights(other)
    assert 0.25 < weights(one)[0] < 0.3
