"""Affinity in a round: home within the discount of the best worker and never beyond."""

from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.routing.policy import POLICIES, make_policy
from brproxy.routing.view import NOT_ADMITTED, Home, RoundState
from brproxy.types import InvalidInputError
from tests.brproxy.routing.brute_force import each
from tests.brproxy.routing.test_policies import NAMES, lone_views, view_of, views
from tests.draws import draws

OURS = ["br-0", "br-h", "least-kv"]
BASELINES = [name for name in NAMES if name not in OURS]


DISCOUNTS = (0, 1, 100, 5000, 10_000)


@cache
def homes(workers):
    return st.sampled_from([Home(*home) for home in product(range(workers), DISCOUNTS)])


@st.composite
def at_home(draw, views):
    """One of ``views`` whose requests are all at home somewhere."""
    view = draw(views)
    return replace(view, homes=draw(each(homes(view.workers), view.waiting)))


LONE_AT_HOME = at_home(lone_views())
AT_HOME = at_home(views())
SEEDS = st.integers(0, 3)


def levels(policy, view):
    """Return what a policy sees as load, in KV tokens: means over what it looks ahead."""
    discounts = policy.discounts(view.turnover_steps, view.lookahead_turnovers)
    return view.forecast[:, : len(discounts)] @ discounts / discounts.sum(), discounts


def test_those_that_take_affinity_are_known():
    assert [name for name in NAMES if POLICIES.get(name).TAKES_AFFINITY] == OURS


@pytest.mark.parametrize("name", OURS)
@draws(150)
@given(view=LONE_AT_HOME, seed=SEEDS)
def test_a_request_goes_home_within_the_discount_and_never_beyond(name, view, seed):
    policy = make_policy(name)
    load, _ = levels(policy, view)
    prompt_tokens, (home,) = int(view.prompt_tokens[0]), view.homes
    eligible = np.flatnonzero((view.slots_free > 0) & (view.kv_free >= prompt_tokens))
    chosen = int(policy.route(view, np.random.default_rng(seed))[0])
    if not len(eligible):
        assert chosen == NOT_ADMITTED
        return
    best = load[eligible].min()
    if home.place in eligible and load[home.place] <= best + home.discount_tokens + 1e-6:
        assert chosen == home.place
    else:
        assert chosen in eligible
        assert load[chosen] == pytest.approx(best)


@pytest.mark.parametrize("name", [*OURS, "join-shortest-queue"])
@draws(60)
@given(view=LONE_AT_HOME, seed=SEEDS)
def test_who_waits_alone_is_placed_as_in_a_round(name, view, seed):
    policy = make_policy(name)
    load, discounts = levels(policy, view)
    weight = float(discounts.sum())
    expected = make_policy(name).route(view, np.random.default_rng(seed))
    placed = policy.place_near(
        RoundState.of(view),
        int(view.prompt_tokens[0]),
        (load * weight).tolist(),
        np.random.default_rng(seed),
        view.homes[0],
        weight,
    )
    assert placed == expected[0]


@pytest.mark.parametrize("name", BASELINES)
@draws(20)
@given(view=AT_HOME, seed=SEEDS)
def test_baselines_do_not_look_at_homes(name, view, seed):
    without = replace(view, homes=None)
    routed = [make_policy(name).route(each, np.random.default_rng(seed)).tolist() for each in (view, without)]
    assert routed[0] == routed[1]


@pytest.mark.parametrize("name", OURS)
@draws(50)
@given(view=AT_HOME, seed=SEEDS)
def test_a_round_admits_as_many_and_within_what_is_free(name, view, seed):
    decision = make_policy(name).route(view, np.random.default_rng(seed))
    for worker in range(view.workers):
        mine = decision == worker
        assert mine.sum() <= view.slots_free[worker]
        assert view.prompt_tokens[mine].sum() <= view.kv_free[worker]


@pytest.mark.parametrize("name", OURS)
def test_an_idle_group_does_not_pile_up_on_one_home(name):
    # Eight of one session at once: the first two go home, then home is beyond the discount.
    view = replace(view_of([0, 0, 0, 0], [0] * 4, prompts=(100,) * 8), homes=[Home(2, 150)] * 8)
    decision = make_policy(name).route(view, np.random.default_rng(0)).tolist()
    loads = np.bincount(decision, minlength=4) * 100
    assert loads[2] > loads.min()
    assert loads.max() - loads.min() <= 150 + 100


def test_a_guest_is_taken_before_others_that_fit_as_well():
    # One slot for two requests of the same length: the younger is at home there.
    view = replace(
        view_of([50, 900], [0, 0], prompts=(100, 100)),
        slots_free=np.array([1, 0]),
        homes=[None, Home(0, 64)],
    )
    assert make_policy("br-0").route(view, np.random.default_rng(0)).tolist() == [NOT_ADMITTED, 0]


def test_as_many_homes_as_requests():
    with pytest.raises(InvalidInputError, match="homes"):
        replace(view_of([1, 2], [0, 0]), homes=[None, None])
