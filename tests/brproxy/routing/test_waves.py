"""A wave of prompts against plain definitions: what fits is taken, and what is taken is counted right."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.routing.prefill import PrefillTerms
from brproxy.routing.view import NOT_ADMITTED, Home
from brproxy.routing.waves import PrefillRound, Stock
from tests.brproxy.routing.brute_force import make_view
from tests.brproxy.routing.test_prefill import scarce
from tests.draws import draws

LIMIT = 200


def round_of(view, terms=None):
    terms = terms or PrefillTerms(2.0, 0.4, 150.0)
    return PrefillRound(view, terms, view.forecast[:, 0], view.passed_over / LIMIT)


@given(prompts=st.lists(st.integers(0, 50), min_size=1, max_size=12), data=st.data())
def test_a_stock_gives_the_oldest_or_the_largest_that_fits(prompts, data):
    by_size = sorted(range(len(prompts)), key=lambda i: (prompts[i], -i))
    stock = Stock(prompts, by_size, [prompts[i] for i in by_size])
    left = list(range(len(prompts)))
    calls = data.draw(st.lists(st.tuples(st.sampled_from("olt"), st.integers(-1, 60)), max_size=20))
    for call, limit in calls:
        fits = [i for i in left if prompts[i] <= limit]
        if call == "t":
            request = limit % len(prompts)
            assert stock.take(request) == (request in left)
            left = [i for i in left if i != request]
            continue
        # Of equally large ones the oldest.
        best = min(fits, default=None) if call == "o" else max(fits, key=lambda i: prompts[i], default=None)
        assert (stock.oldest(limit) if call == "o" else stock.largest(limit)) == best
        left = [i for i in left if i != best]


def cost(view, admitted, terms):
    """Return what the wave costs, spelled out for requests without a home."""
    prompts = view.prompt_tokens
    added = [sum(int(prompts[i]) for i, g in admitted if g == worker) for worker in range(view.workers)]
    mean = sum(added) / view.workers
    before = view.forecast[:, 0]
    rise = (before + added).max() - before.max()
    return max(added) - 1.05 * mean + terms.kv_token * (rise - 0.5 * mean) - terms.slot * len(admitted)


@draws(100)
@given(view=scarce())
def test_waves_cost_what_is_said_and_the_cheapest_goes(view):
    terms = PrefillTerms(2.0, 0.4, 150.0)
    waves = round_of(view, terms).waves()
    for wave in waves:
        assert wave.cost == pytest.approx(cost(view, wave.admitted, terms))
    if waves:
        best = min(waves, key=lambda wave: wave.cost)
        decision = np.full(view.waiting, NOT_ADMITTED)
        for request, worker in best.admitted:
            decision[request] = worker
        assert round_of(view, terms).run().tolist() == decision.tolist()


@draws(100)
@given(view=scarce(), data=st.data())
def test_a_wave_leaves_no_margin_that_a_request_would_fit(view, data):
    sequences = data.draw(st.lists(st.integers(1, 3), min_size=view.waiting, max_size=view.waiting))
    view = replace(view, sequences=np.array(sequences))
    overdue = set(np.flatnonzero(view.passed_over >= LIMIT).tolist())
    for wave in round_of(view).waves():
        chosen = dict(wave.admitted)
        assert len(chosen) == len(wave.admitted), "nobody goes twice"
        left = [i for i in range(view.waiting) if i not in chosen]
        for worker in range(view.workers):
            mine = [i for i, g in wave.admitted if g == worker]
            prompts = [int(view.prompt_tokens[i]) for i in mine]
            slots_left = view.slots_free[worker] - sum(sequences[i] for i in mine)
            assert slots_left + max((sequences[i] for i in mine), default=0) >= (1 if mine else 0)
            assert sum(prompts) <= view.kv_free[worker]
            if overdue.isdisjoint(mine):
                # What is overdue goes anyhow; all others stay within the margins.
                assert sum(prompts) <= max(wave.room[worker], 0) + 1e-6
            room = min(wave.room[worker], view.kv_free[worker]) - sum(prompts)
            if slots_left > 0 and not held(view, worker):
                assert all(view.prompt_tokens[i] > room for i in left)


def held(view, worker):
    """Say whether the worker may be kept free for a request that lacks KV room everywhere."""
    late = view.prompt_tokens[view.passed_over * 2 >= LIMIT]
    return len(late) and late.max() > view.kv_free[worker]


@draws(100)
@given(view=scarce())
def test_overdue_requests_go_with_the_next_wave(view):
    # Each has room somewhere, and there are as many workers as can take one each.
    view = replace(view, kv_free=np.full(view.workers, 1 << 40))
    overdue = np.flatnonzero(view.passed_over >= LIMIT)
    decision = round_of(view).run()
    count = min(len(overdue), int((view.slots_free > 0).sum()))
    assert (decision[overdue[:count]] != NOT_ADMITTED).all()


def test_a_worker_is_kept_for_a_request_that_lacks_room_everywhere():
    # The first has been passed over half as often as it may be, and worker 1 has the most room.
    passed_over = [LIMIT // 2, 0, 0, 0, 0]
    prompts, kv_free = [9000, 500, 500, 500, 500], [4000, 8000, 6000]
    view = make_view([50_000] * 3, prompts, [1, 1, 1], kv_free=kv_free, passed_over=passed_over)
    decision = round_of(view).run().tolist()
    assert 1 not in decision
    assert {0, 2} <= set(decision)
    in_time = replace(view, passed_over=np.array([LIMIT // 2 - 1, 0, 0, 0, 0]))
    assert 1 in round_of(in_time).run().tolist()


def test_a_request_whose_beginning_is_cached_goes_there_first_and_counts_for_the_rest():
    # Alone the second would need an envelope of 9000 tokens; where it is at home it needs 1000.
    prompts = [1000, 9000, 1000, 1000, 1000]
    view = make_view([50_000] * 3, prompts, [1, 1, 1])
    assert round_of(view).run().tolist()[1] == NOT_ADMITTED
    at_home = replace(view, homes=[None, Home(2, 8000.0), None, None, None])
    decision = round_of(at_home).run().tolist()
    assert decision[1] == 2
    assert sorted(g for g in decision if g >= 0) == [0, 1, 2]


def test_nobody_else_takes_what_is_at_home_with_a_worker():
    # Worker 0 has more room and chooses first, but the oldest request is at home with worker 1.
    view = make_view([40_000, 50_000], [1000, 1000, 1000], [1, 1])
    assert round_of(view).run().tolist()[0] == 0
    at_home = replace(view, homes=[Home(1, 500.0), None, None])
    assert round_of(at_home).run().tolist() == [1, 0, NOT_ADMITTED]


def test_sums_are_alike_on_all_workers():
    # Eight workers with one to four free slots; of 64 requests those go that sum up to about the same.
    rng = np.random.default_rng(4)
    prompts = rng.lognormal(7.2, 1.0, 64).astype(int) + 16
    view = make_view([200_000] * 8, prompts, [1, 2, 3, 4, 1, 2, 3, 4])
    decision = round_of(view).run()
    sums = [int(view.prompt_tokens[decision == g].sum()) for g in range(8)]
    assert min(sums) > 0.8 * max(sums)
    assert (decision != NOT_ADMITTED).sum() >= 15
