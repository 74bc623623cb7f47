"""What is expected of a request before it begins."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.prediction.predictor import CERTAIN_OUTPUTS, PREDICTORS, make_predictor
from brproxy.types import PendingRequest
from tests.draws import draws


def prompt(number, **more):
    return PendingRequest(10, prompt_hash=number, **more)


@pytest.mark.parametrize("name", PREDICTORS.names())
def test_of_what_nobody_knows_as_much_is_expected_as_of_all(name):
    predictor = make_predictor(name)
    for tokens in (100, 300, 800):
        predictor.observe(prompt(1), tokens)
    assert predictor.expectation(PendingRequest(10)) == (400.0, 0.0)
    assert predictor.expectation(prompt(2)).outputs == 0.0
    assert predictor.expectation(PendingRequest(10, output_tokens_max=50)) == (50.0, 0.0)


@draws(50)
@given(
    st.sampled_from(["exact-match", "hierarchical"]),
    st.integers(40, 4000),
    st.lists(st.floats(0.7, 1.4), min_size=4, max_size=20),
)
def test_of_a_prompt_that_is_known_its_own_mean(name, tokens, noise):
    predictor = make_predictor(name)
    for number in range(50):
        predictor.observe(prompt(number), 1 + number * 50)
    lengths = [max(1, round(tokens * each)) for each in noise]
    for length in lengths:
        predictor.observe(prompt(99), length)
    expected, outputs = predictor.expectation(prompt(99))
    assert outputs == len(lengths)
    # Lengths are smoothed, and all traffic stands in for half an output.
    assert expected == pytest.approx(sum(lengths) / len(lengths), rel=0.5, abs=400)
    if tokens > 2000:
        assert expected > predictor.expectation(prompt(1)).tokens


def test_what_is_certain():
    known = make_predictor("oracle").expectation(PendingRequest(10, output_tokens_true=77))
    assert known == (77, CERTAIN_OUTPUTS)
    told = PendingRequest(10, output_tokens_max=9, runs_to_max=True)
    assert make_predictor("survival").expectation(told) == (9, CERTAIN_OUTPUTS)
