"""When the next round is due, when one is missing, and what a round does to those that wait."""

import numpy as np
import pytest

from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.ledger import Ledger
from brproxy.lifecycle import Event, State
from brproxy.prediction.predictor import make_predictor
from brproxy.roster import Roster, WorkerLimits
from brproxy.rounds import Rounds
from brproxy.routing.policy import make_policy
from brproxy.types import PendingRequest


def rounds_of(workers=1, tick_s=0.01, wait_s_max=1000.0):
    dispatcher = Dispatcher(
        Ledger(Roster.of([WorkerLimits(1)] * workers)),
        make_policy("br-0"),
        make_predictor("survival"),
        np.random.default_rng(0),
        PoolLimits(100, wait_s_max),
    )
    return dispatcher, Rounds(dispatcher, tick_s, lambda: 0.0)


def test_a_round_is_due_while_anything_waits():
    dispatcher, rounds = rounds_of()
    assert rounds.due_s is None
    first = dispatcher.arrive(PendingRequest(1), 5.0)
    assert rounds.next_after(5.0) == 0.01
    assert rounds.due_s == 5.01
    assert [entry.id for entry in rounds.run(5.01)] == [first]
    assert rounds.next_after(6.0) is None
    assert rounds.due_s is None


def test_who_comes_alone_is_decided_on_at_once():
    dispatcher, rounds = rounds_of()
    assert rounds.is_open
    for _ in range(2):
        dispatcher.arrive(PendingRequest(1), 0.0)
        rounds.run(0.0)
        rounds.next_after(0.0)
    assert rounds.is_open, "one waits"
    dispatcher.arrive(PendingRequest(1), 0.0)
    assert not rounds.is_open, "two wait, and a round is due"


def test_stuck_is_who_waits_for_no_round():
    dispatcher, rounds = rounds_of()
    assert not rounds.is_stuck(100.0), "nobody waits"
    dispatcher.arrive(PendingRequest(1), 98.9)
    assert not rounds.is_stuck(99.5), "it has just come"
    assert rounds.is_stuck(100.0)
    rounds.next_after(98.9)
    assert not rounds.is_stuck(99.8)
    assert rounds.is_stuck(100.0), "a round that is due and does not come"
    rounds.next_after(100.0)
    assert not rounds.is_stuck(100.5)
    rounds.stopped()
    assert rounds.is_stuck(100.5)


def test_slow_ticks_are_not_stuck():
    dispatcher, rounds = rounds_of(tick_s=2.0)
    dispatcher.arrive(PendingRequest(1), 0.0)
    rounds.next_after(0.0)
    assert not rounds.is_stuck(21.0)
    assert rounds.is_stuck(22.1)


def test_a_round_tells_who_has_waited_too_long():
    dispatcher, rounds = rounds_of(wait_s_max=10.0)
    for now_s in (0.0, 1.0, 2.0):
        dispatcher.arrive(PendingRequest(1), now_s)
    bound, late = rounds.run(11.5)
    assert (bound.state, late.state) == (State.PREFILL, State.EXPIRED)
    assert len(dispatcher.waiting) == 1


@pytest.mark.parametrize("where", ["state", "late", "in_turn", "first", "pass_over"])
def test_a_round_that_raises_tells_what_it_has_done(where):
    def broken(*args, **named):
        raise ZeroDivisionError

    dispatcher, rounds = rounds_of(workers=2)
    failed = dispatcher.arrive(PendingRequest(1), 0.0)
    dispatcher.decide(0.0, (True, True))
    # It goes to the other worker, before all others.
    dispatcher.retry(failed, 0.0)
    for _ in range(3):
        dispatcher.arrive(PendingRequest(1), 0.0)
    owner = dispatcher.ledger if where == "state" else dispatcher.waiting
    real = getattr(owner, where)
    calls = []
    # Not the first look: a round fails in its middle as well.
    setattr(owner, where, lambda *a, **k: calls.append(1) or (broken() if len(calls) > 1 else real(*a, **k)))
    settled = rounds.run(0.0)
    settled += rounds.run(0.0)
    assert rounds.next_after(0.0) is not None
    delattr(owner, where)
    assert [entry.state for entry in settled] == [State.PREFILL] * dispatcher.ledger.bound
    assert len(dispatcher.waiting) + dispatcher.ledger.bound == 4
    for entry in list(dispatcher.ledger._entries.values()):
        dispatcher.end(entry.id, Event.FINISH)
    assert len(rounds.run(1.0)) == min(2, len(dispatcher.waiting) + dispatcher.ledger.bound)
