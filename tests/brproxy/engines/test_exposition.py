"""Samples are found by their name, as the library that writes such pages reads them, in any page."""

import math

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from brproxy.engines.exposition import SAMPLES_MAX, Sample, samples

TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)


def test_a_page_of_an_engine_is_read():
    page = (
        b"# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.\n"
        b"# TYPE vllm:kv_cache_usage_perc gauge\n"
        b'vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25\n'
        b'vllm:kv_cache_usage_perc{engine="1",model_name="m"} 1.0 1700000000\n'
        b'vllm:kv_cache_usage_perc_other{engine="1"} 7\n'
        b"vllm:num_requests_running 3.0\r\n"
    )
    found = samples(page, {"vllm:kv_cache_usage_perc", "vllm:num_requests_running", "absent"})
    assert found == [
        Sample("vllm:kv_cache_usage_perc", {"engine": "0", "model_name": "m"}, 0.25),
        Sample("vllm:kv_cache_usage_perc", {"engine": "1", "model_name": "m"}, 1.0),
        Sample("vllm:num_requests_running", {}, 3.0),
    ]


@given(st.lists(st.tuples(TEXT, TEXT, st.floats()), max_size=8, unique_by=lambda one: one[:2]))
def test_what_the_library_writes_is_read_as_it_reads_it(values):
    registry = CollectorRegistry()
    gauge = Gauge("a:b", "Some gauge.\n{}", ["one", "other"], registry=registry)
    Gauge("a:b_more", "Another.", registry=registry).set(5)
    for one, other, value in values:
        gauge.labels(one, other).set(value)
    page = generate_latest(registry)
    theirs = [
        Sample(sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
        if sample.name == "a:b" and math.isfinite(sample.value)
    ]
    assert samples(page, ["a:b"]) == theirs


@given(
    st.binary(max_size=200), st.lists(st.sampled_from([b"a:b", b"{", b"}", b'"', b"\\", b"=", b" 1", b"\n"]))
)
def test_no_page_breaks_it(noise, pieces):
    for page in (noise, b"".join(pieces), b"a:b" + noise):
        for sample in samples(page, ["a:b"]):
            assert sample.name == "a:b"
            assert math.isfinite(sample.value)


def test_what_is_no_finite_number_is_no_sample():
    page = b"".join(
        b"a %b\n" % value for value in (b"NaN", b"+Inf", b"-Inf", b"x", b"", b"1e999", b"0x1", b"2")
    )
    assert samples(page, ["a"]) == [Sample("a", {}, 2.0)]


def test_a_line_with_many_labels_is_read():
    labels = {f"some_setting_of_the_cache_{number}": "None" for number in range(200)}
    page = ",".join(f'{key}="{value}"' for key, value in labels.items())
    assert samples(f"a{{{page}}} 1\n".encode(), ["a"]) == [Sample("a", labels, 1.0)]


def test_an_endless_page_is_read_as_far_as_it_may_be():
    page = b"".join(b'a{engine="%d"} 1\n' % number for number in range(SAMPLES_MAX + 5))
    assert len(samples(page, ["a"])) == SAMPLES_MAX
    assert samples(b"a{" + b'x="y",' * 10_000 + b"} 1\n", ["a"]) == []
