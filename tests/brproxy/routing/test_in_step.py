"""Which prompts go with the next step, and where, against every way to cut and to spread them."""

import math
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.routing.in_step import next_step, spread
from brproxy.routing.policy import POLICIES, make_policy
from brproxy.routing.view import NOT_ADMITTED, RoundState
from brproxy.step_costs import StepCosts
from tests.brproxy.routing.brute_force import make_view

COSTS = StepCosts(0.03, 0.0, 50e-6)
CHUNKS = COSTS._replace(prefill_tokens_max=2048)


def cuts(count, requests_max, least):
    """Every way to cut so many prompts into steps: where each of them ends."""
    for inside in product((False, True), repeat=count - 1):
        ends = [*(i for i, is_cut in enumerate(inside, 1) if is_cut), count]
        sizes = [b - a for a, b in pairwise([0, *ends])]
        if max(sizes) <= requests_max and sizes[0] >= min(least, requests_max):
            yield ends


def cost(prompts, urgency, base_tokens, workers, ends):
    total, now = 0.0, 0.0
    for first, end in pairwise([0, *ends]):
        now += base_tokens + max(prompts[end - 1], sum(prompts[first:end]) / workers)
        total += now * sum(urgency[first:end])
    return total


@given(
    prompts=st.lists(st.sampled_from([1, 10, 10, 200, 3000, 9000]), min_size=1, max_size=8),
    base_tokens=st.sampled_from([0.0, 100.0, 5000.0]),
    workers=st.integers(1, 4),
    requests_max=st.integers(1, 9),
    data=st.data(),
)
def test_no_other_cut_has_less_waiting(prompts, base_tokens, workers, requests_max, data):
    prompts.sort()
    urgency = data.draw(
        st.lists(st.sampled_from([1.0, 1.5, 20.0]), min_size=len(prompts), max_size=len(prompts))
    )
    least = data.draw(st.integers(0, len(prompts)))
    goes = next_step(
        np.array(prompts, dtype=float), np.array(urgency), base_tokens, workers, requests_max, least
    )
    costs = {}
    for ends in cuts(len(prompts), requests_max, least):
        costs.setdefault(ends[0], []).append(cost(prompts, urgency, base_tokens, workers, ends))
    best = min(min(each) for each in costs.values())
    assert min(costs[goes]) == pytest.approx(best)


def test_small_prompts_do_not_wait_for_a_large_one_unless_it_is_urgent():
    prompts = np.array([100.0, 120.0, 150.0, 20_000.0])
    assert next_step(prompts, np.ones(4), 500.0, 4, 64) == 3
    assert next_step(prompts, np.array([1.0, 1.0, 1.0, 1e6]), 500.0, 4, 64) == 4


@given(prompts=st.lists(st.integers(1, 60), min_size=1, max_size=7), workers=st.integers(1, 3))
def test_spread_is_as_even_as_it_is_known_to_be(prompts, workers):
    state = RoundState.of(make_view([0] * workers, prompts, [99] * workers))
    chosen = spread(state, prompts, [1] * len(prompts), [False] * len(prompts))
    sums = [sum(p for p, g in zip(prompts, chosen, strict=True) if g == worker) for worker in range(workers)]
    assert sums == state.prefill_tokens
    best = min(
        max(sum(p for p, g in zip(prompts, ways, strict=True) if g == worker) for worker in range(workers))
        for ways in product(range(workers), repeat=len(prompts))
    )
    # Graham's bound.
    assert max(sums) <= best * (4 / 3 - 1 / (3 * workers)) + 1e-9


@given(
    prompts=st.lists(st.integers(0, 5000), min_size=1, max_size=12),
    slots=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    data=st.data(),
)
def test_who_has_waited_too_long_goes_with_the_next_step_where_there_is_room(prompts, slots, data):
    each = {"min_size": len(prompts), "max_size": len(prompts)}
    waited = data.draw(st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.7]), **each))
    kv_free = data.draw(st.lists(st.sampled_from([10**9, 6000]), min_size=len(slots), max_size=len(slots)))
    view = make_view([0] * len(slots), prompts, slots, kv_free=kv_free, waited=waited)
    view = replace(view, wait_s_max=10.0, costs=data.draw(st.sampled_from([None, COSTS])))
    decision = make_policy("prefill-in-step").route(view, np.random.default_rng(0)).tolist()
    due = [i for i, share in enumerate(waited) if share >= 0.4]
    if sum(slots) >= len(due) and all(tokens == 10**9 for tokens in kv_free):
        assert all(decision[i] != NOT_ADMITTED for i in due)
    left = [i for i in due if decision[i] == NOT_ADMITTED]
    if left and max(decision) != NOT_ADMITTED:
        # What they have no room for goes to nobody who is not due.
        assert all(i in due for i, g in enumerate(decision) if g != NOT_ADMITTED)


def held(prefill_tokens, costs=None, bound_s=0.0, limit_s=60.0, **params):
    view = make_view([0] * len(prefill_tokens), [5], [1] * len(prefill_tokens))
    state = replace(RoundState.of(view), prefill_tokens=list(prefill_tokens))
    return make_policy("prefill-in-step", POLICIES.get("prefill-in-step").Params(**params)).holds(
        state, costs, bound_s, limit_s
    )


def test_prompts_wait_while_others_are_prefilled_whole_and_never_for_long():
    assert held([0, 7])
    assert not held([0, 0], COSTS)
    assert not held([0, 0])
    assert not held([0, 7], CHUNKS)
    assert not held([0, 7], bound_s=5.0)
    assert not held([0, 7], wait_s_max=0.0)
    # By the time that the step takes, as far as that is known: a little before it ends.
    step_s = COSTS.base_s + 400 * COSTS.s_per_prefill_token
    assert held([0, 400], COSTS, bound_s=0.79 * step_s)
    assert not held([0, 400], COSTS, bound_s=0.81 * step_s)
    assert held([0, 40_000], COSTS, bound_s=1.92)
    assert not held([0, 40_000], COSTS, bound_s=1.94)
    # Nor for so long that they would be sent away.
    assert held([0, 7], bound_s=0.39, limit_s=1.0)
    assert not held([0, 7], bound_s=0.4, limit_s=1.0)


@given(prompts=st.lists(st.integers(0, 5000), max_size=9), tokens=st.lists(st.integers(0, 9), min_size=1))
def test_in_chunks_it_is_least_prefill(prompts, tokens):
    view = replace(
        make_view([0] * len(tokens), prompts, [2] * len(tokens)),
        prefill_tokens=np.array(tokens, dtype=np.int64),
        costs=CHUNKS,
    )
    chosen = [
        make_policy(name).route(view, np.random.default_rng(1)).tolist()
        for name in ("prefill-in-step", "least-prefill")
    ]
    assert chosen[0] == chosen[1]


def test_a_step_is_no_longer_than_what_a_mean_second_is_worth():
    """With many at hand a step has about equal tokens everywhere."""
    rng = np.random.default_rng(3)
    prompts = rng.integers(10, 3000, 200).tolist()
    view = replace(make_view([0] * 8, prompts, [64] * 8), costs=COSTS)
    decision = make_policy("prefill-in-step").route(view, rng)
    sums = np.bincount(decision[decision >= 0], view.prompt_tokens[decision >= 0], 8)
    assert sums.min() > 0.95 * sums.max()
    assert math.isfinite(sums.max())
