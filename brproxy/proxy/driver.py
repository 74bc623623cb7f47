"""What drives a group's dispatcher in the proxy: arrivals, a tick, and the futures that handlers wait on.

The dispatcher decides; the driver only says when. With an empty pool an arrival is decided at once. While
anything waits, a tick every ``tick_s`` runs one decision round over all of it, so that a burst is one round.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import ParamSpec, Self

from brproxy.clock import Clock
from brproxy.fleet import Group
from brproxy.ledger import Entry
from brproxy.lifecycle import TERMINAL, Event, LifecycleError, State
from brproxy.relay.errors import ClientGoneError
from brproxy.rounds import Rounds
from brproxy.types import BrproxyError, PendingRequest, RequestId, WorkerIndex

P = ParamSpec("P")


class WaitExpiredError(BrproxyError):
    """A request waited in the pool for longer than the limit."""


class DecisionFailedError(BrproxyError):
    """No decision can be made on a request: the fault is the proxy's own."""


class GroupDriver:
    """Runs one group's dispatcher on the event loop.

    ``on_round(duration_s, admitted)`` and ``on_end(entry)`` are told about each decision round that admitted
    something and each request that ends; they must not block. What they, the dispatcher or those who book
    raise is noted as a fault of the group and stops nothing: as long as anything waits, a round is due.
    """

    def __init__(
        self,
        group: Group,
        clock: Clock,
        tick_s: float,
        on_round: Callable[[float, int], None],
        on_end: Callable[[Entry], None],
    ) -> None:
        self.group = group
        self.clock = clock
        self._dispatcher = group.dispatcher
        self._faults = group.dispatcher.faults
        self._rounds = Rounds(tick_s)
        self._on_round = on_round
        self._on_end = on_end
        self._waiters: dict[RequestId, asyncio.Future[WorkerIndex]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._growth: list[Callable[[], None]] = []

    def admit(self, request: PendingRequest) -> Lease:
        """Put a request into the pool; raises PoolFullError or PromptTooLongError."""
        request_id = self._dispatcher.arrive(request, self.clock.now_s())
        return Lease(self, self._dispatcher.ledger.entry(request_id))

    def decide_now(self) -> None:
        """Decide at once if nobody waits for the next round but who has just come."""
        if self._rounds.due_s is None or self._dispatcher.ledger.pending == 1:
            self._run_round()

    async def wait(self, entry: Entry) -> WorkerIndex:
        """Wait until ``entry`` is bound; raises WaitExpiredError or DecisionFailedError."""
        if entry.state is not State.PENDING:
            return self._outcome(entry)
        waiter: asyncio.Future[WorkerIndex] = asyncio.get_running_loop().create_future()
        self._waiters[entry.id] = waiter
        try:
            return await waiter
        finally:
            del self._waiters[entry.id]

    def book_later(self, book: Callable[[], None]) -> None:
        """Have ``book`` called before anybody looks at the load; once for each call of this."""
        self._growth.append(book)

    def catch_up(self) -> None:
        """Book what has streamed since the last time: after that the ledger's loads are exact."""
        growth = self._growth
        if growth:
            self._growth = []
            for book in growth:
                try:
                    book()
                except Exception as error:  # noqa: BLE001 - one stream's mistake is not the others'
                    self._faults.note("booking", error)

    def retry(self, entry: Entry) -> None:
        """Take ``entry`` away from the worker that failed it; the next round gives it another."""
        now_s = self.clock.now_s()
        self._dispatcher.ledger.retry(entry.id, now_s)
        # Its handler may take its time before it asks.
        if self._rounds.due_s is None:
            self._go_on(now_s)

    def end(self, entry: Entry, event: Event) -> None:
        """End a request; what it held goes to those that wait, on the next tick."""
        self._dispatcher.end(entry.id, event)
        self._tell(self._on_end, entry)

    def is_stuck(self) -> bool:
        """Tell whether requests wait for a round that does not come."""
        return self._rounds.is_stuck(self.clock.now_s(), self._dispatcher.ledger.waiting_since_s)

    def look_after(self) -> None:
        """Book what has streamed, and run a round if requests wait for one in vain: for a periodic look."""
        self.catch_up()
        if self.is_stuck():
            self._faults.note("round", DecisionFailedError("requests waited, and no round was due"))
            self.close()
            self._run_round()

    def close(self) -> None:
        """Stop ticking; whatever still waits is left to its handlers."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._rounds.stopped()

    def _run_round(self) -> None:
        """Run one round, and have another one while any wait: whatever happens in this one."""
        now_s = self.clock.now_s()
        try:
            self._round(now_s)
        except Exception as error:  # noqa: BLE001 - a round that fails must not be the last
            self._faults.note("round", error)
            self._wake_decided()
        self._go_on(now_s)

    def _go_on(self, now_s: float) -> None:
        """Have the next round come, if any request waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        delay_s = self._rounds.next_after(now_s, self._dispatcher.ledger.pending)
        if delay_s is not None:
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._run_round)

    def _round(self, now_s: float) -> None:
        """Decide, and wake those that were bound, cannot be decided or have waited too long."""
        self.catch_up()
        dispatcher = self._dispatcher
        started_s = time.perf_counter()
        assignments = dispatcher.decide(now_s, self.group.health.routable())
        if self._waiters:
            for assignment in assignments:
                self._wake(dispatcher.ledger.entry(assignment.request_id))
        if assignments:
            self._tell(self._on_round, time.perf_counter() - started_s, len(assignments))
        if dispatcher.undecidable:
            self._end_waiting(dispatcher.undecidable, Event.FAIL)
        if dispatcher.ledger.pending:
            self._end_waiting(dispatcher.expired(now_s), Event.EXPIRE)

    def _tell(self, observer: Callable[P, None], *what: P.args, **named: P.kwargs) -> None:
        try:
            observer(*what, **named)
        except Exception as error:  # noqa: BLE001 - who looks on takes nothing with it
            self._faults.note("observer", error)

    def _end_waiting(self, request_ids: Iterable[RequestId], event: Event) -> None:
        for request_id in request_ids:
            entry = self._dispatcher.ledger.entry(request_id)
            self.end(entry, event)
            self._wake(entry)

    def _wake_decided(self) -> None:
        """Wake whoever a round that failed has decided on already."""
        for request_id in list(self._waiters):
            with suppress(LifecycleError):
                entry = self._dispatcher.ledger.entry(request_id)
                if entry.state is not State.PENDING:
                    self._wake(entry)

    def _wake(self, entry: Entry) -> None:
        # A waiter may be gone or cancelled already: its handler is about to end the request itself.
        waiter = self._waiters.get(entry.id)
        if waiter is None or waiter.done():
            return
        try:
            waiter.set_result(self._outcome(entry))
        except BrproxyError as error:
            waiter.set_exception(error)

    def _outcome(self, entry: Entry) -> WorkerIndex:
        """Return the worker of a request that no longer waits; raises what it ended by."""
        if entry.state not in TERMINAL:
            return entry.worker
        if entry.state is State.EXPIRED:
            limit_s = self._dispatcher.limits.wait_s_max
            msg = f"no worker had a free slot and KV room within {limit_s:g} s"
            raise WaitExpiredError(msg)
        msg = "no worker could be chosen for the request"
        raise DecisionFailedError(msg)


class Lease:
    """One request's place in its group: a context manager that returns its load on every path.

    Leaving the block normally is FINISH, or FAIL after ``fail()``; a cancelled handler or a client that has
    left is CANCEL; any other exception is FAIL. A request that expired while it waited has ended already.
    """

    __slots__ = ("_driver", "_ledger", "_outcome", "entry")

    def __init__(self, driver: GroupDriver, entry: Entry) -> None:
        self._driver = driver
        self._ledger = driver.group.dispatcher.ledger
        self._outcome = Event.FINISH
        self.entry = entry

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.entry.state in TERMINAL:
            return
        self._driver.catch_up()
        if exc_type is None:
            # A handler can only leave before a worker was found by failing.
            event = Event.FAIL if self.entry.state is State.PENDING else self._outcome
        else:
            gone = issubclass(exc_type, asyncio.CancelledError | ClientGoneError)
            event = Event.CANCEL if gone else Event.FAIL
        self._driver.end(self.entry, event)

    def worker_now(self) -> WorkerIndex | None:
        """Return a worker if one can be had at once, else None: then wait for one."""
        entry = self.entry
        self._driver.decide_now()
        return entry.worker if entry.state is State.PREFILL else None

    async def worker(self) -> WorkerIndex:
        """Wait for a worker; raises WaitExpiredError or DecisionFailedError."""
        return await self._driver.wait(self.entry)

    def has_others(self) -> bool:
        """Tell whether a worker may be chosen that has not failed this request; its own has, if it asks."""
        tried = self.entry.avoid | {self.entry.worker}
        return any(ok and g not in tried for g, ok in enumerate(self._driver.group.health.routable()))

    def retry(self) -> None:
        """Give the worker back: it failed before the client saw anything."""
        self._driver.catch_up()
        self._driver.retry(self.entry)

    def fail(self) -> None:
        """Have the request end as FAILED, although its handler leaves in good order."""
        self._outcome = Event.FAIL

    def tokens(self, tokens: int) -> None:
        """Book ``tokens`` more output tokens, fewer than zero to take back."""
        self._ledger.grow(self.entry.id, tokens)

    def book_later(self, book: Callable[[], None]) -> None:
        """Have ``book`` called before anybody looks at the load."""
        self._driver.book_later(book)

    def first_token(self) -> None:
        """Note that prefill is over; later calls do nothing."""
        if self.entry.state is State.PREFILL:
            self._ledger.first_token(self.entry.id, self._driver.clock.now_s())

    def correct_prompt(self, prompt_tokens: int) -> None:
        """Replace the prompt estimate by what the worker reports."""
        self._ledger.correct_prompt(self.entry.id, prompt_tokens)
