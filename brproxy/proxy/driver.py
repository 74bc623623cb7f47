"""What drives a group's rounds in the proxy: arrivals, a timer, and the futures that handlers wait on.

The dispatcher decides and ``rounds`` says when; here is the I/O. Where nobody waits an arrival is decided at
once. While anybody does, a round every ``tick_s`` decides over all of them, so that a burst is one round.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from brproxy.clock import Clock
from brproxy.fleet import Group
from brproxy.lifecycle import NOBODY, TERMINAL, Entry, Event, State
from brproxy.relay.errors import ClientGoneError
from brproxy.rounds import Rounds
from brproxy.types import BrproxyError, PendingRequest, RequestId, WorkerIndex

# As plain names: looking a member of an enumeration up costs more than comparing it.
_PENDING, _PREFILL, _FINISH = State.PENDING, State.PREFILL, Event.FINISH


class WaitExpiredError(BrproxyError):
    """A request waited for longer than the limit; ``reason`` says what for."""

    def __init__(self, reason: str, waited_s: float) -> None:
        super().__init__(f"{reason} within {waited_s:g} s")
        self.reason = reason


class NoWorkerError(WaitExpiredError):
    """A request waited for longer than the limit because no worker was healthy."""


class GroupGoneError(NoWorkerError):
    """A request is for a group that was removed while it waited."""

    def __init__(self, group: str) -> None:
        BrproxyError.__init__(self, f"the group {group} was removed")


class DecisionFailedError(BrproxyError):
    """No decision can be made on a request: the fault is the proxy's own."""


class GroupDriver:
    """Runs one group's rounds on the event loop: the timer, and the futures that handlers wait on.

    As long as any request waits a round is due, whatever rounds, observers or those who book raise.
    """

    def __init__(self, group: Group, clock: Clock, tick_s: float) -> None:
        self.group = group
        self.clock = clock
        self._dispatcher = group.dispatcher
        self._faults = group.dispatcher.faults
        self._rounds = Rounds(group.dispatcher, tick_s, clock.now_s)
        self._waiters: dict[RequestId, asyncio.Future[WorkerIndex]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._growth: list[Callable[[], None]] = []
        self._is_closed = False

    def admit(self, request: PendingRequest, avoid: frozenset[WorkerIndex] = NOBODY) -> Lease:
        """Put a request into the pool; raises PoolFullError, PromptTooLongError or GroupGoneError.

        It goes to none of ``avoid`` before that has come back.
        """
        if self._is_closed:
            raise GroupGoneError(self.group.name)
        return Lease(self, self._dispatcher.enter(request, self.clock.now_s(), avoid))

    def decide_now(self, entry: Entry) -> None:
        """Decide on ``entry`` at once if nobody waits for the next round, or if it takes no slot."""
        if not entry.sequences and entry.state is _PENDING:
            routable = self.group.roster.routable()
            self._dispatcher.place_at_once(entry, self.clock.now_s(), routable)
        if self._rounds.is_open and self._dispatcher.waiting.count:
            self._run_round()

    async def wait(self, entry: Entry) -> WorkerIndex:
        """Wait until ``entry`` is bound; raises WaitExpiredError or DecisionFailedError."""
        if entry.state is not _PENDING:
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
        self._dispatcher.retry(entry.id, now_s)
        # Its handler may take its time before it asks.
        if self._rounds.due_s is None:
            self._go_on(now_s)

    def end(self, entry: Entry, event: Event) -> None:
        """End a request, with all that it has streamed; what it held goes to those that wait."""
        if self._growth:
            self.catch_up()
        now_s = self.clock.now_s() if entry.state is _PENDING else None
        self._dispatcher.end(entry.id, event, now_s)

    def give_up(self, error: BrproxyError) -> None:
        """Have all that wait for a worker fail with ``error``, which their handlers end them by."""
        for waiter in self._waiters.values():
            if not waiter.done():
                waiter.set_exception(error)

    def is_stuck(self) -> bool:
        """Tell whether requests wait for a round that does not come."""
        # A timer that is late, as all are in a loop that was held up, will still come.
        is_coming = self._timer is not None and not self._timer.cancelled()
        return not is_coming and self._rounds.is_stuck(self.clock.now_s())

    def look_after(self) -> None:
        """Book what has streamed, and run a round if requests wait for one in vain: for a periodic look."""
        self.catch_up()
        if self.is_stuck():
            self._faults.note("round", DecisionFailedError("requests waited, and no round was due"))
            self._run_round()

    def tick_every(self, tick_s: float) -> None:
        """Have rounds ``tick_s`` (seconds) apart from the next one on."""
        self._rounds.tick_every(tick_s)

    def close(self) -> None:
        """Stop ticking, and admit nobody; whatever still waits is left to its handlers."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._rounds.stopped()

    def _run_round(self) -> None:
        """Run one round, wake those that it settled, and have another one while any wait."""
        if self._growth:
            self.catch_up()
        now_s = self.clock.now_s()
        settled = self._rounds.run(now_s)
        if self._waiters:
            for entry in settled:
                self._wake(entry)
        # On most arrivals none was due, and none is.
        if self._timer is not None or self._dispatcher.waiting.count:
            self._go_on(now_s)

    def _go_on(self, now_s: float) -> None:
        """Have the next round come, if any request waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        delay_s = self._rounds.next_after(now_s)
        if delay_s is not None:
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._run_round)

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
            if not any(self.group.roster.routable()):
                raise NoWorkerError("no worker was healthy", limit_s)
            raise WaitExpiredError("no worker had a free slot and KV room", limit_s)
        msg = "no worker could be chosen for the request"
        raise DecisionFailedError(msg)


class Lease:
    """One request's place in its group: a context manager that returns its load on every path.

    Leaving the block normally is FINISH, or FAIL after ``fail()``; a cancelled handler or a client that has
    left is CANCEL; any other exception is FAIL. A request that expired while it waited has ended already.
    """

    __slots__ = ("_driver", "_is_kept", "_ledger", "_outcome", "entry")

    def __init__(self, driver: GroupDriver, entry: Entry) -> None:
        self._driver = driver
        self._ledger = driver.group.dispatcher.ledger
        self._outcome = _FINISH
        self._is_kept = False
        self.entry = entry

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.entry.state in TERMINAL or self._is_kept:
            return
        if exc_type is None:
            # A handler can only leave before a worker was found by failing.
            event = Event.FAIL if self.entry.state is _PENDING else self._outcome
        else:
            gone = issubclass(exc_type, asyncio.CancelledError | ClientGoneError)
            event = Event.CANCEL if gone else Event.FAIL
        self._driver.end(self.entry, event)

    def worker_now(self) -> WorkerIndex | None:
        """Return a worker if one can be had at once, else None: then wait for one."""
        entry = self.entry
        self._driver.decide_now(entry)
        return entry.worker if entry.state is _PREFILL else None

    async def worker(self) -> WorkerIndex:
        """Wait for a worker; raises WaitExpiredError or DecisionFailedError."""
        return await self._driver.wait(self.entry)

    async def worker_soon(self) -> WorkerIndex:
        """Return a worker, at once or after a wait; raises WaitExpiredError or DecisionFailedError."""
        worker = self.worker_now()
        return await self.worker() if worker is None else worker

    def has_others(self) -> bool:
        """Tell whether a worker may be chosen that has not failed this request; its own has, if it asks."""
        return self._driver.group.roster.has_others(self.entry.avoid | {self.entry.worker})

    def avoid(self, workers: Iterable[WorkerIndex]) -> None:
        """Have the request go to none of ``workers`` until they have come back."""
        self.entry.avoid |= frozenset(workers)

    def retry(self) -> None:
        """Give the worker back: it failed before the client saw anything."""
        self._driver.catch_up()
        self._driver.retry(self.entry)

    def remember_as(self, session_key: int) -> None:
        """Have the request's session be known by ``session_key`` when the request has ended."""
        self.entry.request.session_keys = (session_key,)

    def keep(self) -> None:
        """Have the request go on when the block is left, however that is: ``finish`` ends it."""
        self._is_kept = True

    def fail(self) -> None:
        """Have the request end as FAILED, although its handler leaves in good order."""
        self._outcome = Event.FAIL

    def finish(self, event: Event = _FINISH) -> None:
        """End the request now, by FINISH, FAIL or CANCEL; more than once does nothing."""
        if self.entry.state not in TERMINAL:
            self._driver.end(self.entry, event)

    def tokens(self, tokens: int) -> None:
        """Book ``tokens`` more output tokens, fewer than zero to take back."""
        self._ledger.grow(self.entry.id, tokens)

    def book_later(self, book: Callable[[], None]) -> None:
        """Have ``book`` called before anybody looks at the load."""
        self._driver.book_later(book)

    def first_token(self) -> None:
        """Note that prefill is over; later calls do nothing."""
        if self.entry.state is _PREFILL:
            self._ledger.first_token(self.entry.id, self._driver.clock.now_s())

    def rest(self) -> None:
        """Note that the request runs no more: it keeps its KV and takes no slot."""
        self._ledger.rest(self.entry.id)

    def correct_prompt(self, prompt_tokens: int) -> None:
        """Replace the prompt estimate by what the worker reports, which no count replaces again."""
        self.entry.request.count_number = 0
        self._ledger.correct_prompt(self.entry.id, prompt_tokens)

    def correct_cached(self, cached_tokens: int) -> None:
        """Replace what was expected to be cached of the prompt by what the worker reports."""
        self._ledger.correct_cached(self.entry.id, cached_tokens)
