"""Every state machine is a table: what it lists happens, and everything else is refused in one line."""

import pytest

from brproxy import journey, lifecycle, roster
from brproxy.relay import states
from brproxy.types import BrproxyError

MACHINES = [
    (lifecycle.State, lifecycle.Event, lifecycle.TRANSITIONS, lifecycle.AFTER, lifecycle.LifecycleError),
    (journey.State, journey.Event, journey.TRANSITIONS, journey.AFTER, journey.JourneyError),
    (states.State, states.Event, states.TRANSITIONS, states.AFTER, states.ConnectionStateError),
    (roster.MemberState, roster.MemberEvent, roster.TRANSITIONS, roster.AFTER, roster.RosterError),
]


@pytest.mark.parametrize(
    ("state_type", "event_type", "rows", "table", "error"),
    MACHINES,
    ids=["request", "journey", "connection", "member"],
)
def test_the_table_is_the_whole_rule(state_type, event_type, rows, table, error):
    assert set(rows) == set(state_type)
    assert issubclass(error, BrproxyError)
    for state in state_type:
        for event in event_type:
            if event in rows[state]:
                assert table[state][event] is rows[state][event]
            else:
                with pytest.raises(error, match=f"in state {state.name} cannot {event.name}$"):
                    table[state][event]


def test_messages_name_what_it_is():
    with pytest.raises(roster.RosterError, match=r"^a member in state ACTIVE cannot GO$"):
        roster.AFTER[roster.MemberState.ACTIVE][roster.MemberEvent.GO]
