"""One contract for every registered policy, and what each of them is known for."""

from dataclasses import replace
from functools import cache, partial
from itertools import product

import numpy as np
import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from brproxy.registry import UnknownNameError
from brproxy.routing.policy import POLICIES, PolicyParams, make_policy
from brproxy.routing.view import KV_UNLIMITED_TOKENS, NOT_ADMITTED, SLOTS_UNLIMITED, ClusterView, RoundState
from tests.brproxy.routing.brute_force import each
from tests.draws import draws

NAMES = POLICIES.names()


SEEDS = st.integers(0, 5)
WORKERS = st.integers(1, 6)
WAITING = st.integers(0, 12)


@cache
def column(low, high, size):
    return each(st.integers(low, high), size).map(partial(np.array, dtype=np.int64))


@st.composite
def views(draw, horizon_steps=20, overdue_max=300):
    workers, waiting = draw(WORKERS), draw(WAITING)
    kv_tokens = draw(column(0, 10_000, workers))
    growth = draw(column(0, 300, workers))
    return ClusterView(
        kv_tokens=kv_tokens,
        requests=draw(column(0, 8, workers)),
        slots=draw(column(1, 8, workers)),
        slots_free=draw(column(0, 4, workers)),
        kv_capacity=np.full(workers, 20_000, dtype=np.int64),
        kv_free=draw(column(0, 20_000, workers)),
        prompt_tokens=draw(column(0, 5_000, waiting)),
        passed_over=draw(column(0, overdue_max, waiting)),
        forecast=kv_tokens[:, None] + growth[:, None] * np.arange(horizon_steps + 1.0),
    )


# For each view all policies, as it takes longer to draw one than to decide about it ten times.


@given(view=views(), seed=SEEDS)
def test_contract(view, seed):
    for name in NAMES:
        note(name)
        keeps_the_contract(name, view, seed)


def keeps_the_contract(name, view, seed):
    policy = make_policy(name)
    before = [
        getattr(view, field).copy() for field in ("kv_tokens", "slots_free", "kv_free", "prompt_tokens")
    ]
    decision = policy.route(view, np.random.default_rng(seed))
    assert decision.shape == (view.waiting,)
    assert decision.dtype == np.int64
    for worker in range(view.workers):
        mine = decision == worker
        assert mine.sum() <= view.slots_free[worker]
        assert view.prompt_tokens[mine].sum() <= view.kv_free[worker]
    assert ((decision >= NOT_ADMITTED) & (decision < view.workers)).all()
    after = [getattr(view, field) for field in ("kv_tokens", "slots_free", "kv_free", "prompt_tokens")]
    assert all((a == b).all() for a, b in zip(before, after, strict=True)), "a view is read-only"
    again = make_policy(name).route(view, np.random.default_rng(seed))
    assert (decision == again).all(), "the same view and seed give the same answer"


@given(view=views(), data=st.data())
def test_a_request_needs_one_slot_and_takes_one_for_each_sequence(view, data):
    sequences = data.draw(column(1, 5, view.waiting))
    view = replace(view, sequences=sequences)
    ones = replace(view, sequences=np.ones(view.waiting, dtype=np.int64))
    none = replace(view, sequences=None)
    for name in NAMES:
        note(name)
        decision = make_policy(name).route(view, np.random.default_rng(0))
        for worker in range(view.workers):
            mine = sorted(n for n, chosen in zip(sequences, decision, strict=True) if chosen == worker)
            # Whatever came last found a slot: it may have been the largest.
            assert sum(mine[:-1]) < view.slots_free[worker] or not mine
        decided = [make_policy(name).route(each, np.random.default_rng(1)).tolist() for each in (ones, none)]
        assert decided[0] == decided[1]


@given(view=views(overdue_max=0))
def test_a_request_that_fits_is_not_left_while_slots_are_free(view):
    roomy = view.slots_free > 0
    if not roomy.any() or not view.waiting or not (view.prompt_tokens[0] <= view.kv_free[roomy]).any():
        return
    for name in NAMES:
        decision = make_policy(name).route(view, np.random.default_rng(0))
        assert (decision != NOT_ADMITTED).any(), name


# Of each worker KV tokens, requests, slots, free slots, KV capacity, free KV and tokens a step. Few distinct
# numbers, so that loads, slots and whole forecasts tie, and one draw for all of a worker's.
LONE_WORKERS = st.lists(
    st.sampled_from(
        [
            *product(
                (0, 100, 101, 5000),
                (0, 1, 5),
                (1, 4),
                (0, 1, 3),
                (6000, KV_UNLIMITED_TOKENS),
                (0, 50, 400, KV_UNLIMITED_TOKENS),
                (-1, 0, 7),
            )
        ]
    ),
    min_size=1,
    max_size=6,
)
LONE_REQUESTS = st.sampled_from([*product((0, 50, 51, 1000), (0, 5000), (1.0, 4.0))])


@st.composite
def lone_views(draw):
    """One waiting request."""
    kv_tokens, requests, slots, slots_free, kv_capacity, kv_free, growth = np.array(
        draw(LONE_WORKERS), dtype=np.int64
    ).T
    prompt_tokens, passed_over, turnover_steps = draw(LONE_REQUESTS)
    return ClusterView(
        kv_tokens=kv_tokens,
        requests=requests,
        slots=slots,
        slots_free=slots_free,
        kv_capacity=kv_capacity,
        kv_free=kv_free,
        prompt_tokens=np.array([prompt_tokens]),
        passed_over=np.array([passed_over]),
        forecast=kv_tokens[:, None] + growth[:, None] * np.arange(65.0),
        turnover_steps=turnover_steps,
        lookahead_turnovers=3.0,
    )


@draws(300)
@given(view=lone_views(), seed=st.integers(0, 3))
def test_a_request_that_waits_alone_goes_where_a_round_would_put_it(view, seed):
    for name in NAMES:
        note(name)
        goes_where_a_round_would_put_it(name, view, seed)


def goes_where_a_round_would_put_it(name, view, seed):
    by_round, alone = make_policy(name), make_policy(name)
    discounts = alone.discounts(view.turnover_steps, view.lookahead_turnovers)
    load = (view.forecast[:, : len(discounts)] @ discounts).tolist()
    prompt_tokens = int(view.prompt_tokens[0])
    rng = [np.random.default_rng(seed) for _ in range(2)]
    for _ in range(3):  # Some policies remember what they did last.
        expected = by_round.route(view, rng[0]).tolist()
        assert alone.place(RoundState.of(view), prompt_tokens, load, rng[1]) == expected[0]


def view_of(kv_tokens, requests, slots=4, prompts=(10,)):
    workers = len(kv_tokens)
    kv = np.array(kv_tokens, dtype=np.int64)
    fill = lambda value, n=workers: np.full(n, value, dtype=np.int64)  # noqa: E731
    return ClusterView(
        kv_tokens=kv,
        requests=np.array(requests, dtype=np.int64),
        slots=fill(slots),
        slots_free=fill(SLOTS_UNLIMITED),
        kv_capacity=fill(KV_UNLIMITED_TOKENS),
        kv_free=fill(KV_UNLIMITED_TOKENS),
        prompt_tokens=np.array(prompts, dtype=np.int64),
        passed_over=fill(0, len(prompts)),
        forecast=kv[:, None] + np.zeros(21),
    )


def choices(name, view, seeds=30, **params):
    policy_class = POLICIES.get(name)
    policy = make_policy(name, policy_class.Params(**params))
    return [policy.route(view, np.random.default_rng(seed)).tolist() for seed in range(seeds)]


def test_round_robin_takes_turns_across_rounds():
    policy = make_policy("round-robin")
    rng = np.random.default_rng(0)
    view = view_of([0, 0, 0], [0, 0, 0])
    seen = [int(policy.route(view, rng)[0]) for _ in range(6)]
    assert seen == [0, 1, 2, 0, 1, 2]


def test_join_shortest_queue_counts_requests_not_tokens():
    assert {c[0] for c in choices("join-shortest-queue", view_of([9000, 0, 0], [1, 2, 3]))} == {0}


def test_join_shortest_queue_sees_what_the_round_has_placed():
    view = view_of([0, 0], [0, 0], prompts=(1, 1, 1, 1))
    assert all(sorted(c) == [0, 0, 1, 1] for c in choices("join-shortest-queue", view))


def test_least_kv_counts_tokens_not_requests():
    assert {c[0] for c in choices("least-kv", view_of([9000, 0, 10], [1, 8, 3]))} == {1}


def test_power_of_two_prefers_the_shorter_of_two():
    picked = [c[0] for c in choices("power-of-two", view_of([0, 0, 0, 0], [9, 9, 9, 0]), seeds=200)]
    share = picked.count(3) / len(picked)
    # Worker 3 wins whenever it is one of the two: half of all draws without replacement.
    assert 0.35 < share < 0.65


def test_random_uses_every_worker():
    assert {c[0] for c in choices("random", view_of([0] * 4, [0] * 4), seeds=100)} == {0, 1, 2, 3}


def test_vllm_queue_older_formula_weighs_waiting_four_times():
    # running + 4 * waiting: worker 0 has 4 running + 1 waiting = 8, worker 1 has 4 running = 4.
    view = view_of([0, 0], [5, 4])
    assert {c[0] for c in choices("vllm-queue", view, formula="waiting-weighted")} == {1}


@pytest.mark.parametrize(
    ("formula", "client_count", "capacity", "scores"),
    [
        ("waiting-weighted", 1, 1000, [4 * 2 + 4, 3]),
        ("0.33", 1, 1000, [6 + 2 * 6 * 0.3, 3]),
        ("0.33", 3, 1000, [18 + 2 * 6 * 0.3, 9]),
        ("0.33", 1, KV_UNLIMITED_TOKENS, [6, 3]),
    ],
)
def test_vllm_queue_scores(formula, client_count, capacity, scores):
    # Worker 0: 4 slots, 6 requests, so 2 wait; 800 KV tokens. Worker 1: 3 run, nobody waits, 900 KV tokens.
    view = replace(view_of([800, 900], [6, 3]), kv_capacity=np.full(2, capacity, dtype=np.int64))
    policy_class = POLICIES.get("vllm-queue")
    policy = policy_class(policy_class.Params(formula=formula, client_count=client_count))
    assert [policy._score(RoundState.of(view), worker) for worker in range(2)] == pytest.approx(scores)


@pytest.mark.parametrize("formula", ["waiting-weighted", "0.33"])
def test_vllm_queue_levels_requests(formula):
    view = view_of([0, 0, 0], [3, 0, 3])
    assert {c[0] for c in choices("vllm-queue", view, formula=formula)} == {1}


def test_late_binding_is_the_default_of_ours_only():
    late = {name for name in NAMES if POLICIES.get(name).Params().late_binding}
    assert late == {"br-0", "br-h", "least-prefill", "prefill-in-step"}


def test_unknown_policy_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"unknown policy 'br0'; allowed: br-0, br-h"):
        make_policy("br0")


def test_parameters_of_another_policy_are_refused():
    with pytest.raises(TypeError, match="takes Br0Params"):
        make_policy("br-0", PolicyParams())
