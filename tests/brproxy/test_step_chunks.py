"""How many prompt tokens held up all, against steps that are played through."""

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.step_chunks import CHUNKS, Prefill, prefill_sums

PLAIN_S = 0.03
PROMPTS = st.lists(st.tuples(st.integers(0, 19), st.integers(0, 3), st.integers(0, 30_000)), max_size=30)


def test_nothing_is_nothing():
    assert prefill_sums([], (0.0, 1.0), 30, PLAIN_S) == (0.0,) * len(CHUNKS)


@given(PROMPTS, st.sampled_from([0.0, 10e-6, 100e-6]), st.integers(0, 8), st.integers(9, 20), st.randoms())
def test_whole_prompts_are_as_played_through(prompts, per_token, first, last, random):
    # Twenty steps, each as long as its prefill makes it, and first tokens that come a little late.
    by_step = defaultdict(lambda: defaultdict(int))
    for step, worker, tokens in prompts:
        by_step[step][worker] += tokens
    most = [max(by_step[step].values(), default=0) for step in range(20)]
    ends_s = [0.0]
    for tokens in most:
        ends_s.append(ends_s[-1] + PLAIN_S + per_token * tokens)
    late_s = [random.uniform(0, 0.1 * PLAIN_S) for _ in prompts]
    prefills = [
        Prefill(ends_s[step + 1] + late, worker, tokens)
        for (step, worker, tokens), late in zip(prompts, late_s, strict=True)
    ]
    between_s = ends_s[first], ends_s[last]
    sums = prefill_sums(prefills, between_s, last - first, PLAIN_S)
    assert sums[0] == sum(most[first:last])


@given(st.sampled_from(CHUNKS[1:]), st.integers(1, 30_000), st.sampled_from([10e-6, 100e-6]))
def test_of_one_long_prompt_each_window_has_its_chunks(chunk, tokens, per_token):
    parts = [chunk] * (tokens // chunk) + [tokens % chunk] * bool(tokens % chunk)
    ends_s = [0.0]
    for part in parts:
        ends_s.append(ends_s[-1] + PLAIN_S + per_token * part)
    prefills = [Prefill(ends_s[-1], 0, tokens)]
    slopes = [per_token] * len(CHUNKS)
    number, half = CHUNKS.index(chunk), len(parts) // 2

    def seen(first, last):
        if first == last:
            return 0.0
        between_s = ends_s[first] + 1e-6, ends_s[last] + 1e-6
        return prefill_sums(prefills, between_s, last - first, PLAIN_S, slopes)[number]

    assert seen(0, half) == sum(parts[:half])
    assert seen(half, len(parts)) == sum(parts[half:])


def test_two_workers_that_prefill_side_by_side_hold_up_once():
    slopes = [20e-6] * len(CHUNKS)
    step_s = PLAIN_S + 20e-6 * 2048
    prefills = [Prefill(5 * step_s, worker, 5 * 2048) for worker in (0, 1)]
    sums = prefill_sums(prefills, (0.0, 5 * step_s + 0.001), 5, PLAIN_S, slopes)
    assert sums[CHUNKS.index(2048)] == pytest.approx(5 * 2048)


def test_a_worker_prefills_no_more_than_a_chunk_in_a_step():
    slopes = [20e-6] * len(CHUNKS)
    at_s = 1.0
    prefills = [Prefill(at_s, 0, 400), Prefill(at_s + 0.001, 0, 300)]
    assert prefill_sums(prefills, (0.9, 1.1), 6, PLAIN_S, slopes)[1] == 700
    long = [Prefill(at_s, 0, 1000), Prefill(at_s + 0.001, 0, 200)]
    assert prefill_sums(long, (0.98, 1.1), 4, PLAIN_S, slopes)[1] == 512
