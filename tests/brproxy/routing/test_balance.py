"""One decision round of BR-0 and BR-H against a brute force that spells the algorithm out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.routing.balance import BalanceParams, BalanceRound
from brproxy.routing.fscore import FScore
from brproxy.routing.policy import POLICIES, make_policy
from brproxy.routing.view import NOT_ADMITTED
from tests.brproxy.routing.brute_force import UNLIMITED, BruteForce, aims, make_view, views
from tests.draws import draws


def published(**params):
    """Parameters with margins up to the envelope itself: what most examples here are told by."""
    return BalanceParams(aim=1.0, **params)


def decide(view, params=None, fscore=None, seed=0):
    params = params or published()
    fscore = fscore or FScore.make(0, 1.0, 1.0, view.workers)
    return BalanceRound(view, params, fscore, np.random.default_rng(seed)).run()


@draws(300)
@given(
    views(),
    st.integers(1, 8),
    st.integers(1, 4),
    aims,
    st.sampled_from(["headroom", "headroom", "slots"]),
    st.integers(0, 3),
)
def test_br_0_is_the_brute_force(view, window, subset_max, aim, order, seed):
    params = BalanceParams(window=window, subset_max=subset_max, aim=aim, order=order)
    expected = BruteForce(view, params, 1.0, 1.0, view.workers, seed).run()
    assert decide(view, params, seed=seed).tolist() == expected


@draws(200)
@given(
    views(horizon_steps=3), st.integers(1, 8), st.sampled_from([0.5, 1.0]), st.sampled_from([1.0, 8.0]), aims
)
def test_br_h_is_the_brute_force(view, window, gamma, beta_per_worker, aim):
    params = BalanceParams(window=window, aim=aim)
    beta = beta_per_worker * view.workers
    fscore = FScore.make(3, gamma, 1.0, beta)
    assert decide(view, params, fscore).tolist() == BruteForce(view, params, gamma, 1.0, beta, 0).run()


def test_the_largest_request_that_fits_the_margin_goes_to_the_lightest_worker():
    view = make_view([1000, 400], prompts=[500, 600, 900], slots_free=[1, 1])
    # Slots are scarce (2 for 3): worker 1 takes 600 = its margin; then both are level and the rest overflows.
    assert decide(view).tolist()[1] == 1


def test_nothing_pays_and_still_nobody_starves():
    view = make_view([500, 500], prompts=[100], slots_free=[1, 0])
    assert decide(view).tolist() == [0]


def test_workers_without_slots_or_room_get_nothing():
    view = make_view([0, 0, 0], prompts=[50, 60], slots_free=[0, 5, 5], kv_free=[UNLIMITED, 10, 55])
    assert decide(view).tolist() == [2, NOT_ADMITTED]


def test_ties_do_not_all_go_to_the_first_worker():
    chosen = {decide(make_view([0] * 8, prompts=[10], slots_free=[4] * 8), seed=s)[0] for s in range(40)}
    assert len(chosen) > 4


def test_only_the_window_is_looked_at():
    view = make_view([1000, 0], prompts=[10, 10, 1000], slots_free=[0, 1])
    assert decide(view, published(window=2)).tolist() == [1, NOT_ADMITTED, NOT_ADMITTED]
    assert decide(view, published(window=3)).tolist() == [NOT_ADMITTED, NOT_ADMITTED, 1]


@given(st.integers(1, 512), st.integers(0, 10_000))
def test_a_choice_looks_at_a_small_part_of_those_that_wait(window, waiting):
    policy = make_policy("br-0", POLICIES.get("br-0").Params(window=window))
    seen = policy.lookahead_requests(waiting, None)
    assert min(window, 32) <= seen <= window
    assert seen <= 32 or 8 * seen <= waiting
    # And at no less of them than that.
    assert seen in {32, window} or 8 * (seen + 1) > waiting


def test_single_requests_come_from_the_whole_window_and_subsets_from_its_oldest():
    prompts = [10] * 40 + [500]
    alone = make_view([1000, 500], prompts, slots_free=[0, 1])
    assert decide(alone, published(window=41)).tolist() == [NOT_ADMITTED] * 40 + [1]
    assert decide(alone, published(window=40)).tolist()[40] == NOT_ADMITTED
    several = make_view([1000, 500], prompts, slots_free=[0, 2])
    assert decide(several, published(window=41)).tolist()[40] == 1
    pairs = make_view([1000, 980], prompts, slots_free=[0, 2])
    assert decide(pairs, published(window=41)).tolist()[:2] == [1, 1]


def test_a_slow_worker_is_filled_less_high():
    prompts = [400, 500]
    alike, slow = (
        make_view([1000, 600, 500], prompts, [0, 0, 1], slowness=slowness)
        for slowness in (None, [1.0, 1.0, 1.1])
    )
    assert decide(alike).tolist() == [NOT_ADMITTED, 2]
    assert decide(slow).tolist() == [2, NOT_ADMITTED]


def test_an_overdue_request_goes_first():
    view = make_view([1000, 0], prompts=[10, 1000], slots_free=[0, 1], passed_over=[384, 0])
    assert decide(view).tolist() == [1, NOT_ADMITTED]


def test_an_overdue_request_that_fits_nowhere_keeps_the_roomiest_worker_free():
    view = make_view(
        [1000, 0], prompts=[500, 10, 10], slots_free=[2, 2], kv_free=[100, 400], passed_over=[384, 0, 0]
    )
    assert decide(view).tolist() == [NOT_ADMITTED, 0, 0]


@draws(150)
@given(views(horizon_steps=2), st.integers(1, 8), st.integers(0, 3))
def test_br_h_without_a_horizon_is_br_0_decision_by_decision(view, window, seed):
    shared = {"window": window, "beta_per_worker": 1.0}
    br_h = POLICIES.get("br-h")(POLICIES.get("br-h").Params(horizon_steps=0, **shared))
    br_0 = POLICIES.get("br-0")(POLICIES.get("br-0").Params(**shared))
    decisions = [policy.route(view, np.random.default_rng(seed)).tolist() for policy in (br_h, br_0)]
    assert decisions[0] == decisions[1]


@pytest.mark.parametrize("loads", ["equal", "spread"])
@pytest.mark.parametrize("horizon_steps", [0, 5])
@pytest.mark.parametrize("workers", [1, 2, 144])
def test_extreme_groups_are_the_brute_force(workers, horizon_steps, loads):
    """One worker and many, zero margins, huge and empty prompts, scarce slots and ample ones."""
    rng = np.random.default_rng(4)
    kv_tokens = rng.integers(0, 400_000, workers) if loads == "spread" else np.full(workers, 300_000)
    growth = rng.integers(-500, 500, (workers, horizon_steps)) if loads == "spread" else 0
    forecast = np.repeat(kv_tokens[:, None], horizon_steps + 1, axis=1).astype(float)
    forecast[:, 1:] += growth
    prompts = [0, 1 << 30, *rng.lognormal(7.2, 1.3, 14).astype(int).tolist(), 0, 1 << 40]
    params = published(window=12)
    for slots in ((rng.random(workers) < max(0.05, 2 / workers)).astype(int), np.full(workers, 20)):
        view = make_view(kv_tokens, prompts, slots, forecast=forecast)
        for beta in (float(workers), 16.0 * workers):
            decision = decide(view, params, FScore.make(horizon_steps, 0.9, 1.0, beta)).tolist()
            assert decision == BruteForce(view, params, 0.9, 1.0, beta, 0).run()


@pytest.mark.parametrize("giant", [950, 5000])
def test_nobody_is_passed_over_more_often_than_the_limit(giant):
    params = published(passed_over_max_per_worker=5)
    passed_over = 0
    for round_number in range(20):
        # A giant that never pays, and a fresh small request each round that always does.
        view = make_view([1000, 900], [giant, 50], [0, 1], passed_over=[passed_over, 0])
        admitted = decide(view, params, seed=round_number).tolist()
        passed_over += admitted[1] != NOT_ADMITTED
    # Half of the limit for two workers: then one is held for it, or, where no margin could open, it goes.
    assert passed_over == 5
    assert (admitted[0] != NOT_ADMITTED) == (giant == 5000)


@pytest.mark.parametrize(
    ("passed_over", "lightest", "prompts", "expected", "because"),
    [
        (14, 600, [800, 50], [NOT_ADMITTED, 2], "the small one fits the margin"),
        (15, 600, [800, 50], [NOT_ADMITTED, NOT_ADMITTED], "the worker is held for the large one"),
        (15, 200, [800, 50], [2, NOT_ADMITTED], "its margin has opened"),
        (30, 600, [800, 50], [2, NOT_ADMITTED], "it has reached the limit"),
        (15, 600, [1800, 50], [2, NOT_ADMITTED], "no margin that large could open"),
        (15, 600, [800], [2], "nothing else waits"),
    ],
)
def test_room_is_made_before_a_request_has_to_go(passed_over, lightest, prompts, expected, because):
    view = make_view([1000, 1000, lightest], prompts, [0, 0, 1], passed_over=[passed_over, 0][: len(prompts)])
    assert decide(view, published(passed_over_max_per_worker=10)).tolist() == expected, because


@pytest.mark.parametrize(
    ("passed_over", "waited", "expected", "because"),
    [
        (64, 0.44, [NOT_ADMITTED, 2], "there is time"),
        (64, 0.46, [NOT_ADMITTED, NOT_ADMITTED], "the worker is held for the large one"),
        (64, 0.91, [2, NOT_ADMITTED], "else it would be sent away"),
        (63, 0.99, [NOT_ADMITTED, 2], "it has waited long, but not for its size"),
    ],
)
def test_room_is_made_before_the_pools_limit_in_time(passed_over, waited, expected, because):
    view = make_view(
        [1000, 1000, 600], [800, 50], [0, 0, 1], passed_over=[passed_over, 0], waited=[waited, 0.99]
    )
    assert decide(view).tolist() == expected, because


def test_one_worker_is_held_at_a_time():
    view = make_view([1000, 700, 600], [800, 900, 50], [0, 1, 1], passed_over=[25, 25, 0])
    decision = decide(view, published(passed_over_max_per_worker=10)).tolist()
    assert decision == [NOT_ADMITTED, NOT_ADMITTED, 1]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_holding_a_worker_never_holds_up_everything(workers):
    """Only giants wait, all overdue: as requests leave, each of them gets its turn, on one worker too."""
    loads, waiting = [1000] * workers, [5000, 800, 400, 5000]
    for _ in range(60):
        slots = [1] + [0] * (workers - 1)
        view = make_view(loads, waiting, slots, passed_over=[96 * workers] * len(waiting))
        decision = decide(view).tolist()
        for worker, prompt in zip(decision, waiting, strict=True):
            loads[worker] += prompt if worker != NOT_ADMITTED else 0
        waiting = [p for p, worker in zip(waiting, decision, strict=True) if worker == NOT_ADMITTED]
        loads = [max(0, load - 100) for load in loads]
    assert not waiting
