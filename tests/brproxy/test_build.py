"""From the configuration to what a group is told of its steps."""

import pytest

from brproxy.build import given_costs
from brproxy.config import parse_config
from brproxy.step_model import GivenCosts


def given(**costs):
    return given_costs(parse_config({"worker": [{"url": "http://h:1"}], "costs": costs}, "test"))


def test_what_is_given_is_in_seconds_and_the_rest_is_learnt():
    assert given() == GivenCosts()
    assert given(step_base_ms=30, prefill_tokens_max=2048) == GivenCosts(0.03, prefill_tokens_max=2048)
    found = given(step_ns_per_kv_token=100, prefill_us_per_token=20).costs
    assert found == (None, pytest.approx(100e-9), pytest.approx(20e-6))


def test_a_step_of_several_tokens_is_shared_out_among_them():
    found = given(
        step_base_ms=30,
        step_ns_per_kv_token=100,
        prefill_us_per_token=20,
        prefill_tokens_max=2048,
        tokens_per_step=2,
    )
    assert found.costs == pytest.approx((0.015, 50e-9, 20e-6))
    assert found.prefill_tokens_max == 1024
    assert given(tokens_per_step=2) == GivenCosts()
