"""What to do about a failed rank of a barrier group, as a machine: reports go in, actions come out. Pure.

When a rank fails, its peers hang in the next step until they notice, and then wait to be told to go on. That
takes all of them together: a retry makes the group that they communicate by anew, and a rank counts how often
it has. One that is told while it holds itself healthy refuses, and the others wait for it in vain. So nobody
is told before nobody is healthy any more, and those that wait are told at once. The machine promises:

* There is one retry at a time: the next begins when each rank that was told the last has recovered, has said
  that it failed, or is gone.
* Retries are counted until the group has been well for ``recovery_s``: ``retries_max`` at most, each
  ``retry_wait_s`` after the end of the one before.
* A fault is over or given up within ``recovery_s``. Who was given up is told nothing more, and watched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, NamedTuple

from brproxy.engines.fault_pages import Report, Standing
from brproxy.transitions import TransitionTable
from brproxy.types import BrproxyError

SILENT_LOOKS_MAX = 3
"""Looks in a row at which a server did not answer: from then on it counts as gone (looks)."""


class State(Enum):
    """Where the recovery of a group is.

    GATHERING: ranks wait, and others may have to notice the fault yet. TELLING: they are being told. TOLD:
    they are about to recover. LOST: it was given up.
    """

    WELL = auto()
    GATHERING = auto()
    TELLING = auto()
    TOLD = auto()
    LOST = auto()


class Event(Enum):
    """What can happen to it. GONE: nobody waits any more, and nobody is healthy."""

    FAULT = auto()
    TELL = auto()
    HEARD = auto()
    FAILED = auto()
    GIVEN_UP = auto()
    RECOVERED = auto()
    GONE = auto()


class RecoveryError(BrproxyError):
    """Something that the state of a recovery does not allow."""


_OVER: Final = {Event.RECOVERED: State.WELL, Event.GONE: State.WELL}
TRANSITIONS: Final[dict[State, dict[Event, State]]] = {
    State.WELL: {Event.FAULT: State.GATHERING},
    State.GATHERING: {Event.TELL: State.TELLING, Event.GIVEN_UP: State.LOST, **_OVER},
    State.TELLING: {Event.HEARD: State.TOLD},
    State.TOLD: {Event.FAILED: State.GATHERING, Event.GIVEN_UP: State.LOST, **_OVER},
    State.LOST: _OVER,
}

AFTER = TransitionTable("a recovery", TRANSITIONS, RecoveryError)


@dataclass(frozen=True, slots=True)
class RecoverySettings:
    """Seconds for a whole recovery and before another retry; retries at most."""

    recovery_s: float
    retries_max: int
    retry_wait_s: float


class Action(NamedTuple):
    """What happened at a look, None for nothing; and which servers are to be told to retry now."""

    event: Event | None
    tell: tuple[str, ...] = ()


class Recovery:
    """One barrier group's. ``counts`` are by event. Servers go by any name that they keep."""

    def __init__(self, settings: RecoverySettings) -> None:
        self._settings = settings
        self._since_s = float("-inf")
        self._well_since_s = float("-inf")
        self._next_retry_s = float("-inf")
        self._retries = 0
        self._told: dict[str, str] = {}
        self._silent_looks: Counter[str] = Counter()
        self.state = State.WELL
        self.counts: Counter[Event] = Counter()

    @property
    def holds(self) -> bool:
        """Whether nobody of the group can serve: a rank has failed, and it is not over nor given up."""
        return self.state not in {State.WELL, State.LOST}

    def look(self, reports: Mapping[str, Report], now_s: float) -> Action:
        """Take in how each server stands; raises RecoveryError while ``heard`` is due."""
        if self.state is State.TELLING:
            msg = "servers are being told to retry: say first what they answered"
            raise RecoveryError(msg)
        self._count_silence(reports)
        waiting = tuple(name for name, each in reports.items() if each.standing is Standing.UNHEALTHY)
        event = self._event(reports, waiting, now_s)
        if event is None:
            return Action(None)
        self._step(event, now_s)
        return Action(event, waiting if event is Event.TELL else ())

    def heard(self, answers: Mapping[str, str], now_s: float) -> None:
        """Note the id that each server gave to the retry, "" for one that did not take it.

        Raises RecoveryError if nobody was to be told.
        """
        self._step(Event.HEARD, now_s)
        self._told = dict(answers)

    def _event(self, reports: Mapping[str, Report], waiting: tuple[str, ...], now_s: float) -> Event | None:
        """Return what has happened; None for nothing."""
        if self.state is State.WELL:
            return Event.FAULT if waiting else None
        undecided = any(self._is_undecided(name, each) for name, each in reports.items())
        healthy = any(each.standing is Standing.HEALTHY for each in reports.values())
        if not waiting and not undecided:
            return Event.RECOVERED if healthy else Event.GONE
        if self.state is State.LOST:
            return None
        if self.state is State.TOLD:
            is_due, due = all(self._is_settled(name, reports) for name in self._told), Event.FAILED
        else:
            is_due, due = now_s >= self._next_retry_s and not undecided and not healthy, Event.TELL
        is_hopeless = due is Event.TELL and self._retries >= self._settings.retries_max
        if is_hopeless or now_s - self._since_s >= self._settings.recovery_s:
            return Event.GIVEN_UP
        return due if is_due else None

    def _step(self, event: Event, now_s: float) -> None:
        self.state = AFTER[self.state][event]
        self.counts[event] += 1
        match event:
            case Event.FAULT:
                self._since_s = now_s
                if now_s - self._well_since_s >= self._settings.recovery_s:
                    self._retries = 0
            case Event.TELL:
                self._retries += 1
            case Event.FAILED | Event.RECOVERED | Event.GONE:
                self._next_retry_s = now_s + self._settings.retry_wait_s
                self._told = {}
        if self.state is State.WELL:
            self._well_since_s = now_s

    def _is_settled(self, name: str, reports: Mapping[str, Report]) -> bool:
        """Tell whether nothing more comes of the retry that a server was told."""
        report = reports.get(name)
        if report is None:
            return True
        if report.standing is Standing.UNHEALTHY:
            return self._told[name] in ("", report.failed)
        # One that is silent may be at it still, however long that takes.
        return report.standing is not Standing.SILENT

    def _is_undecided(self, name: str, report: Report) -> bool:
        """Tell whether a server does not answer, but may do so at the next look."""
        return report.standing is Standing.SILENT and self._silent_looks[name] < SILENT_LOOKS_MAX

    def _count_silence(self, reports: Mapping[str, Report]) -> None:
        silent = [name for name, each in reports.items() if each.standing is Standing.SILENT]
        self._silent_looks = Counter({name: self._silent_looks[name] + 1 for name in silent})
