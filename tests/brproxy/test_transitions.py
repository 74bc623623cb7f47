"""Every state machine is a table: what it lists happens, and everything else is refused in one line."""

import pytest

from brproxy import lifecycle, roster
from brproxy.relay import states
from brproxy.types import BrproxyError

MACHINES = [
    (lifecycle.State, lifecycle.Event, lifecycle.TRANSITIONS, lifecycle.after, lifecycle.LifecycleError),
    (states.State, states.Event, states.TRANSITIONS, states.after, states.ConnectionStateError),
    (roster.MemberState, roster.MemberEvent, roster.TRANSITIONS, roster.after, roster.RosterError),
]


@pytest.mark.parametrize(
    ("state_type", "event_type", "rows", "after", "error"), MACHINES, ids=["request", "connection", "member"]
)
def test_the_table_is_the_whole_rule(state_type, event_type, rows, after, error):
    assert set(rows) == set(state_type)
    assert issubclass(error, BrproxyError)
    for state in state_type:
        for event in event_type:
            if event in rows[state]:
                assert after(state, event) is rows[state][event]
            else:
                with pytest.raises(error, match=f"in state {state.name} cannot {event.name}$"):
                    after(state, event)


def test_messages_name_what_it_is():
    with pytest.raises(roster.RosterError, match=r"^a member in state ACTIVE cannot GO$"):
        roster.after(roster.MemberState.ACTIVE, roster.MemberEvent.GO)
