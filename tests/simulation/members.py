"""Workers that join a running group, are drained and resumed, hold more or less, leave and come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from brproxy.fleet import Fleet, Group
from brproxy.roster import Member, MemberState, WorkerLimits
from tests.simulation.loop import VirtualLoop
from tests.simulation.workers import Worker


class Members:
    """The members of the groups of ``fleet``, and their ``workers``; ``start`` starts one more of a group."""

    def __init__(
        self,
        loop: VirtualLoop,
        fleet: Fleet,
        workers: list[Worker],
        start: Callable[[Group], Worker],
    ) -> None:
        self._loop = loop
        self._fleet = fleet
        self._workers = workers
        self._start = start
        self._out_s: dict[Worker, int] = {}
        self._usual: dict[Member, WorkerLimits] = {}

    def happen(self, kind: str, worker: Worker, lasts_s: float) -> None:
        """Have what ``Trouble`` calls ``kind`` happen to a worker."""
        if kind == "member-leaves":
            self.leave(worker, lasts_s)
        elif kind == "member-drains":
            self.drain(worker, lasts_s)
        elif kind == "member-joins":
            self.join_like(worker)
        else:
            self.change_limits(worker, lasts_s, rise=kind == "limits-rise")

    def leave(self, worker: Worker, lasts_s: float) -> None:
        """Drain a worker, remove it in the middle of ``lasts_s`` and take it back behind; never the last.

        Of one with several ranks all leave, or one where that would leave none.
        """
        group = self._group_of(worker)
        if group is None:
            return
        active = [one for one in group.roster.members if one.state is MemberState.ACTIVE]
        leaving = [one for one in active if one.origin == worker.url]
        if len(leaving) == len(active):
            leaving = leaving[1:]
        for member in leaving:
            group.drain(member.key)
            self._loop.call_later(lasts_s / 2, self._remove, group, member)
            self._loop.call_later(lasts_s, self._come_back, group, member)

    def drain(self, worker: Worker, lasts_s: float) -> None:
        """Drain a worker, and resume it ``lasts_s`` later; also the last, whose group then waits."""
        group = self._group_of(worker)
        for member in self._behind(group, worker):
            self._loop.call_later(lasts_s, self._resume, group, group.drain(member.key))

    def change_limits(self, worker: Worker, lasts_s: float, *, rise: bool) -> None:
        """Have a worker hold more, or hardly anything, for ``lasts_s``."""
        group = self._group_of(worker)
        for member in self._behind(group, worker):
            usual = self._usual.setdefault(member, member.limits)
            group.set_limits(member.key, WorkerLimits(2 * usual.slots) if rise else WorkerLimits(1, 300))
            self._loop.call_later(lasts_s, self._as_usual, group, member)

    def join(self, group: Group) -> None:
        """Add a new worker."""
        like = group.roster.members[0]
        worker = self._start(group)
        group.add(worker.key, self._usual.get(like, like.limits), worker.url)

    def join_like(self, worker: Worker) -> None:
        """Add a new worker to the group of ``worker``."""
        self.join(self._group_of(worker) or next(group for group in self._fleet.groups if not group.leaves))

    def _resume(self, group: Group, member: Any) -> None:
        if member in group.roster.members and not member.leaves:
            group.resume(member.key)

    def _as_usual(self, group: Group, member: Any) -> None:
        if member in group.roster.members:
            group.set_limits(member.key, self._usual[member])

    def _remove(self, group: Group, member: Any) -> None:
        if member in group.roster.members:
            group.remove(member.key)

    def _come_back(self, group: Group, member: Any) -> None:
        if group.leaves:
            return
        if member in group.roster.members:
            # Its last request has not ended yet.
            self._loop.call_later(1.0, self._come_back, group, member)
        elif all(one.key != member.key or one.leaves for one in group.roster.members):
            # Who was resumed meanwhile may have left twice.
            limits = self._usual.get(member, member.limits)
            group.add(member.key, limits, member.origin, member.lines, member.rank)

    def _group_of(self, worker: Worker) -> Group | None:
        for group in self._fleet.groups:
            if not group.leaves and any(member.origin == worker.url for member in group.roster.members):
                return group
        return None

    @staticmethod
    def _behind(group: Group | None, worker: Worker) -> list[Any]:
        """Return the members that a worker is: one, or several ranks."""
        members = [] if group is None else group.roster.members
        return [member for member in members if member.origin == worker.url]

    def out_s(self, host: str) -> int:
        """Return for how many looks in a row a worker has been out that still is (see ``stuck``)."""
        worker = next(one for one in self._workers if one.host == host)
        group = self._group_of(worker)
        ranks = self._behind(group, worker)
        return self._out_s.get(worker, 0) if group is not None and _are_out(group, ranks) else 0

    def is_out(self, host: str) -> bool:
        """Tell whether a worker is out, or gone."""
        worker = next(one for one in self._workers if one.host == host)
        group = self._group_of(worker)
        return group is None or _are_out(group, self._behind(group, worker))

    def stuck(self, retries_max: int) -> str | None:
        """Say which request stays unread with a worker that is out although there is another, if any does.

        To be called once a second.
        """
        workers = {worker.url: worker for worker in self._workers}
        for group in self._fleet.groups:
            members = group.roster.members
            others = any(other.is_routable for other in members)
            for origin in dict.fromkeys(member.origin for member in members):
                worker = workers[origin]
                ranks = [member for member in members if member.origin == origin]
                self._out_s[worker] = self._out_s.get(worker, 0) + 1 if _are_out(group, ranks) else 0
                # The first look may come at once, and requests of the last moment are on their way.
                if self._out_s[worker] < 2 or not others:
                    continue
                for record in worker.unanswered():
                    if record.has_ended:
                        # Nobody waits for it: its KV is to be freed.
                        continue
                    if record.ask.kind in {"chat", "completion"} and len(record.attempts) < retries_max:
                        return f"request {record.ask.id} stays with {worker.host}"
        return None


def _are_out(group: Group, ranks: list[Any]) -> bool:
    """Tell whether all ranks of a worker are out: where too many are unhealthy none of them is."""
    return all(map(group.roster.is_out, ranks))
