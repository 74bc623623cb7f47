"""What is deployed, and what is to be: the changes between two configurations, and making them. Pure.

A worker is who has its name in its group. Its limits change in place; whatever else of it changes makes it
another worker, which comes as the one before leaves, with what that has begun. Groups are made at start.

The configuration's file wins for the workers that it names, but it does not know who is drained: who was
drained stays so until resumed. A worker that the admin API has added stays until that removes it, or the file
names it; one that it has removed comes back with a file that still names it. The plan says all of this.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from pydantic import BaseModel

from brproxy.config import Config
from brproxy.config_workers import Seat, Worker, common, disagreements
from brproxy.fleet import Fleet, Group
from brproxy.roster import Member, MemberState, Roster, RosterError, WorkerLimits
from brproxy.types import BrproxyError
from brproxy.validation import ConfigError

_NUMBERED = re.compile(r"worker\[(\d+)\]")
_NOT_OF_ITS_OWN = frozenset({"name", "model", "engine"})
"""Keys of a worker that are its group's; and a name that is spelt out now is the same name."""


_OF_ITS_CONNECTIONS = frozenset({"headers", "ca_file", "client_certificate_file", "client_key_file"})
"""Keys that are read when a URL is first connected to."""


class UnknownWorkerError(BrproxyError):
    """There is no worker of that name."""


class RefusedError(BrproxyError):
    """What was asked of a worker cannot be done as things are."""


class Kind(Enum):
    """What happens to a worker; in this order, so that the new are there before the old leave."""

    ADDED = "added"
    REPLACED = "replaced"
    LIMITS = "limits changed"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class Step:
    """One change, of one member; ``worker`` is as it is to be, or as it was if it is removed.

    ``keys`` of it changed.
    """

    kind: Kind
    worker: Worker
    seat: Seat
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the change in a few words, for the log."""
        changed = f" ({', '.join(self.keys)})" if self.keys else ""
        return f"{self.kind.value} {self.seat.key} [{self.worker.barrier_group}]{changed}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The way from one configuration to the next.

    ``refused`` says, a line each, why it cannot be gone: then there are no steps. ``restart`` are the keys
    that changed and are read at start only, ``kept`` the workers that stay although the file does not name
    them, as the admin API has added them; ``workers`` are all that there are then.
    """

    steps: tuple[Step, ...] = ()
    restart: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    workers: tuple[Worker, ...] = ()

    def __str__(self) -> str:
        """Return what changes in one line."""
        parts = [", ".join(map(str, self.steps)) or "no worker changes"]
        if self.kept:
            parts.append(f"added by the admin API and kept: {', '.join(self.kept)}")
        if self.restart:
            parts.append(f"needs a restart: {', '.join(self.restart)}")
        return "; ".join(parts)


def plan(old: Config, new: Config, by_admin: frozenset[str] = frozenset()) -> Plan:
    """Return what leads from ``old``, which runs, to ``new``; ``by_admin`` are not the file's to remove."""
    named = {worker.label for worker in new.worker}
    kept = [worker for worker in old.worker if worker.label in by_admin - named]
    wanted = [*new.worker, *kept]
    refused = (*_group_changes(old.worker, wanted), *_conflicts(wanted))
    if refused:
        return Plan(refused=refused)
    before, after = _by_member(old.worker), _by_member(wanted)
    steps = [
        step
        for key, (worker, seat) in after.items()
        if (step := _step(before.get(key), worker, seat)) is not None
    ]
    steps += [Step(Kind.REMOVED, *gone) for key, gone in before.items() if key not in after]
    order = list(Kind)
    return Plan(
        tuple(sorted(steps, key=lambda step: order.index(step.kind))),
        (*_changed_keys(old, new), *_changed_reaches(old.worker, wanted)),
        tuple(worker.label for worker in kept),
        workers=tuple(wanted),
    )


def join(roster: Roster, worker: Worker) -> list[Member]:
    """Add ``worker`` to the roster of its group; raises InvalidInputError for a name that is taken."""
    return [_seat(roster, worker, seat) for seat in worker.seats]


class Deployment:
    """What runs: ``fleet``, with the workers that ``config`` names and those that the admin API has added.

    ``reach`` is told of each worker that is about to be added, and notes how it is reached.
    """

    def __init__(self, config: Config, fleet: Fleet, reach: Callable[[Worker], None]) -> None:
        self.config = config
        self._reach = reach
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
        there = {(group.name, m.key): m for group in self._groups.values() for m in group.roster.members}
        return [_as_held(worker, there) for worker in self.config.worker]

    def add(self, worker: Worker) -> list[Member]:
        """Add a worker to a group that is there; raises ConfigError, a line for each reason."""
        workers = (*self.config.worker, worker)
        if worker.barrier_group not in self._groups:
            known = ", ".join(sorted(self._groups))
            group = worker.barrier_group
            msg = f"worker.group: {group!r} is no group of this proxy; groups are made at start: {known}"
            raise ConfigError(msg)
        mistakes = list(_conflicts(workers))
        if mistakes:
            raise ConfigError("\n".join(mistakes))
        self._reach(worker)
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

        Raises UnknownWorkerError.
        """
        keys = {seat.key for worker in self.config.worker if worker.label == name for seat in worker.seats}
        for group in self._groups.values():
            members = [member for member in group.roster.members if member.key in (keys or {name})]
            if members:
                return group, members
        msg = f"there is no worker {name}"
        raise UnknownWorkerError(msg)

    def _as_it_runs(self) -> Config:
        return self.config.model_copy(update={"worker": self.running()})

    def _follow(self, changes: Plan, source: str) -> Plan:
        """Go the way of ``changes``; raises ConfigError where it cannot be gone."""
        if changes.refused:
            raise ConfigError("\n".join(f"{source}: {reason}" for reason in changes.refused))
        for step in changes.steps:
            self._make(step)
        self._is_now(changes.workers)
        return changes

    def _make(self, step: Step) -> None:
        worker, key, group = step.worker, step.seat.key, self._groups[step.worker.barrier_group]
        if step.kind in {Kind.ADDED, Kind.REPLACED}:
            self._reach(worker)
        if step.kind is Kind.ADDED:
            _seat(group.roster, worker, step.seat)
        elif step.kind is Kind.LIMITS:
            group.set_limits(key, _limits_beside(worker, group.roster.find(key).limits))
        elif step.kind is Kind.REMOVED:
            group.remove(key)
        else:
            was_drained = group.roster.find(key).state is MemberState.DRAINING
            group.remove(key)
            _seat(group.roster, worker, step.seat)
            if was_drained:
                group.drain(key)

    def _is_now(self, workers: Sequence[Worker]) -> None:
        # What is read at start only stays as it was: that it differs is said with each plan.
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


def _limits(worker: Worker) -> WorkerLimits:
    capacity = worker.kv_capacity_tokens
    is_found = capacity is not None and "kv_capacity_tokens" not in worker.model_fields_set
    is_assumed = "slots" not in worker.model_fields_set | worker.heard.found
    return WorkerLimits(worker.slots, capacity, is_found, is_assumed)


def _limits_beside(worker: Worker, before: WorkerLimits) -> WorkerLimits:
    """Return the limits of a worker that stays: what it was seen to run at once is known still."""
    limits = _limits(worker)
    if limits.slots_are_assumed and before.slots_are_assumed:
        return replace(limits, slots=max(limits.slots, before.slots))
    return limits


def _seat(roster: Roster, worker: Worker, seat: Seat) -> Member:
    return roster.add(seat.key, _limits(worker), worker.url, seat.lines, seat.rank)


def _by_member(workers: Iterable[Worker]) -> dict[tuple[str, str], tuple[Worker, Seat]]:
    """Return each member's worker and seat, by group and name."""
    return {(worker.barrier_group, seat.key): (worker, seat) for worker in workers for seat in worker.seats}


def _step(before: tuple[Worker, Seat] | None, worker: Worker, seat: Seat) -> Step | None:
    """Return what makes ``before`` (None: it is not there) into ``worker``, None if nothing need be done."""
    if before is None:
        return Step(Kind.ADDED, worker, seat)
    old, old_seat = before
    keys = tuple(key for key in _changed_keys(old, worker) if key not in _NOT_OF_ITS_OWN)
    if (old.url, old_seat.lines) != (worker.url, seat.lines):
        return Step(Kind.REPLACED, worker, seat, keys)
    return Step(Kind.LIMITS, worker, seat, keys) if _limits(old) != _limits(worker) else None


def _changed_keys(old: BaseModel, new: BaseModel, prefix: str = "") -> Iterator[str]:
    """Yield the keys, as the file has them, whose values differ; but for the list of workers."""
    for name, field in type(old).model_fields.items():
        key = prefix + (field.alias or name)
        before, after = getattr(old, name), getattr(new, name)
        if before == after or key == "worker":
            continue
        if isinstance(before, BaseModel):
            yield from _changed_keys(before, after, f"{key}.")
        else:
            yield key


def _changed_reaches(old: Sequence[Worker], wanted: Sequence[Worker]) -> Iterator[str]:
    """Yield the keys of workers that stay where they are which their connections were made with."""
    before = {(worker.barrier_group, worker.label, worker.url): worker for worker in old}
    for worker in wanted:
        was = before.get((worker.barrier_group, worker.label, worker.url))
        if was is not None:
            for key in sorted(_OF_ITS_CONNECTIONS & set(_changed_keys(was, worker))):
                yield f"worker {worker.label}: {key}"


def _group_changes(old: Sequence[Worker], wanted: Sequence[Worker]) -> Iterator[str]:
    """Yield what is to become of groups that can only be had by a restart."""
    before = {worker.barrier_group: worker for worker in old}
    after = {worker.barrier_group: worker for worker in wanted}
    for name, worker in after.items():
        first = before.get(name)
        if first is None:
            yield f"group {name!r} is new, which needs a restart; nothing was changed"
        elif common(first) != common(worker):
            what = "another model, engine or transfer"
            yield f"group {name!r} has {what}, which needs a restart; nothing was changed"
    for name in sorted(before.keys() - after.keys()):
        yield f"group {name!r} is gone, which needs a restart; nothing was changed"


def _conflicts(workers: Sequence[Worker]) -> Iterator[str]:
    """Yield what is wrong with workers of the admin API beside the file's, which agree by themselves."""
    for found in disagreements(workers):
        if not found.keys:
            yield found.text
            continue
        position, *keys = found.keys
        label = workers[int(position)].label
        # Nobody knows the workers by their numbers here.
        text = _NUMBERED.sub(lambda number: f"worker {workers[int(number[1])].label}", found.text)
        yield f"worker {label}{''.join(f'.{key}' for key in keys)}: {text}"
