"""The transition table of a worker connection."""

import pytest

from brproxy.relay.states import AFTER, TRANSITIONS, ConnectionStateError, Event, State


def test_the_table_names_every_state():
    assert set(TRANSITIONS) == set(State)


def test_nothing_leads_out_of_closed():
    assert {AFTER[State.CLOSED][event] for event in TRANSITIONS[State.CLOSED]} == {State.CLOSED}


@pytest.mark.parametrize("state", State)
def test_a_lost_connection_is_closed_from_everywhere(state):
    assert AFTER[state][Event.LOST] is State.CLOSED


def test_every_state_can_be_reached_from_idle():
    reached, new = set(), {State.IDLE}
    while new:
        reached |= new
        new = {target for state in new for target in TRANSITIONS[state].values()} - reached
    assert reached == set(State)


@pytest.mark.parametrize(
    ("state", "event"), [(s, e) for s in State for e in Event if e not in TRANSITIONS[s]], ids=str
)
def test_what_the_table_does_not_allow_is_an_error(state, event):
    with pytest.raises(ConnectionStateError, match=f"in state {state.name} cannot {event.name}"):
        AFTER[state][event]
