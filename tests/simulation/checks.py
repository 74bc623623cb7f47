"""The promises, as checks: safety behind every event, liveness at the end. All that looks into the proxy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from brproxy.app import RunningProxy
from brproxy.happenings import Observer
from brproxy.lifecycle import Entry, Event
from brproxy.proxy.service import GroupService, Service
from brproxy.relay.states import State
from brproxy.roster import Change, Member, MemberState
from tests.simulation.loop import VirtualLoop
from tests.simulation.outside import ErrorLog
from tests.simulation.workers import SCRIPT

BUFFERED_BYTES_MAX = 400_000
"""What may wait for a client that does not read: a buffer that is full, and a read of a worker's bytes."""

PERIODIC_MAX = 8
"""Timers that a proxy without requests may have, for each worker and altogether."""

_UNUSED = frozenset({State.IDLE, State.CLOSED})

_CHANGES = ("bind", "first_token", "grow", "correct_prompt", "take_back", "end")
"""The methods of the ledger that change it."""


def _is_periodic(task: str) -> bool:
    """Tell whether a task is one of those that each member has for as long as it is there."""
    return "Prober._run" in task or "Poller._run" in task


class Violation(Exception):  # noqa: N818 - a promise that is broken, of the proxy and not of this code
    """``promise`` is the name of what was not held (see the package's docstring)."""

    def __init__(self, promise: str, what: str) -> None:
        super().__init__(f"{promise}: {what}")
        self.promise = promise


class GroupChecks(Observer):
    """The books and connections of one group."""

    def __init__(self, service: GroupService) -> None:
        self._service = service
        self._driver: Any = service.driver
        self._dispatcher: Any = service.group.dispatcher
        self._ledger: Any = service.group.dispatcher.ledger
        # Its keys are the endpoints, as they come and go.
        self._pools: Any = service._behind
        self._late_binding = self._dispatcher.policy.params.late_binding
        self._arrived = self._waited_most = 0
        self._ended: set[int] = set()
        self._twice: int | None = None
        self._changed = True
        # What a worker that was given fewer slots still has of before.
        self._of_before: dict[int, int] = {}
        self._watch()

    def _watch(self) -> None:
        """Note what arrives and ends, and when the books have to be looked at again."""
        self._dispatcher.happenings.tell(self)
        self._ledger.roster.observe(self._member_changed)
        for name in _CHANGES:
            setattr(self._ledger, name, self._noting(getattr(self._ledger, name)))

    def _member_changed(self, member: Member, change: Change) -> None:
        self._changed = True
        if change is Change.LIMITS:
            self._of_before[member.index] = self._ledger.requests[member.index]
        elif change is Change.ADDED:
            self._of_before.pop(member.index, None)

    def _noting(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments, **named):
            self._changed = True
            return change(*arguments, **named)

        return noted

    def arrived(self, entry: Entry) -> None:
        """See Observer.arrived."""
        self._changed = True
        self._arrived += 1
        if entry.sequences:
            # Those that a worker failed come back, whoever waits; others take no place.
            in_turn = sum(1 for _ in self._dispatcher.waiting.in_turn())
            self._waited_most = max(self._waited_most, in_turn)

    def ended(self, entry: Entry, event: Event, waited_s: float | None) -> None:
        """See Observer.ended."""
        self._changed = True
        if entry.id in self._ended:
            self._twice = entry.id
        self._ended.add(entry.id)

    def check(self, loop: VirtualLoop) -> None:
        """Raise Violation if the books are wrong, or somebody waits for nothing."""
        if self._changed:
            self._changed = False
            self._check_books()
            self._check_ends()
        timer = self._driver._timer
        if (timer is None or timer.cancelled()) and len(self._dispatcher.waiting):
            raise Violation(
                "round-due", f"{len(self._dispatcher.waiting)} wait, and no decision round is due"
            )
        for pool in self._pools:
            if pool._idle:
                self._check_pool(pool, pool._idle)

    def _check_ends(self) -> None:
        ledger = self._ledger
        if self._twice is not None:
            raise Violation("ends-once", f"request {self._twice} ended twice")
        here = len(ledger._entries) + len(self._dispatcher.waiting)
        if self._arrived != len(self._ended) + here:
            raise Violation("ends-once", f"{self._arrived} came, {len(self._ended)} ended, {here} are here")
        waiting = self._dispatcher.waiting
        placed = [entry.place for entry in waiting._places.values()]
        if placed != sorted(waiting._places) or len(placed) + len(waiting._first) != len(waiting):
            raise Violation("places", f"{len(waiting)} wait: {waiting!r} in {placed}")
        if self._waited_most > self._dispatcher.limits.requests_max:
            raise Violation("limits", f"{self._waited_most} wait")

    def _check_books(self) -> None:
        ledger = self._ledger
        rows, table = ledger._rows, ledger._table().tolist()
        if len(table) != len(rows):
            raise Violation("books", f"{len(table)} rows of numbers for {len(rows)} requests")
        columns = ledger.roster.columns
        load, requests, takers = [0] * columns, [0] * columns, [0] * columns
        prefill = [0] * columns
        for row, entry in enumerate(rows):
            request_id, worker, kv_tokens = table[row][:3]
            load[worker] += kv_tokens
            requests[worker] += 1
            takers[worker] += entry.sequences > 0
            prefill[worker] += entry.prompt_tokens if entry.first_token_s is None else 0
            if entry.row != row or entry.worker != worker or request_id != entry.id or kv_tokens < 0:
                raise Violation("books", f"row {row} is not that of {entry}")
        if load != ledger._kv_tokens or requests != ledger._requests:
            raise Violation("books", f"rows say {load} KV tokens, {requests} requests, the ledger {ledger!r}")
        if prefill != ledger._prefill_tokens:
            raise Violation("books", f"rows say {prefill} tokens to prefill, not {ledger._prefill_tokens}")
        for worker, most in self._of_before.items():
            self._of_before[worker] = min(most, takers[worker])
        most = [max(slots, self._of_before.get(g, 0)) for g, slots in enumerate(ledger._slots)]
        if self._late_binding and any(n > slots for n, slots in zip(takers, most, strict=True)):
            raise Violation("limits", f"{takers} requests in {ledger._slots} slots")

    @staticmethod
    def _check_pool(pool: Any, idle: Any) -> None:
        if len(idle) > pool._settings.idle_max:
            raise Violation("limits", f"{len(idle)} idle connections to {pool.origin}")
        if len(idle) > 1 and len(set(map(id, idle))) < len(idle):
            raise Violation("one-owner", f"a connection to {pool.origin} is idle twice")
        for connection in idle:
            if connection.state not in _UNUSED or connection._exchange is not None:
                raise Violation("one-owner", f"an idle connection to {pool.origin} is in use")

    def check_idle(self) -> None:
        """Raise Violation if anything of a request is left."""
        ledger, driver, waiting = self._ledger, self._driver, self._dispatcher.waiting
        if ledger.bound or len(waiting) or ledger._entries or any(ledger.kv_tokens) or any(ledger.requests):
            raise Violation("returns-to-zero", f"with no request in the proxy {ledger!r} {waiting!r}")
        left = {"waiters": len(driver._waiters), "bookings": len(driver._growth), "tick": driver._timer}
        if any(left.values()):
            raise Violation("returns-to-zero", f"with no request in the proxy {left}")

    def check_offsets(self) -> None:
        """Raise Violation if what workers held besides is seen after it has gone."""
        if any(self._ledger.offset):
            raise Violation("returns-to-zero", f"offsets {self._ledger.offset}")


class Checks:
    """All that is looked at from outside while a scenario runs."""

    def __init__(self, loop: VirtualLoop, errors: ErrorLog) -> None:
        self._loop = loop
        self._errors = errors
        self._groups: list[GroupChecks] = []
        self._wrong: Violation | None = None
        self._proxy: RunningProxy | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    def wrong(self, promise: str, what: str) -> None:
        """Note what a script has seen; the check behind this event raises it."""
        if self._wrong is None:
            self._wrong = Violation(promise, what)

    def follow(self, proxy: RunningProxy) -> None:
        """Check ``proxy``, which nobody has asked anything so far, behind every event from now on."""
        self._proxy = proxy
        self._groups = [GroupChecks(service) for service in proxy.service.groups.each()]
        proxy.service.groups.follow(self)
        self._tasks = {task for task in asyncio.all_tasks(self._loop) if not _is_periodic(str(task))}

    def group_came(self, service: GroupService) -> None:
        """Check a group that has come, too."""
        self._groups.append(GroupChecks(service))

    def group_gone(self, service: GroupService) -> None:
        """Go on to check one that has gone: nothing of it may come back."""

    def check(self) -> None:
        """Raise Violation; called behind every event."""
        if self._wrong is not None:
            raise self._wrong
        if self._loop.complaints or self._errors.said:
            self.complain()
        if self._proxy is not None:
            self._check_proxy(self._proxy)

    def _check_proxy(self, proxy: RunningProxy) -> None:
        for group in self._groups:
            group.check(self._loop)
        if self._loop.network.buffered_bytes_most > BUFFERED_BYTES_MAX:
            self._check_buffers(proxy.service)
        handlers: Any = proxy.handlers
        limit = proxy.service.limits.requests_max
        if not 0 <= handlers._requests <= limit:
            raise Violation("limits", f"{handlers._requests} requests of at most {limit}")
        room: Any = proxy.service.body_room
        if not 0 <= room.taken_bytes <= room._bytes_max:
            raise Violation("limits", f"bodies have {room.taken_bytes} bytes of {room._bytes_max}")

    def _check_buffers(self, service: Service) -> None:
        buffered, most = self._loop.network.buffered_bytes_most, BUFFERED_BYTES_MAX
        if service.limits.recomputed_max and any(one.handover for one in service.groups.values()):
            # A reply that its worker may give up is kept until it is whole, and then written at once.
            most += service.relay_limits.response_parse_bytes_max
        if buffered > most:
            raise Violation("bounded-buffers", f"{buffered} bytes wait for a client")

    def complain(self) -> None:
        """Raise what the loop or a log was told as an error."""
        said = [f"{c['message']}: {c.get('exception')!r}" for c in self._loop.complaints] + self._errors.said
        self._loop.complaints.clear()
        self._errors.said.clear()
        raise Violation("no-exception", "; ".join(said))

    def idle(self) -> None:
        """Raise Violation if anything of the requests, which have all ended, is left."""
        assert self._proxy is not None
        for group in self._groups:
            group.check_idle()
            group.check_offsets()
        handlers, watch = self._proxy.handlers, self._proxy.service.watch
        if handlers._requests or watch._watched:
            raise Violation(
                "returns-to-zero", f"{handlers._requests} requests, {len(watch._watched)} exchanges"
            )
        room = self._proxy.service.body_room
        if room.taken_bytes:
            raise Violation("returns-to-zero", f"bodies have {room.taken_bytes} bytes without a request")
        counting: Any = self._proxy.service.counting
        if counting is not None and (len(counting.counts) or counting._gate.in_flight or counting._tasks):
            raise Violation("returns-to-zero", f"{len(counting.counts)} prompts, {counting._tasks}")
        workers = sum(len(service.endpoints) for service in self._proxy.service.groups.values())
        groups = self._proxy.service.fleet.groups
        if any(group.leaves for group in groups):
            raise Violation("nothing-left", f"groups that were to go: {groups}")
        members = [one for group in groups for one in group.roster.members]
        if any(one.state is not MemberState.ACTIVE for one in members):
            raise Violation("nothing-left", f"members that were to go: {members}")
        tasks = self._tasks_since_start()
        # Members come and go, and each that is there is checked, and asked for its load.
        if len(tasks) > 2 * workers or not all(map(_is_periodic, tasks)):
            raise Violation("nothing-left", f"tasks: {tasks}")
        open_ = [t for t in self._loop.network.open if t.is_proxys]
        # Of each one that is checked, one that is asked for its load, and one that is kept.
        if any(t.is_clients for t in open_) or len(open_) > 3 * workers:
            raise Violation("nothing-left", f"connections: {open_}")
        timers = self._loop.timers()
        if len(timers) > PERIODIC_MAX + 4 * workers:
            raise Violation("nothing-left", f"timers: {timers}")

    def closed(self) -> None:
        """Raise Violation if anything is left of a proxy that was closed."""
        self._proxy = None
        for group in self._groups:
            group.check_idle()
        open_ = [transport for transport in self._loop.network.open if transport.is_proxys]
        self._tasks.clear()
        tasks = self._tasks_since_start()
        if open_ or tasks:
            raise Violation("nothing-left", f"after the end: {open_} {tasks}")

    def _tasks_since_start(self) -> list[str]:
        mine = asyncio.current_task()
        tasks = asyncio.all_tasks(self._loop) - self._tasks
        return sorted(str(task) for task in tasks if task is not mine and task.get_name() != SCRIPT)
