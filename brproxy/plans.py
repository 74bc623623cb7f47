"""What leads from one configuration to the next, step by step. Pure.

A worker is who has its name in its group. Its limits and how it is reached change in place; whatever else of
it changes makes it another worker, which comes as the one before leaves, with what that has begun. A group is
its name and what it was made of: its engine, and how prefill is apart. Another model is the same group's.

The configuration's file wins for the workers that it names, but it does not know who is drained: who was
drained stays so until resumed. A worker that the admin API has added stays until that removes it, or the file
names it; one that it has removed comes back with a file that still names it. The plan says all of this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from pydantic import BaseModel

from brproxy.config import Config
from brproxy.config_workers import Seat, Worker, disagreements
from brproxy.roster import WorkerLimits

_Model = TypeVar("_Model", bound=BaseModel)

_NUMBERED = re.compile(r"worker\[(\d+)\]")
_NOT_OF_ITS_OWN = frozenset({"name", "model", "engine"})
"""Keys of a worker that are its group's; and a name that is spelt out now is the same name."""

_OF_ITS_CONNECTIONS = frozenset(
    {"headers", "ca_file", "client_certificate_file", "client_key_file", "bootstrap_port"}
)
"""Keys that say how a worker is reached, besides its URL."""

_LIVE = (
    *("routing.policy", "routing.prefill_policy", "routing.tick_ms"),
    *("limits.pool_requests_max", "limits.pool_wait_s_max", "limits.kv_growth_share"),
    *("limits.retries_max", "limits.retry_after_s"),
    *("limits.failovers_max", "limits.kept_text_bytes_max", "limits.event_bytes_max"),
    "limits.response_parse_bytes_max",
    *("timeouts.first_byte_s", "timeouts.paused_s_max", "timeouts.gone_s", "timeouts.keepalive_comments_s"),
    *("timeouts.retry_wait_s", "timeouts.retry_wait_s_max", "timeouts.client_stall_s"),
    "prefill_decode.",
    *("health.path", "health.interval_s", "health.timeout_s"),
    *("telemetry.interval_s", "telemetry.timeout_s"),
)
"""Keys that what runs takes up; those that end with a dot are whole tables. All others are read at start."""

_LIVE_TABLES = tuple(name for name in _LIVE if name.endswith("."))
_POLICY_TABLE = re.compile(r"routing\.[^.]+\.")


def is_live(key: str) -> bool:
    """Tell whether a change of ``key`` is taken up by what runs."""
    return key in _LIVE or key.startswith(_LIVE_TABLES) or _POLICY_TABLE.match(key) is not None


class Kind(Enum):
    """What happens to a worker; in this order, so that the new are there before the old leave."""

    ADDED = "added"
    REPLACED = "replaced"
    REACHED = "reached otherwise"
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


class GroupKind(Enum):
    """What happens to a group: to its own workers and to those that prefill for it."""

    ADDED = "added"
    REPLACED = "replaced"
    MODELS = "models changed"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class GroupStep:
    """One change of the group called ``name``; ``workers`` as they are to be, or were if it is removed.

    The members of one that is added or replaced are added by steps of their own; those of one that is
    removed, and of the one that was there before, stay until it has none of its requests left.
    """

    kind: GroupKind
    name: str
    workers: tuple[Worker, ...]

    def __str__(self) -> str:
        """Return the change in a few words, for the log."""
        return f"{self.kind.value} group {self.name}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The way from one configuration to the next.

    ``refused`` says, a line each, why it cannot be gone: then there are no steps. ``changed`` are the keys
    that what runs takes up, ``restart`` those that are read at start only, ``kept`` the workers that stay
    although the file does not name them, as the admin API has added them; ``workers`` are all that there are
    then, and ``config`` is what runs then.
    """

    steps: tuple[Step, ...] = ()
    restart: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    workers: tuple[Worker, ...] = ()
    groups: tuple[GroupStep, ...] = ()
    changed: tuple[str, ...] = ()
    config: Config | None = None

    def __str__(self) -> str:
        """Return what changes in one line."""
        parts = [", ".join(map(str, (*self.groups, *self.steps))) or "no worker changes"]
        if self.changed:
            parts.append(f"taken up: {', '.join(self.changed)}")
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
    refused = tuple(conflicts(wanted))
    if refused:
        return Plan(refused=refused)
    groups = tuple(_group_steps(by_group(old.worker), by_group(wanted)))
    ended = {step.name for step in groups if step.kind in {GroupKind.REMOVED, GroupKind.REPLACED}}
    before = _by_member(worker for worker in old.worker if worker.group not in ended)
    after = _by_member(wanted)
    steps = [step for key, place in after.items() for step in _steps(before.get(key), *place)]
    steps += [Step(Kind.REMOVED, *gone) for key, gone in before.items() if key not in after]
    order, changed = list(Kind), tuple(_changed_keys(old, new))
    return Plan(
        tuple(sorted(steps, key=lambda step: order.index(step.kind))),
        tuple(key for key in changed if not is_live(key)),
        tuple(worker.label for worker in kept),
        workers=tuple(wanted),
        groups=groups,
        changed=tuple(filter(is_live, changed)),
        config=_in_force(old, new).model_copy(update={"worker": wanted}),
    )


def by_group(workers: Iterable[Worker]) -> dict[str, tuple[Worker, ...]]:
    """Return the workers of each group, those that prefill for it included."""
    groups: dict[str, tuple[Worker, ...]] = {}
    for worker in workers:
        groups[worker.group] = (*groups.get(worker.group, ()), worker)
    return groups


def limits_of(worker: Worker) -> WorkerLimits:
    """Return what each member of ``worker`` holds."""
    capacity = worker.kv_capacity_tokens
    is_found = capacity is not None and "kv_capacity_tokens" not in worker.model_fields_set
    is_assumed = "slots" not in worker.model_fields_set | worker.heard.found
    return WorkerLimits(worker.slots, capacity, is_found, is_assumed)


def conflicts(workers: Sequence[Worker]) -> Iterator[str]:
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


def made_of(workers: Sequence[Worker]) -> tuple[object, ...]:
    """Return what makes a group another one: its engine, whether prefill is apart, and how then."""
    prefills = any(worker.role == "prefill" for worker in workers)
    decodes = [worker.role for worker in workers if worker.role != "prefill"]
    return workers[0].engine, prefills and workers[0].handover, "decode" in decodes


def _group_steps(
    before: Mapping[str, tuple[Worker, ...]], after: Mapping[str, tuple[Worker, ...]]
) -> Iterator[GroupStep]:
    for name, workers in after.items():
        old = before.get(name)
        if old is None:
            yield GroupStep(GroupKind.ADDED, name, workers)
        elif made_of(old) != made_of(workers):
            yield GroupStep(GroupKind.REPLACED, name, workers)
        elif old[0].models != workers[0].models:
            yield GroupStep(GroupKind.MODELS, name, workers)
    for name, old in before.items():
        if name not in after:
            yield GroupStep(GroupKind.REMOVED, name, old)


def _by_member(workers: Iterable[Worker]) -> dict[tuple[str, str], tuple[Worker, Seat]]:
    """Return each member's worker and seat, by group and name."""
    return {(worker.barrier_group, seat.key): (worker, seat) for worker in workers for seat in worker.seats}


def _steps(before: tuple[Worker, Seat] | None, worker: Worker, seat: Seat) -> Iterator[Step]:
    """Yield what makes ``before`` (None: it is not there) into ``worker``."""
    if before is None:
        yield Step(Kind.ADDED, worker, seat)
        return
    old, old_seat = before
    keys = tuple(key for key in _changed_keys(old, worker) if key not in _NOT_OF_ITS_OWN)
    if (old.url, old_seat.lines) != (worker.url, seat.lines):
        yield Step(Kind.REPLACED, worker, seat, keys)
        return
    reached = tuple(key for key in keys if key in _OF_ITS_CONNECTIONS)
    if reached:
        yield Step(Kind.REACHED, worker, seat, reached)
    if limits_of(old) != limits_of(worker):
        yield Step(Kind.LIMITS, worker, seat, tuple(key for key in keys if key not in reached))


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


def _in_force(old: _Model, new: _Model, prefix: str = "") -> _Model:
    """Return ``new``, but with the values of ``old`` for the keys that are read at start only."""
    values = {}
    for name, field in type(old).model_fields.items():
        key = prefix + (field.alias or name)
        before, after = getattr(old, name), getattr(new, name)
        if isinstance(before, BaseModel) and before != after:
            values[name] = _in_force(before, after, f"{key}.")
        elif not is_live(key):
            values[name] = before
    return new.model_copy(update=values)
