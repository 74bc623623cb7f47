"""What drives a group's dispatcher in the proxy: arrivals, a tick, and the futures that handlers wait on.

The dispatcher decides; the driver only says when. With an empty pool an arrival is decided at once. While
anything waits, a tick every ``tick_s`` runs one decision round over all of it, so that a burst is one round.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from brproxy.clock import Clock
from brproxy.fleet import Group
from brproxy.ledger import Entry
from brproxy.lifecycle import TERMINAL, Event, State
from brproxy.relay.errors import ClientGoneError
from brproxy.types import BrproxyError, PendingRequest, RequestId, WorkerIndex


class WaitExpiredError(BrproxyError):
    """A request waited in the pool for longer than the limit."""


class GroupDriver:
    """Runs one group's dispatcher on the event loop.

    ``on_round(duration_s, admitted)`` and ``on_end(entry)`` are told about each decision round that admitted
    something and each request that ends; they must not block.
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
        self._tick_s = tick_s
        self._on_round = on_round
        self._on_end = on_end
        self._waiters: dict[RequestId, asyncio.Future[WorkerIndex]] = {}
        self._tick: asyncio.TimerHandle | None = None
        self._growth: list[Callable[[], None]] = []

    def admit(self, request: PendingRequest) -> Lease:
        """Put a request into the pool; raises PoolFullError or PromptTooLongError."""
        request_id = self._dispatcher.arrive(request, self.clock.now_s())
        return Lease(self, self._dispatcher.ledger.entry(request_id))

    def decide_now(self) -> None:
        """Decide at once if nobody waits for a tick."""
        if self._tick is None:
            self._run_round()

    async def wait(self, entry: Entry) -> WorkerIndex:
        """Wait until ``entry``, which a tick is going to look at, is bound; raises WaitExpiredError."""
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
                book()

    def retry(self, entry: Entry) -> None:
        """Take ``entry`` away from the worker that failed it; the next ``wait`` gives it another."""
        self._dispatcher.ledger.retry(entry.id, self.clock.now_s())

    def end(self, entry: Entry, event: Event) -> None:
        """End a request; what it held goes to those that wait, on the next tick."""
        self._dispatcher.end(entry.id, event)
        self._on_end(entry)

    def close(self) -> None:
        """Stop ticking; whatever still waits is left to its handlers."""
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None

    def _run_round(self) -> None:
        """Decide, wake those that were bound or have waited too long, and tick again while any wait."""
        self.catch_up()
        now_s = self.clock.now_s()
        started_s = time.perf_counter()
        assignments = self._dispatcher.decide(now_s, self.group.health.routable())
        if assignments:
            self._on_round(time.perf_counter() - started_s, len(assignments))
        if self._waiters:
            for assignment in assignments:
                self._wake(assignment.request_id, assignment.worker)
        if not self._dispatcher.ledger.pending:
            self._tick = None
            return
        for request_id in self._dispatcher.expired(now_s):
            entry = self._dispatcher.ledger.entry(request_id)
            self.end(entry, Event.EXPIRE)
            self._wake(request_id, None)
        # Also when all have expired: whoever is about to wait relies on the tick.
        self._tick = asyncio.get_running_loop().call_later(self._tick_s, self._run_round)

    def _wake(self, request_id: RequestId, worker: WorkerIndex | None) -> None:
        # A waiter may be gone or cancelled already: its handler is about to end the request itself.
        waiter = self._waiters.get(request_id)
        if waiter is None or waiter.done():
            return
        if worker is None:
            limit_s = self._dispatcher.limits.wait_s_max
            waiter.set_exception(
                WaitExpiredError(f"no worker had a free slot and KV room within {limit_s:g} s")
            )
        else:
            waiter.set_result(worker)


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
        """Wait for a worker; raises WaitExpiredError."""
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
