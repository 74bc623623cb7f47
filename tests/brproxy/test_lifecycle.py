"""The transition table."""

import pytest

from brproxy.lifecycle import TERMINAL, TRANSITIONS, Event, LifecycleError, State, after


def test_nothing_leads_out_of_a_terminal_state():
    assert all(not TRANSITIONS[state] for state in TERMINAL)


def test_every_state_has_a_row_and_every_living_state_an_end():
    assert set(TRANSITIONS) == set(State)
    for state in set(State) - TERMINAL:
        assert TERMINAL & set(TRANSITIONS[state].values())


def test_every_event_is_refused_where_the_table_does_not_list_it():
    for state in State:
        for event in Event:
            if event in TRANSITIONS[state]:
                assert after(state, event) is TRANSITIONS[state][event]
            else:
                with pytest.raises(LifecycleError, match=f"in state {state.name} cannot {event.name}"):
                    after(state, event)


def test_nothing_is_sent_twice_once_the_client_has_seen_a_token():
    assert Event.RETRY not in TRANSITIONS[State.DECODE]
