"""Who the workers of a barrier group are: the one place that says so. Pure.

Names, limits, health, origins and the labels of metrics come from here, and everybody who keeps something for
each worker (the ledger, the connections, the metrics, the checks) is told what changes. A member is ACTIVE,
or DRAINING: it takes nothing new and finishes what it has. It is GONE once it has been removed and nothing is
bound to it. A member that drains is in the barrier still: its load counts for the envelope like any other's.
One that drains may be resumed, but not once it is to leave: its name is free for another then.

A member has an index for as long as it is there, and what is kept for each worker is kept under that. The
index of one that has gone is given to the next that comes; until then there is a gap, which policies never
see: they count *places*, the positions of those who are there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count
from typing import Final

import numpy as np
from numpy.typing import NDArray

from brproxy.health import Health, HealthThresholds, HealthTracker
from brproxy.transitions import TransitionTable
from brproxy.types import BrproxyError, InvalidInputError, WorkerIndex

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What a worker holds: ``slots`` sequences at once, ``kv_capacity_tokens`` (None: unknown).

    ``capacity_is_found``: the engine says so, and not the configuration. ``slots_are_assumed``: nobody says.
    """

    slots: int
    kv_capacity_tokens: int | None = None
    capacity_is_found: bool = False
    slots_are_assumed: bool = False


class MemberState(Enum):
    """Where a member is in its life."""

    ACTIVE = auto()
    DRAINING = auto()
    GONE = auto()


class MemberEvent(Enum):
    """What can be done to a member."""

    DRAIN = auto()
    RESUME = auto()
    GO = auto()


class RosterError(BrproxyError):
    """Something that a member's state does not allow, or that there is no such member."""


TRANSITIONS: Final[dict[MemberState, dict[MemberEvent, MemberState]]] = {
    MemberState.ACTIVE: {
        MemberEvent.DRAIN: MemberState.DRAINING,
        MemberEvent.RESUME: MemberState.ACTIVE,
    },
    MemberState.DRAINING: {
        MemberEvent.DRAIN: MemberState.DRAINING,
        MemberEvent.RESUME: MemberState.ACTIVE,
        MemberEvent.GO: MemberState.GONE,
    },
    MemberState.GONE: {},
}

AFTER = TransitionTable("a member", TRANSITIONS, RosterError)


class Change(Enum):
    """What observers of a roster are told."""

    ADDED = auto()
    DRAINING = auto()
    RESUMED = auto()
    LIMITS = auto()
    GONE = auto()
    HEALTHY = auto()
    UNHEALTHY = auto()
    # Told behind what led to it, which may have happened to another.
    OUT = auto()


@dataclass(slots=True, eq=False)
class Member:
    """One worker: ``key`` is its name and the label of its metrics, ``origin`` where it listens.

    ``lines`` are header lines sent with every request, each with its end. ``rank`` is its DP rank in the
    deployment, where it is one of several behind its origin. ``leaves``: it goes as soon as
    nothing is bound to it. ``refuses_since_s``: since then nobody could connect to it, since it refused; None
    while it does not.
    """

    key: str
    index: WorkerIndex
    limits: WorkerLimits
    health: HealthTracker
    origin: str = ""
    lines: bytes = b""
    rank: int | None = None
    state: MemberState = MemberState.ACTIVE
    leaves: bool = False
    refuses_since_s: float | None = None

    @property
    def is_routable(self) -> bool:
        """Whether it may be chosen for a request."""
        return self.state is MemberState.ACTIVE and self.health.state is Health.HEALTHY


Observer = Callable[[Member, Change], None]


def name_of_leaving(name: str, taken: Collection[str]) -> str:
    """Return what a member or a group called ``name`` is called from now on, as its name may be another's."""
    names = (f"{name} (leaving{'' if number == 1 else f' {number}'})" for number in count(1))
    return next(each for each in names if each not in taken)


class Roster:
    """The members of one barrier group. Without active checks (``checked``) each starts HEALTHY.

    ``version`` changes with each member that comes, drains, is resumed or goes, and with limits. ``present``
    are the indices of those who are there, in order, and ``place`` the place of each index, int64; both are
    None without a gap. While more than ``ejected_share_max`` of the active members are UNHEALTHY, none is out
    for its checks: where they fail for so many they say more about themselves, or leave too few to bear the
    load. So one that is UNHEALTHY may only be OUT once others are well again. What a member says of itself
    is no check: then it is out, whatever the others are.
    """

    def __init__(
        self,
        thresholds: HealthThresholds | None = None,
        *,
        checked: bool = True,
        ejected_share_max: float = 1.0,
    ) -> None:
        self._thresholds = thresholds or HealthThresholds()
        self._ejected_share_max = ejected_share_max
        self._panics = False
        self._checked = checked
        self._members: list[Member] = []
        self._observers: list[Observer] = []
        self._routable: tuple[bool, ...] = ()
        # Whom checks, or what they say of themselves, keep from being chosen; as ``is_out`` says.
        self.out: frozenset[Member] = frozenset()
        self.version = 0
        self.present: list[int] | None = None
        self.place: NDArray[np.int64] | None = None

    @staticmethod
    def of(limits: Iterable[WorkerLimits]) -> Roster:
        """Return a roster of healthy workers named by their index, for whoever has no need to check them."""
        roster = Roster(checked=False)
        for index, each in enumerate(limits):
            roster.add(str(index), each)
        return roster

    def __len__(self) -> int:
        """Return G, the members that are there."""
        return len(self._members) if self.present is None else len(self.present)

    def __repr__(self) -> str:
        """Show the state in one line, for tests and logs."""
        members = " ".join(f"{m.key}:{m.state.name}:{m.health.state.value}" for m in self._members)
        return f"<Roster {members}>"

    @property
    def columns(self) -> int:
        """Indices in use, those of gaps included."""
        return len(self._members)

    @property
    def members(self) -> Sequence[Member]:
        """The members that are there, by index."""
        return [member for member in self._members if member.state is not MemberState.GONE]

    def member(self, index: int) -> Member:
        """Return the member with ``index``; raises RosterError."""
        if 0 <= index < len(self._members) and self._members[index].state is not MemberState.GONE:
            return self._members[index]
        msg = f"there is no worker {index} among {len(self)}"
        raise RosterError(msg)

    def find(self, key: str) -> Member:
        """Return the member called ``key``; raises RosterError."""
        for member in self.members:
            if member.key == key:
                return member
        msg = f"there is no worker {key}"
        raise RosterError(msg)

    def routable(self) -> tuple[bool, ...]:
        """Return for each index whether that member may be chosen."""
        return self._routable

    def is_out(self, member: Member) -> bool:
        """Tell whether checks, or what it says of itself, keep a member from being chosen."""
        return member in self.out

    def has_others(self, than: Collection[WorkerIndex]) -> bool:
        """Tell whether a member may be chosen that is none of ``than``."""
        return any(ok and g not in than for g, ok in enumerate(self._routable))

    def observe(self, observer: Observer) -> None:
        """Have ``observer(member, change)`` called after each change, in the order of asking."""
        self._observers.append(observer)

    def add(
        self, key: str, limits: WorkerLimits, origin: str = "", lines: bytes = b"", rank: int | None = None
    ) -> Member:
        """Add a member; raises InvalidInputError for a name that is taken.

        One that leaves has given its name away. If it is the same worker, at the same place, it stays
        instead: what is booked for it is what that worker still does.
        """
        before = next((member for member in self.members if member.key == key), None)
        if before is not None:
            if not before.leaves:
                msg = f"there is a worker {key} already"
                raise InvalidInputError(msg)
            if (before.origin, before.lines) == (origin, lines):
                before.leaves = False
                self.resume(key)
                return self.set_limits(key, limits)
            before.key = name_of_leaving(key, {member.key for member in self.members})
        health = HealthTracker(self._thresholds)
        if not self._checked:
            health.record(ok=True, reason="health checks are off", now_s=0.0)
        gap = next((m.index for m in self._members if m.state is MemberState.GONE), None)
        member = Member(key, WorkerIndex(len(self._members)), limits, health, origin, lines, rank)
        if gap is None:
            self._members.append(member)
        else:
            member.index = gap
            self._members[gap] = member
        self._changed(member, Change.ADDED)
        return member

    def drain(self, key: str) -> Member:
        """Have a member take nothing new; raises RosterError."""
        member = self.find(key)
        state = AFTER[member.state][MemberEvent.DRAIN]
        if state is not member.state:
            member.state = state
            self._changed(member, Change.DRAINING)
        return member

    def resume(self, key: str) -> Member:
        """Have a member that drains be chosen again; raises RosterError, also for one that is to leave."""
        member = self.find(key)
        state = AFTER[member.state][MemberEvent.RESUME]
        if member.leaves:
            msg = f"worker {key} leaves with its last request: it cannot be resumed, only added again"
            raise RosterError(msg)
        if state is not member.state:
            member.state = state
            self._changed(member, Change.RESUMED)
        return member

    def set_limits(self, key: str, limits: WorkerLimits) -> Member:
        """Change what a member holds, in place: what is bound to it stays; raises RosterError."""
        member = self.find(key)
        self.set_limits_of(member, limits)
        return member

    def remove(self, key: str, bound: int) -> Member:
        """Have a member go: at once with nothing ``bound`` to it (requests), else when the last has ended.

        Raises RosterError for a name that is not there.
        """
        member = self.drain(key)
        member.leaves = True
        if not bound:
            self.let_go(member.index)
        return member

    def let_go(self, index: int) -> None:
        """Note that nothing is bound to a member any more: one that leaves has gone then."""
        member = self._members[index]
        if member.leaves and member.state is MemberState.DRAINING:
            member.state = AFTER[member.state][MemberEvent.GO]
            self._changed(member, Change.GONE)

    def set_limits_of(self, member: Member, limits: WorkerLimits) -> None:
        """As ``set_limits``, for whoever knows the member; one that has gone is left alone."""
        if member.state is not MemberState.GONE and limits != member.limits:
            member.limits = limits
            self._changed(member, Change.LIMITS)

    def record(self, member: Member, *, ok: bool, reason: str, now_s: float, refused: bool = False) -> bool:
        """Take in the result of a check or of connecting; return whether the member's health changed.

        That of one that has gone changes nothing. ``refused``: it refuses connections, which also a worker
        that answers on older ones can.
        """
        if member.state is MemberState.GONE:
            return False
        if ok:
            member.refuses_since_s = None
        elif refused and member.refuses_since_s is None:
            member.refuses_since_s = now_s
        changed = member.health.record(ok=ok, reason=reason, now_s=now_s)
        if changed:
            self._health_changed(member)
        return changed

    def accuse(self, member: Member, reason: str, now_s: float) -> bool:
        """Take a member out for what it says of itself, until ``reason`` is ""; return as ``record``."""
        if member.state is MemberState.GONE:
            return False
        was_accused = member.health.is_accused
        changed = member.health.accuse(reason, now_s)
        if changed:
            self._health_changed(member)
        elif member.health.is_accused is not was_accused:
            # It was unhealthy before, and is now out or not for another reason.
            self._tell_out(self._judge())
        return changed

    def _health_changed(self, member: Member) -> None:
        goes_out = self._judge()
        self._tell(member, Change.HEALTHY if member.health.state is Health.HEALTHY else Change.UNHEALTHY)
        self._tell_out(goes_out)

    def _changed(self, member: Member, change: Change) -> None:
        self.version += 1
        goes_out = self._judge()
        present = [m.index for m in self.members]
        self.present = self.place = None
        if len(present) < len(self._members):
            self.present = list(present)
            self.place = np.zeros(len(self._members), dtype=np.int64)
            self.place[present] = np.arange(len(present))
        self._tell(member, change)
        self._tell_out(goes_out)

    def _judge(self) -> list[Member]:
        """Find who may be chosen, and who is out; return those that were not before."""
        active = [member for member in self._members if member.state is MemberState.ACTIVE]
        unhealthy = [member for member in self.members if member.health.state is Health.UNHEALTHY]
        failing = {member for member in unhealthy if member.state is MemberState.ACTIVE}
        panics = len(failing) > self._ejected_share_max * len(active)
        if panics is not self._panics:
            self._panics = panics
            said = "all may be chosen" if panics else "they may not be chosen"
            log.warning("%d of %d workers are unhealthy: %s", len(failing), len(active), said)
        out = [member for member in unhealthy if member.health.is_accused or not panics]
        before, self.out = self.out, frozenset(out)
        self._routable = tuple(m.is_routable or (m in failing and m not in self.out) for m in self._members)
        return [member for member in out if member not in before]

    def _tell_out(self, members: Collection[Member]) -> None:
        for member in members:
            # Who was told of the change may have changed more.
            if member in self.out:
                self._tell(member, Change.OUT)

    def _tell(self, member: Member, change: Change) -> None:
        for observer in self._observers:
            try:
                observer(member, change)
            except Exception:
                # The others must be told all the same, and who removed or checked a member can do nothing.
                log.exception("told that worker %s is %s, an observer failed", member.key, change.name)
