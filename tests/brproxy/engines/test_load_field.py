"""The load that comes with a response: both of its forms, and whatever else may stand there."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines.load_field import FieldLoad, read_load_field
from brproxy.types import TOKENS_MAX

BAD = FieldLoad(is_bad=True)


@pytest.mark.parametrize(
    ("value", "load"),
    [
        (b'JSON {"named_metrics": {"kv_cache_usage_perc": 0.4, "num_requests_waiting": 3.0}}', (0.4, 3)),
        (b"TEXT named_metrics.kv_cache_usage_perc=0.4, named_metrics.num_requests_waiting=3.0", (0.4, 3)),
        (b'json {"named_metrics": {"num_requests_waiting": 0.0, "more": "x"}}', (None, 0)),
        (b"text named_metrics.kv_cache_usage_perc=1.005", (1.0, None)),
        (b'JSON {"named_metrics": {}}', (None, None)),
        (b"JSON {}", (None, None)),
        (b"TEXT ", (None, None)),
        (b'JSON {"named_metrics": {"num_requests_waiting": 1e30}}', (None, TOKENS_MAX)),
    ],
)
def test_what_is_said_is_read_and_what_is_absent_is_not_zero(value, load):
    assert read_load_field(value) == FieldLoad(*load)


@pytest.mark.parametrize(
    ("value", "load"),
    [
        (b"", BAD),
        (b"BIN xyz", BAD),
        (b'JSON {"named_metrics": {"kv_cache_usage_perc": NaN}}', BAD),
        (b'JSON {"named_metrics": []}', BAD),
        (b"JSON []", BAD),
        (b"JSON {" + b" " * 5000 + b"}", BAD),
        (b'JSON {"named_metrics": {"kv_cache_usage_perc": true}}', BAD),
        (b"TEXT named_metrics.kv_cache_usage_perc=high", BAD),
        (b"TEXT named_metrics.kv_cache_usage_perc=nan", BAD),
        (b"TEXT named_metrics.num_requests_waiting=1, named_metrics.num_requests_waiting=2", BAD),
        (
            b'JSON {"named_metrics": {"kv_cache_usage_perc": 40, "num_requests_waiting": 2}}',
            FieldLoad(None, 2, is_bad=True),
        ),
        (
            b"TEXT named_metrics.kv_cache_usage_perc=0.5, named_metrics.num_requests_waiting=-1",
            FieldLoad(0.5, None, is_bad=True),
        ),
    ],
)
def test_what_is_no_figure_is_left_out_and_said_to_be_bad(value, load):
    assert read_load_field(value) == load


@given(
    st.binary(max_size=200)
    | st.text(max_size=80).map(lambda text: b"TEXT " + text.encode())
    | st.dictionaries(
        st.sampled_from(["kv_cache_usage_perc", "num_requests_waiting"]),
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    ).map(lambda named: b"JSON " + json.dumps({"named_metrics": named}).encode())
)
def test_whatever_comes_is_within_bounds(value):
    load = read_load_field(value)
    assert load.usage is None or 0 <= load.usage <= 1
    assert load.waiting is None or 0 <= load.waiting <= TOKENS_MAX
