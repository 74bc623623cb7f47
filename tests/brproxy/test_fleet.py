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
from brproxy.types import PendingRequest


def group(name, *models, slots=4, healthy=True):
    roster = Roster(HealthThresholds(1, 1))
    member = roster.add(f"{name}-0", WorkerLimits(slots))
    dispatcher = Dispatcher(
        Ledger(roster),
        make_policy("br-0"),
        make_predictor("survival"),
        np.random.default_rng(0),
        PoolLimits(),
    )
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
