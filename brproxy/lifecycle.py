"""The states of a request, as one transition table.

A request ARRIVES and is PENDING in its group's pool. BIND gives it a worker: it is in PREFILL until its first
token, then in DECODE. A worker that fails before the first byte sends it back to PENDING (RETRY). It ends in
exactly one of the terminal states, from whichever state it is in; nothing leads out of those. RETRY is absent
from DECODE: once the client has seen a token, nothing is sent twice.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from brproxy.types import BrproxyError


class State(Enum):
    """Where a request is in its life."""

    # There is one object for each member: no need to hash its name on every look-up of a transition.
    __hash__ = object.__hash__

    PENDING = auto()
    PREFILL = auto()
    DECODE = auto()
    FINISHED = auto()
    FAILED = auto()
    CANCELLED = auto()
    EXPIRED = auto()


class Event(Enum):
    """What can happen to a request."""

    __hash__ = object.__hash__

    BIND = auto()
    FIRST_TOKEN = auto()
    RETRY = auto()
    FINISH = auto()
    FAIL = auto()
    CANCEL = auto()
    EXPIRE = auto()


class LifecycleError(BrproxyError):
    """An event that the request's state does not allow: a bug in the caller, never in the input."""


TERMINAL: Final = frozenset({State.FINISHED, State.FAILED, State.CANCELLED, State.EXPIRED})
"""States that end a request; its load is returned on entering any of them."""

TRANSITIONS: Final[dict[State, dict[Event, State]]] = {
    State.PENDING: {
        Event.BIND: State.PREFILL,
        Event.FAIL: State.FAILED,
        Event.CANCEL: State.CANCELLED,
        Event.EXPIRE: State.EXPIRED,
    },
    State.PREFILL: {
        Event.FIRST_TOKEN: State.DECODE,
        Event.RETRY: State.PENDING,
        Event.FINISH: State.FINISHED,
        Event.FAIL: State.FAILED,
        Event.CANCEL: State.CANCELLED,
    },
    State.DECODE: {
        Event.FINISH: State.FINISHED,
        Event.FAIL: State.FAILED,
        Event.CANCEL: State.CANCELLED,
    },
    State.FINISHED: {},
    State.FAILED: {},
    State.CANCELLED: {},
    State.EXPIRED: {},
}


def after(state: State, event: Event) -> State:
    """Return the state that ``event`` leads to; raises LifecycleError when ``state`` does not allow it."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        msg = f"a request in state {state.name} cannot {event.name}"
        raise LifecycleError(msg) from None
