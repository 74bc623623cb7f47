"""The states of a worker connection, as one transition table.

A connection is IDLE while no request is on it. SEND puts one on it: WAITING until the response's head is
there (HEAD), then in BODY until the response is complete. If everything has been said and both sides keep the
connection it is IDLE again (END_KEEP), else CLOSED (END_CLOSE). A worker that answers 101 turns it into a
TUNNEL (UPGRADE). LOST, the end of the transport, leads to CLOSED from everywhere, and nothing leads out of
that: a connection on which anything unexpected happened is never used again.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final

from brproxy.transitions import TransitionTable
from brproxy.types import BrproxyError


class State(Enum):
    """Where a worker connection is."""

    # Members are looked up for each request; an enumeration's own hash is computed in Python.
    __hash__ = object.__hash__

    IDLE = auto()
    WAITING = auto()
    BODY = auto()
    TUNNEL = auto()
    CLOSED = auto()


class Event(Enum):
    """What can happen to a worker connection."""

    __hash__ = object.__hash__

    SEND = auto()
    HEAD = auto()
    END_KEEP = auto()
    END_CLOSE = auto()
    UPGRADE = auto()
    LOST = auto()


class ConnectionStateError(BrproxyError):
    """An event that the connection's state does not allow: a bug in the caller, never in the input."""


TRANSITIONS: Final[dict[State, dict[Event, State]]] = {
    State.IDLE: {Event.SEND: State.WAITING, Event.LOST: State.CLOSED},
    State.WAITING: {Event.HEAD: State.BODY, Event.UPGRADE: State.TUNNEL, Event.LOST: State.CLOSED},
    State.BODY: {
        Event.END_KEEP: State.IDLE,
        Event.END_CLOSE: State.CLOSED,
        Event.LOST: State.CLOSED,
    },
    State.TUNNEL: {Event.LOST: State.CLOSED},
    State.CLOSED: {Event.LOST: State.CLOSED},
}


AFTER = TransitionTable("a worker connection", TRANSITIONS, ConnectionStateError)
