"""The transition table."""

from brproxy.lifecycle import TERMINAL, TRANSITIONS, Event, State


def test_nothing_leads_out_of_a_terminal_state():
    assert all(not TRANSITIONS[state] for state in TERMINAL)


def test_every_state_has_a_row_and_every_living_state_an_end():
    assert set(TRANSITIONS) == set(State)
    for state in set(State) - TERMINAL:
        assert TERMINAL & set(TRANSITIONS[state].values())


def test_nothing_is_sent_twice_once_the_client_has_seen_a_token():
    assert Event.RETRY not in TRANSITIONS[State.DECODE]
