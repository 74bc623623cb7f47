"""Which barrier group serves a request."""

import numpy as np
import pytest

from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.fleet import Fleet, Group, UnknownModelError
from brproxy.health import HealthThresholds
from brproxy.ledger import Ledger
from brproxy.prediction.predictor import make_predictor
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policy import make_policy
from brproxy.step_costs import StepCosts
from brproxy.types import PendingRequest


def group(name, *models, slots=4, healthy=True, capacity=None, workers=1, costs=None):
    roster = Roster(HealthThresholds(1, 1))
    members = [roster.add(f"{name}-{i}", WorkerLimits(slots, capacity)) for i in range(workers)]
    dispatcher = Dispatcher(
        Ledger(roster),
        make_policy("br-0"),
        make_predictor("survival"),
        np.random.default_rng(0),
        PoolLimits(),
        costs=lambda: costs,
    )
    for member in members:
        roster.record(member, ok=healthy, reason="", now_s=0.0)
    return Group(name, frozenset(models), dispatcher)


def test_the_model_picks_the_group():
    fleet = Fleet([group("a", "small"), group("b", "large", "huge")])
    assert fleet.choose("huge").name == "b"
    assert fleet.choose("small").name == "a"


def test_a_group_without_models_serves_any():
    assert Fleet([group("a")]).choose("whatever").name == "a"


def test_an_unknown_model_lists_the_known_ones():
    fleet = Fleet([group("a", "small"), group("b", "large")])
    with pytest.raises(UnknownModelError, match=r"`nope` does not exist. Models served here: large, small"):
        fleet.choose("nope")


def test_the_least_pressed_group_is_chosen():
    first, second = group("a", "m", slots=4), group("b", "m", slots=2)
    fleet = Fleet([first, second])
    first.dispatcher.arrive(PendingRequest(1), 0.0)
    assert fleet.choose("m") is second
    second.dispatcher.arrive(PendingRequest(1), 0.0)
    assert fleet.choose("m") is first, "one of four slots is less pressure than one of two"


def test_a_group_that_is_down_is_the_last_resort():
    down, up = group("a", "m", "only-here", healthy=False), group("b", "m")
    fleet = Fleet([down, up])
    up.dispatcher.arrive(PendingRequest(1), 0.0)
    assert fleet.choose("m") is up
    assert fleet.choose("only-here") is down
    assert fleet.ready
    assert not Fleet([down]).ready


def serve(group, *prompts):
    for prompt in prompts:
        group.dispatcher.arrive(PendingRequest(prompt), 0.0)
    group.dispatcher.decide(0.0, group.roster.routable())


def test_a_few_long_prompts_may_fill_more_than_many_short_ones():
    long, short = (group(name, "m", slots=100, capacity=10_000) for name in ("a", "b"))
    serve(long, 4000, 3000)
    serve(short, *[100] * 20)
    assert Fleet([long, short]).choose("m") is short
    unknown = group("c", "m", slots=100)
    serve(unknown, *[100] * 20)
    assert unknown.fullness == short.fullness == 0.2


def test_who_waits_counts_as_large_as_those_that_run():
    full = group("a", "m", slots=100, capacity=10_000)
    serve(full, *[6000] * 3)
    assert (full.dispatcher.ledger.bound, len(full.dispatcher.waiting)) == (1, 2)
    assert full.fullness == pytest.approx(1.8)


def test_workers_that_may_not_be_chosen_are_no_capacity():
    fleet = Fleet([group("a", "m", workers=4), group("b", "m", workers=2)])
    first, second = fleet.groups
    for each in fleet.groups:
        serve(each, 1, 1)
    assert fleet.choose("m") is first
    for member in first.roster.members[1:]:
        first.roster.record(member, ok=False, reason="down", now_s=1.0)
    assert fleet.choose("m") is second
    first.roster.drain("a-0")
    assert first.fullness == float("inf")


def test_groups_of_unlike_speed_get_what_makes_them_equally_fast():
    fast, slow = (
        group(name, "m", slots=64, workers=2, costs=StepCosts(base_s, s_per_kv_token, 0.0))
        for name, base_s, s_per_kv_token in (("a", 0.02, 1e-7), ("b", 0.03, 2e-7))
    )
    fleet = Fleet([slow, fast])
    for _ in range(100):
        serve(fleet.choose("m"), 5000)
    steps_s = [each.step_s(each.dispatcher.costs()) for each in fleet.groups]
    assert steps_s[0] == pytest.approx(steps_s[1], rel=0.05)
    assert fast.dispatcher.ledger.bound > 2 * slow.dispatcher.ledger.bound > 0


def test_a_slow_group_with_room_is_better_than_a_fast_one_in_which_many_wait():
    fast, slow = (
        group(name, "m", slots=2, costs=StepCosts(base_s, 0.0, 0.0))
        for name, base_s in (("a", 0.02), ("b", 0.05))
    )
    fleet = Fleet([fast, slow])
    chosen = []
    for _ in range(9):
        chosen.append(fleet.choose("m").name)
        serve(fleet.choose("m"), 1)
    assert "".join(chosen) == "aaaaabbba"


def test_a_slow_worker_makes_its_group_slow():
    even = group("a", "m", workers=2, costs=StepCosts(0.02, 1e-6, 0.0))
    uneven = group("b", "m", workers=2, costs=StepCosts(0.02, 1e-6, 0.0, None, (0.5, 3.0)))
    for each in (even, uneven):
        serve(each, 1000, 1000)
    assert [each.step_s(each.dispatcher.costs()) for each in (even, uneven)] == pytest.approx([0.021, 0.023])
    assert Fleet([uneven, even]).choose("m") is even


def test_where_the_speed_of_one_is_not_known_the_emptier_is_chosen():
    known, unknown = group("a", "m", costs=StepCosts(0.02, 1e-6, 0.0)), group("b", "m")
    serve(known, 1)
    assert Fleet([known, unknown]).choose("m") is unknown
    serve(unknown, 1, 1)
    assert Fleet([known, unknown]).choose("m") is known
