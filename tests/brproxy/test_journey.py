"""A request's way to its answer: the promises at the top of journey.py, against drawn histories."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.journey import RERUNS_MAX, RULES, TRANSITIONS, Action, Event, Journey, JourneyError, Runs, State

FAILURES = [*RULES, Event.STALE]
RAN = {event for event, rule in RULES.items() if rule.ran}


def trying(retries_max=2, *, generates=True):
    journey = Journey(retries_max, Runs(), generates=generates)
    assert journey.bound() is Action.SEND
    return journey


def fail(journey, event, *, repeatable=True, others=True):
    return journey.failed(event, repeatable=repeatable, others=others)


@given(
    retries_max=st.integers(0, 5),
    generates=st.booleans(),
    history=st.lists(st.tuples(st.sampled_from(FAILURES), st.booleans(), st.booleans()), max_size=12),
)
def test_the_promises_hold_for_any_history(retries_max, generates, history):
    journey = Journey(retries_max, Runs(), generates=generates)
    action, moves, runs, stale = journey.bound(), 0, 0, 0
    for event, repeatable, others in history:
        peeked = event is not Event.STALE and journey.may_move(event, repeatable=repeatable, others=others)
        action = fail(journey, event, repeatable=repeatable, others=others)
        if event is not Event.STALE:
            assert (action is Action.WAIT) == peeked
        if action is Action.SEND_AFRESH:
            assert event is Event.STALE
            stale += 1
            continue
        if event in RAN or event is Event.STALE:
            runs += 1
        if action is not Action.WAIT:
            assert (action, journey.state) == (Action.ANSWER, State.OVER)
            break
        moves += 1
        assert repeatable
        assert others or event is Event.OUT
        assert RULES.get(event, RULES[Event.CUT]).moves
        assert generates or event in {Event.UNREACHABLE, Event.REFUSED}
        assert journey.bound() is Action.SEND_AFRESH
    assert moves <= retries_max
    assert stale <= 1
    assert runs <= RERUNS_MAX + 1, "at most two workers work on it"


@given(
    generates=st.booleans(),
    history=st.lists(st.tuples(st.integers(0, 4), st.sampled_from([*RULES])), max_size=30),
)
def test_legs_together_run_no_more_often_than_a_request_in_one_piece(generates, history):
    runs = Runs()
    legs = [Journey(9, runs, generates=generates) for _ in range(5)]
    lost, over = 0, False
    for leg in legs:
        leg.bound()
    for number, event in history:
        leg = legs[number]
        if leg.state is State.OVER:
            continue
        may_repeat = runs.may_repeat
        action = fail(leg, event)
        lost += event in RAN
        assert runs.lost == lost
        if event in RAN:
            assert (action is Action.WAIT) == (generates and may_repeat)
            over |= action is Action.ANSWER
        assert runs.may_go_on or over or not generates
        if action is Action.WAIT:
            leg.bound()


@pytest.mark.parametrize("event", [Event.BEGUN, Event.FINISHED, Event.BROKE_OFF])
def test_nothing_moves_once_the_client_has_seen_something(event):
    journey = trying()
    journey.happened(event)
    for failure in RULES:
        assert not journey.may_move(failure, repeatable=True, others=True)


def test_only_what_is_repeatable_moves():
    for event in RULES:
        assert fail(trying(), event, repeatable=False) is Action.ANSWER


def test_a_worker_that_cannot_be_reached_right_after_a_stale_connection_may_have_died_of_the_request():
    journey = trying(generates=False)
    assert fail(journey, Event.STALE) is Action.SEND_AFRESH
    assert fail(journey, Event.UNREACHABLE) is Action.ANSWER
    assert fail(trying(generates=False), Event.UNREACHABLE) is Action.WAIT


def test_each_move_waits_longer_up_to_a_limit():
    journey, waits = trying(retries_max=9), []
    for _ in range(6):
        assert fail(journey, Event.REFUSED) is Action.WAIT
        waits.append(journey.wait_s(0.05, 1.0))
        journey.bound()
    assert waits == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0]


def test_a_request_whose_worker_went_out_waits_also_if_it_was_the_only_one():
    assert fail(trying(), Event.OUT, others=False) is Action.WAIT
    assert fail(trying(), Event.CUT, others=False) is Action.ANSWER


@given(st.lists(st.sampled_from(Event), max_size=8))
def test_only_what_the_table_has_is_taken(events):
    journey = Journey(2, Runs(), generates=True)
    for event in events:
        allowed = TRANSITIONS[journey.state]
        if event is Event.BOUND and event in allowed:
            journey.bound()
        elif event in FAILURES:
            if event not in allowed:
                with pytest.raises(JourneyError):
                    fail(journey, event)
            else:
                fail(journey, event)
        elif event in allowed:
            journey.happened(event)
            assert journey.state is allowed[event]
        else:
            with pytest.raises(JourneyError, match=f"cannot {event.name}"):
                journey.happened(event)
