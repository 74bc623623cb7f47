"""The attempts of one request as a machine: what happened goes in, what to do comes out. Pure.

No sockets, no clock, no clients: whoever drives it does the I/O. It promises:

* Nothing is sent again once the client has had a byte of an answer; what goes on from there is another
  request.
* What a worker may have worked on (CUT, DIED, OUT) is sent again once at most, and only if it generates:
  computing an answer twice is dear, doing anything else twice is wrong, and a request that kills its worker
  does not kill a third. Where it has several legs, each of which has a journey, that is once for all of them.
* What no worker has worked on (UNREACHABLE, REFUSED) moves on at most ``retries_max`` times.
* It never moves to a worker that has failed it: without another one, the failure is the answer. One that lost
  its worker by no deed of its own (OUT) waits in the pool like any other.
* A kept connection that turns out to have been closed (STALE) costs nothing: the request is sent again, at
  once, on a new connection to the same worker. That once; and a worker that cannot be reached then may have
  died of the request: it counts as CUT.
* Each move waits longer than the one before.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final, NamedTuple

from brproxy.transitions import TransitionTable
from brproxy.types import BrproxyError


class State(Enum):
    """Where a request's way is."""

    __hash__ = object.__hash__

    WAITING = auto()
    TRYING = auto()
    ANSWERING = auto()
    OVER = auto()


class Event(Enum):
    """What can happen on it."""

    __hash__ = object.__hash__

    BOUND = auto()
    # Of a worker, before its client has had anything.
    UNREACHABLE = auto()
    SHORTAGE = auto()
    REFUSED = auto()
    STALE = auto()
    CUT = auto()
    DIED = auto()
    OUT = auto()
    SILENT = auto()
    CRASHED = auto()
    # Of a worker, from the first byte for the client on.
    BEGUN = auto()
    BROKE_OFF = auto()
    FINISHED = auto()
    # Of the client.
    LEFT = auto()


class Action(Enum):
    """What to do now."""

    __hash__ = object.__hash__

    SEND = auto()
    SEND_AFRESH = auto()
    WAIT = auto()
    ANSWER = auto()
    NOTHING = auto()


class Rule(NamedTuple):
    """What an event that ends an attempt allows.

    ``moves``: another worker may get the request. ``ran``: the worker may have worked on it. ``alone``: also
    if there is no other worker now.
    """

    moves: bool = False
    ran: bool = False
    alone: bool = False


RULES: Final[dict[Event, Rule]] = {
    Event.UNREACHABLE: Rule(moves=True),
    Event.REFUSED: Rule(moves=True),
    Event.CUT: Rule(moves=True, ran=True),
    Event.DIED: Rule(moves=True, ran=True),
    Event.OUT: Rule(moves=True, ran=True, alone=True),
    Event.SHORTAGE: Rule(),
    Event.SILENT: Rule(),
    Event.CRASHED: Rule(),
}
"""Events that end an attempt of which the client has seen nothing; STALE becomes one of them, or nothing."""

TRANSITIONS: Final[dict[State, dict[Event, State]]] = {
    State.WAITING: {Event.BOUND: State.TRYING, Event.LEFT: State.OVER},
    # Where a rule lets the request move, the way leads back to WAITING instead.
    State.TRYING: {
        **dict.fromkeys(RULES, State.OVER),
        Event.STALE: State.TRYING,
        Event.BEGUN: State.ANSWERING,
        Event.FINISHED: State.OVER,
        Event.BROKE_OFF: State.OVER,
        Event.LEFT: State.OVER,
    },
    State.ANSWERING: {
        Event.FINISHED: State.OVER,
        Event.BROKE_OFF: State.OVER,
        Event.CRASHED: State.OVER,
        Event.LEFT: State.OVER,
    },
    State.OVER: {},
}

RERUNS_MAX = 1
"""Times that what a worker may have worked on is sent to another."""


class JourneyError(BrproxyError):
    """An event that the request's state does not allow: a bug in the caller, never in the input."""


AFTER = TransitionTable("a request", TRANSITIONS, JourneyError)

# As plain names: looking a member of an enumeration up costs more than comparing it.
_WAITING, _BOUND, _SEND = State.WAITING, Event.BOUND, Action.SEND


class Runs:
    """How often a request was ``lost`` with a worker that may have worked on it, in all of its legs."""

    __slots__ = ("lost",)

    def __init__(self) -> None:
        self.lost = 0

    @property
    def may_repeat(self) -> bool:
        """Whether what is lost now may be sent again."""
        return self.lost < RERUNS_MAX

    @property
    def may_go_on(self) -> bool:
        """Whether no more was lost than may be sent again."""
        return self.lost <= RERUNS_MAX

    def failed(self, *, ran: bool) -> bool:
        """Note an attempt that failed, and that may have ``ran``; return whether there may be another."""
        may_repeat = self.may_repeat or not ran
        self.lost += ran
        return may_repeat


class Journey:
    """One request's way to its answer, or that of one of its legs, which share ``runs``.

    ``generates``: it does nothing but generate.
    """

    __slots__ = ("_generates", "_is_stale", "_moves", "_retries_left", "_runs", "state")

    def __init__(self, retries_max: int, runs: Runs, *, generates: bool) -> None:
        self._generates = generates
        self._retries_left = retries_max
        self._runs = runs
        self._is_stale = False
        self._moves = 0
        self.state = _WAITING

    @property
    def has_begun(self) -> bool:
        """Whether the client has had some of an answer."""
        return self.state is State.ANSWERING

    def bound(self) -> Action:
        """Note that the request has a worker; return how to send it there."""
        self.state = AFTER[self.state][_BOUND]
        # After a failure kept connections are not to be trusted: what closed one may have closed all.
        return Action.SEND_AFRESH if self._moves or self._is_stale else _SEND

    def happened(self, event: Event) -> None:
        """Note what needs no decision: BEGUN, BROKE_OFF, FINISHED, LEFT; raises JourneyError."""
        self.state = AFTER[self.state][event]

    def failed(self, event: Event, *, repeatable: bool, others: bool) -> Action:
        """Decide what follows a failed attempt; raises JourneyError.

        ``repeatable``: the whole request can be sent once more. ``others``: a worker may be chosen that has
        not failed it.
        """
        state = AFTER[self.state][event]
        if event is Event.STALE:
            if repeatable and not self._is_stale:
                self._is_stale = True
                return Action.SEND_AFRESH
            event = Event.CUT
        moves = self.may_move(event, repeatable=repeatable, others=others)
        self.state = State.OVER if state is State.TRYING else state
        self._runs.lost += self._rule(event).ran
        if not moves:
            return Action.ANSWER
        self.state = State.WAITING
        self._retries_left -= 1
        self._moves += 1
        return Action.WAIT

    def may_move(self, event: Event, *, repeatable: bool, others: bool) -> bool:
        """Tell whether ``failed`` would let the request wait for another worker."""
        rule = self._rule(event)
        return (
            self.state is State.TRYING
            and rule.moves
            and repeatable
            and (others or rule.alone)
            and self._retries_left > 0
            and not (rule.ran and not (self._generates and self._runs.may_repeat))
        )

    def wait_s(self, first_s: float, most_s: float) -> float:
        """Return how long the move that was just decided waits: ``first_s``, twice that, …, ``most_s``."""
        return min(first_s * float(1 << (self._moves - 1)), most_s)

    def _rule(self, event: Event) -> Rule:
        if event is Event.UNREACHABLE and self._is_stale and not self._moves:
            # A moment ago it had a connection, and the request on it.
            return RULES[Event.CUT]
        return RULES[event]
