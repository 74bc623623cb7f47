"""What engines say about their load: both pages are read, within bounds, and no page breaks the readers."""

import dataclasses

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from brproxy.engines.dialect import DIALECTS, make_dialect
from brproxy.engines.load import FIGURE_MAX, RANKS_MAX, LoadReading, LoadReport, matched
from brproxy.engines.load_pages import read_sglang_loads, read_vllm_metrics
from brproxy.types import TOKENS_MAX

VLLM_PAGE = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 0.0
vllm:num_requests_waiting{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="1",model_name="m",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 1.0
vllm:cache_config_info{block_size="16",engine="0",kv_cache_size_tokens="8000",num_gpu_blocks="9"} 1.0
vllm:cache_config_info{block_size="16",engine="1",kv_cache_size_tokens="8000",num_gpu_blocks="9"} 1.0
vllm:num_preemptions_total{engine="0",model_name="m"} 0.0
vllm:num_preemptions_total{engine="1",model_name="m"} 7.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 500.0
"""
OLD_PAGE = b"""vllm:num_requests_running{model_name="m"} 1
vllm:num_requests_waiting{model_name="m"} 0
vllm:gpu_cache_usage_perc{model_name="m"} 0.5
vllm:cache_config_info{block_size="16",num_gpu_blocks="100",kv_cache_size_tokens="None"} 1
vllm:num_preemptions{model_name="m"} 2
"""
SGLANG_LOAD = {
    "dp_rank": 1,
    "num_running_reqs": 2,
    "num_waiting_reqs": 3,
    "num_waiting_uncached_tokens": 40,
    "num_used_tokens": 100,
    "max_total_num_tokens": 5000,
    "total_prefill_uncached_tokens": 10**12,
    "total_prefill_busy_us": 7,
    "decode_moments": [3, 6, 900, 12, 1800, 6],
}
COUNTS = ("kv_used_tokens", "kv_capacity_tokens", "running", "waiting", "waiting_tokens")


def missing(reading):
    """Return what some rank does not say, or all that is wanted where there is none."""
    return set().union(*map(reading.missing, reading.reports.values() or [LoadReport()]))


def test_a_page_of_vllm():
    reading = read_vllm_metrics(VLLM_PAGE)
    assert reading.reports == {
        0: LoadReport(2000, 8000, running=3, waiting=0, preemptions=0, prefill_tokens=500),
        1: LoadReport(8000, 8000, running=4, waiting=2, preemptions=7),
    }
    assert (missing(reading), reading.renamed) == (set(), {})


def test_a_page_of_an_older_vllm_says_what_was_renamed():
    reading = read_vllm_metrics(OLD_PAGE)
    assert reading.reports == {0: LoadReport(800, 1600, running=1, waiting=0, preemptions=2)}
    assert not missing(reading)
    assert reading.renamed == {
        "kv_used_tokens": "vllm:gpu_cache_usage_perc",
        "kv_capacity_tokens": "num_gpu_blocks × block_size",
    }


def test_an_answer_of_sglang():
    other = {"dp_rank": 0, "num_used_tokens": 0, "max_total_num_tokens": 5000}
    reading = read_sglang_loads(orjson.dumps({"version": "0.5", "loads": [SGLANG_LOAD, other]}))
    moments = (3.0, 6.0, 900.0, 12.0, 1800.0, 6.0)
    assert reading.reports == {
        1: LoadReport(100, 5000, 2, 3, 40, None, 10**12, 7, moments),
        0: LoadReport(0, 5000),
    }
    assert reading.missing(reading.reports[0]) == {"running", "waiting"}
    assert not reading.missing(reading.reports[1])


@pytest.mark.parametrize("name", VLLM_PAGE.split(b"\n")[2:-2:2])
def test_what_one_rank_leaves_out_is_missing_and_not_zero(name):
    left_out = name.partition(b"{")[0]
    page = b"\n".join(line for line in VLLM_PAGE.split(b"\n") if not line.startswith(left_out + b"{"))
    if left_out.endswith((b"reason", b"prompt_tokens_total")):
        assert not missing(read_vllm_metrics(page))
        return
    reading = read_vllm_metrics(page)
    assert missing(reading)
    for figure in missing(reading):
        assert all(getattr(report, figure) is None for report in reading.reports.values())


def test_a_page_without_any_of_it_misses_all():
    every = ("kv_used_tokens", "kv_capacity_tokens", "running", "waiting", "preemptions")
    assert read_vllm_metrics(b"<html>") == LoadReading({}, every, {})
    assert read_sglang_loads(b"{}") == LoadReading({}, every[:4], {})


@pytest.mark.parametrize("value", ["NaN", "-1", "+Inf", "-Inf", "45.0", "1e308", "nonsense", ""])
def test_a_usage_that_is_none_is_missing(value):
    page = VLLM_PAGE.replace(b"usage_perc{engine", b"gone{engine") + (
        f'vllm:kv_cache_usage_perc{{engine="0"}} {value}\n'.encode()
    )
    reading = read_vllm_metrics(page)
    assert "kv_used_tokens" in missing(reading)
    assert reading.reports[0].kv_used_tokens is None


def is_bounded(reading):
    assert len(reading.reports) <= RANKS_MAX
    for rank, report in reading.reports.items():
        assert rank >= 0
        for name in COUNTS:
            value = getattr(report, name)
            assert value is None or (type(value) is int and 0 <= value <= FIGURE_MAX)
        for name in ("kv_used_tokens", "kv_capacity_tokens"):
            assert (getattr(report, name) or 0) <= TOKENS_MAX
        assert report.kv_capacity_tokens != 0
        assert report.decode_moments is None or all(0 <= n <= FIGURE_MAX for n in report.decode_moments)


NUMBERS = st.one_of(
    st.floats(), st.integers(-(2**70), 2**70), st.sampled_from([0, 1, 2**63, 2**64, -1, 1e308])
)
NAMES = st.sampled_from([line.partition(b"{")[0] for line in VLLM_PAGE.split(b"\n")[2:-1]])
LABELS = st.sampled_from(
    [b"", b'{engine="1"}', b'{engine="-1"}', b'{engine="99999999999"}', '{engine="٣"}'.encode()]
    + [b'{engine="0",kv_cache_size_tokens="%b"}' % size for size in (b"0", b"9" * 30, b"-5", b"1e5", b"7")]
    + [b'{num_gpu_blocks="%b",block_size="16"}' % count for count in (b"0", b"9" * 18, b"None", b"")]
)


@given(st.lists(st.tuples(NAMES, LABELS, NUMBERS), max_size=12), st.binary(max_size=60))
def test_no_page_of_metrics_breaks_the_reader(lines, noise):
    page = b"\n".join(name + labels + b" " + repr(value).encode() for name, labels, value in lines)
    is_bounded(read_vllm_metrics(page))
    is_bounded(read_vllm_metrics(page + noise))
    is_bounded(read_vllm_metrics(noise + b"\n" + page))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.sampled_from([*SGLANG_LOAD]), inner),
    max_leaves=12,
)


@given(
    st.one_of(JSON, st.lists(st.dictionaries(st.sampled_from([*SGLANG_LOAD]), JSON), max_size=4)),
    st.binary(max_size=20),
)
@example([SGLANG_LOAD | {"decode_moments": [1e308] * 6, "num_used_tokens": 2.0**80, "dp_rank": 1e300}], b"")
@example([SGLANG_LOAD | {"max_total_num_tokens": 0, "num_running_reqs": True}], b"")
def test_no_answer_breaks_the_reader(loads, noise):
    body = orjson.dumps({"loads": loads})
    for one in (body, orjson.dumps(loads), noise, body[:-3], b"[" * 100_000):
        is_bounded(read_sglang_loads(one))


def test_a_page_of_fifty_megabytes_and_one_of_endless_ranks_are_read_within_bounds():
    is_bounded(read_vllm_metrics(b"# HELP some histogram that nobody asks for\n" * 1_200_000))
    page = b"".join(b'vllm:num_requests_running{engine="%d"} 1\n' % rank for rank in range(5000))
    assert len(read_vllm_metrics(page).reports) == RANKS_MAX


REPORTS = {rank: LoadReport(10 * rank, 100, rank, 0, preemptions=rank) for rank in range(4)}


def test_members_get_the_report_of_their_rank():
    assert matched([0, 3, None, 9], REPORTS) == [
        REPORTS[0],
        REPORTS[3],
        LoadReport(60, 400, 6, 0, preemptions=6),
        None,
    ]
    assert matched([None], {7: REPORTS[2]}) == [REPORTS[2]], "the only one, whatever it is called"
    assert matched([None, 0], {}) == [None, None]


def test_as_many_ranks_by_other_numbers_are_taken_in_order():
    shifted = {rank + 4: report for rank, report in REPORTS.items()}
    assert matched([1, 0, 2, 3], shifted) == [REPORTS[1], REPORTS[0], REPORTS[2], REPORTS[3]]
    del shifted[7]
    assert matched([0, 1, 2, 4], shifted) == [None, None, None, REPORTS[0]], "nobody can tell which"


def test_what_one_rank_does_not_say_is_unknown_of_both():
    one, other = LoadReport(5, 10, 1), LoadReport(None, 10, 2, decode_moments=(1.0,) * 6)
    assert one + other == LoadReport(None, 20, 3)
    moments = other + other
    assert moments.decode_moments == (2.0,) * 6


@pytest.mark.parametrize(
    ("old", "new", "anew"),
    [
        ({"preemptions": 3}, {"preemptions": 0}, True),
        ({"prefill_tokens": 9}, {"prefill_tokens": 2}, True),
        ({"preemptions": 3, "prefill_tokens": 9}, {"preemptions": 3, "prefill_tokens": 10}, False),
        ({"preemptions": 3}, {}, False),
        ({"kv_used_tokens": 3}, {"kv_used_tokens": 0}, False),
    ],
)
def test_a_counter_that_falls_is_a_new_start(old, new, anew):
    assert LoadReport(**new).started_anew(LoadReport(**old)) is anew


@pytest.mark.parametrize("name", DIALECTS.names())
def test_each_dialect_says_where_and_reads_it(name):
    dialect = make_dialect(name)
    assert dialect.LOAD_PATH in {"", "/metrics", "/v1/loads"}
    reading = dialect.read_load(b"")
    assert reading.reports == {}
    assert bool(reading.wanted) is bool(dialect.LOAD_PATH)
    assert {field.name for field in dataclasses.fields(LoadReport)} >= set(reading.wanted)
