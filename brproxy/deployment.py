"""What is deployed: it follows a new configuration, and what the admin API asks, plan by plan. Pure.

Groups are made, changed and ended by a ``Making``; who is in them is said here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from brproxy.config import Config
from brproxy.config_workers import Seat, Worker
from brproxy.fleet import Fleet, Group
from brproxy.plans import GroupKind, GroupStep, Kind, Plan, Step, conflicts, limits_of, plan
from brproxy.roster import Member, MemberState, Roster, RosterError, WorkerLimits
from brproxy.types import BrproxyError
from brproxy.validation import ConfigError


class UnknownWorkerError(BrproxyError):
    """There is no worker of that name."""


class RefusedError(BrproxyError):
    """What was asked of a worker cannot be done as things are."""


class Making(Protocol):
    """Has all that groups need besides their members made, changed and ended."""

    def settle(self, config: Config) -> None:
        """Have what runs take up what ``config`` says of it."""

    def begin(self, config: Config, workers: Sequence[Worker]) -> Iterable[Group]:
        """Make a group without members, for all of ``workers``, and with it the one that prefills for it."""

    def end(self, groups: Sequence[Group]) -> None:
        """Have groups take no new requests, and go with the last that they have."""

    def reach(self, worker: Worker) -> None:
        """Note how a worker is reached that comes, or that is there and is reached otherwise from now on."""

    def forget(self, workers: Sequence[Worker]) -> None:
        """Forget how workers are reached that are none of ``workers``, and not there any more."""


def join(roster: Roster, worker: Worker) -> list[Member]:
    """Add ``worker`` to the roster of its group; raises InvalidInputError for a name that is taken."""
    return [_seat(roster, worker, seat) for seat in worker.seats]


class Deployment:
    """What runs: ``fleet``, with the workers that ``config`` names and those that the admin API has added."""

    def __init__(self, config: Config, fleet: Fleet, making: Making) -> None:
        self.config = config
        self._fleet = fleet
        self._making = making
        self.by_admin: frozenset[str] = frozenset()
        self._groups = {group.name: group for group in fleet.groups}

    def reload(self, new: Config, source: str) -> Plan:
        """Have the running workers follow ``new``, which was read from ``source``, and return what changed.

        Raises ConfigError, a line for each reason, and has changed nothing then. No stream is cut.
        """
        changes = self._follow(plan(self._as_it_runs(), new, self.by_admin), source)
        self.by_admin = frozenset(changes.kept)
        return changes

    def change(self, workers: Sequence[Worker], source: str) -> Plan:
        """Have ``workers`` be those that run, as ``source`` says and not the file; as ``reload``, else.

        Who was added by the admin API is still that.
        """
        wanted = self.config.model_copy(update={"worker": list(workers)})
        changes = self._follow(plan(self._as_it_runs(), wanted), source)
        self.by_admin &= {worker.label for worker in changes.workers}
        return changes

    def running(self) -> list[Worker]:
        """Return the workers with what they hold now, also what their engines have said since they came."""
        there = {(name, m.key): m for name, group in self._groups.items() for m in group.roster.members}
        return [_as_held(worker, there) for worker in self.config.worker]

    def add(self, worker: Worker) -> list[Member]:
        """Add a worker to a group that is there; raises ConfigError, a line for each reason."""
        workers = (*self.config.worker, worker)
        if worker.barrier_group not in self._groups:
            known = ", ".join(sorted(self._groups))
            group = worker.barrier_group
            msg = f"worker.group: {group!r} is no group of this proxy; groups come with its file: {known}"
            raise ConfigError(msg)
        mistakes = list(conflicts(workers))
        if mistakes:
            raise ConfigError("\n".join(mistakes))
        self._making.reach(worker)
        members = join(self._groups[worker.barrier_group].roster, worker)
        self._is_now(workers)
        self.by_admin |= {worker.label}
        return members

    def drain(self, name: str) -> list[Member]:
        """Have a worker take no new requests; raises UnknownWorkerError."""
        group, members = self.find(name)
        return [group.drain(member.key) for member in members]

    def resume(self, name: str) -> list[Member]:
        """Have a worker that drains take requests again; raises UnknownWorkerError or RefusedError."""
        group, members = self.find(name)
        try:
            return [group.resume(member.key) for member in members]
        except RosterError as error:
            raise RefusedError(str(error)) from error

    def remove(self, name: str) -> list[Member]:
        """Have a worker go with its last request; raises UnknownWorkerError, RefusedError for the last."""
        group, members = self.find(name)
        if all(member.leaves for member in members):
            return members
        others = [worker for worker in self.config.worker if worker.label != name]
        if len(others) == len(self.config.worker):
            msg = f"{name} is a part of a worker, which can only be removed as a whole: drain it instead"
            raise RefusedError(msg)
        if not any(worker.barrier_group == group.name for worker in others):
            msg = f"worker {name} is the last of group {group.name}: add another one first, or drain it"
            raise RefusedError(msg)
        self._is_now(others)
        self.by_admin -= {name}
        for member in members:
            group.remove(member.key)
        return members

    def find(self, name: str) -> tuple[Group, list[Member]]:
        """Return the members of a worker, or the one called ``name``, also one that leaves; and their group.

        Raises UnknownWorkerError, and RefusedError for a worker whose group leaves.
        """
        keys = {seat.key for worker in self.config.worker if worker.label == name for seat in worker.seats}
        for group in self._groups.values():
            members = [member for member in group.roster.members if member.key in (keys or {name})]
            if members:
                return group, members
        for group in self._fleet.groups:
            if any(member.key == name for member in group.roster.members):
                msg = f"worker {name} goes with its group {group.name}, whose last requests it serves"
                raise RefusedError(msg)
        msg = f"there is no worker {name}"
        raise UnknownWorkerError(msg)

    def _as_it_runs(self) -> Config:
        return self.config.model_copy(update={"worker": self.running()})

    def _follow(self, changes: Plan, source: str) -> Plan:
        """Go the way of ``changes``; raises ConfigError where it cannot be gone."""
        if changes.config is None:
            raise ConfigError("\n".join(f"{source}: {reason}" for reason in changes.refused))
        self.config = changes.config
        if changes.changed:
            self._making.settle(changes.config)
        # Who is in a group that is made anew stays drained, too.
        drained = {
            (group.of, member.key)
            for group in self._groups.values()
            for member in group.roster.members
            if member.state is MemberState.DRAINING and not member.leaves
        }
        made = {step.name for step in changes.groups if self._make_group(step)}
        for step in changes.steps:
            self._make(step)
            place = step.worker.group, step.seat.key
            if place[0] in made and place in drained:
                self._groups[step.worker.barrier_group].drain(step.seat.key)
        self._making.forget(changes.workers)
        return changes

    def _make_group(self, step: GroupStep) -> bool:
        """Make one change of a group; return whether it is made anew."""
        if step.kind is GroupKind.MODELS:
            for group in self._groups.values():
                if group.of == step.name:
                    self._fleet.set_models(group, step.workers[0].models)
            return False
        if step.kind is not GroupKind.ADDED:
            # Also the half that the new one has not.
            old = [group for group in self._groups.values() if group.of == step.name]
            self._making.end(old)
            for group in old:
                self._groups = {name: each for name, each in self._groups.items() if each is not group}
        if step.kind is not GroupKind.REMOVED:
            made = self._making.begin(self.config, step.workers)
            self._groups |= {group.name: group for group in made}
        return step.kind is GroupKind.REPLACED

    def _make(self, step: Step) -> None:
        worker, key, group = step.worker, step.seat.key, self._groups[step.worker.barrier_group]
        if step.kind in {Kind.ADDED, Kind.REPLACED, Kind.REACHED}:
            self._making.reach(worker)
        if step.kind is Kind.ADDED:
            _seat(group.roster, worker, step.seat)
        elif step.kind is Kind.LIMITS:
            group.set_limits(key, _limits_beside(worker, group.roster.find(key).limits))
        elif step.kind is Kind.REMOVED:
            group.remove(key)
        elif step.kind is Kind.REPLACED:
            was_drained = group.roster.find(key).state is MemberState.DRAINING
            group.remove(key)
            _seat(group.roster, worker, step.seat)
            if was_drained:
                group.drain(key)

    def _is_now(self, workers: Sequence[Worker]) -> None:
        self.config = self.config.model_copy(update={"worker": list(workers)})


def _as_held(worker: Worker, there: Mapping[tuple[str, str], Member]) -> Worker:
    """Return ``worker`` with the KV capacity that its engine has told since, of its smallest rank."""
    found = [
        member.limits.kv_capacity_tokens
        for seat in worker.seats
        if (member := there.get((worker.barrier_group, seat.key))) is not None
        and member.limits.capacity_is_found
    ]
    known = [kv_tokens for kv_tokens in found if kv_tokens is not None]
    if not known or "kv_capacity_tokens" in worker.model_fields_set:
        return worker
    heard = worker.heard._replace(found=worker.heard.found | {"kv_capacity_tokens"})
    return worker.holding(heard, kv_capacity_tokens=min(known))


def _limits_beside(worker: Worker, before: WorkerLimits) -> WorkerLimits:
    """Return the limits of a worker that stays: what it was seen to run at once is known still."""
    limits = limits_of(worker)
    if limits.slots_are_assumed and before.slots_are_assumed:
        return replace(limits, slots=max(limits.slots, before.slots))
    return limits


def _seat(roster: Roster, worker: Worker, seat: Seat) -> Member:
    return roster.add(seat.key, limits_of(worker), worker.url, seat.lines, seat.rank)
