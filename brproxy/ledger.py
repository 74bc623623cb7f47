"""The ledger of one barrier group: who is bound where, and how many KV tokens that is. Pure.

The ledger is the only writer of load. Every booking is an integer that stays on the request until the
request ends, and ending returns exactly what is booked, on every path: the sum over a worker's requests is
its load at all times, and an idle group's load is exactly zero. Whatever number comes in is brought within
its bounds first (``bounded``), so that no sum can leave 64 bits, and a booking that is refused has changed
nothing.

Bound requests live in parallel arrays without holes (ending one moves the last into its row), so that
forecasting over thousands of them is array arithmetic, while booking a token stays a few integer additions.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from operator import index, sub
from typing import cast

import numpy as np
from numpy.typing import NDArray

from brproxy.lifecycle import TERMINAL, Event, LifecycleError, State, after
from brproxy.prediction.predictor import LENGTH_UNLIMITED, ActiveRequests, Prospect
from brproxy.routing.view import KV_UNLIMITED_TOKENS, SLOTS_UNLIMITED, IntArray, RoundState
from brproxy.types import TOKENS_MAX, InvalidInputError, PendingRequest, RequestId, WorkerIndex

BoolArray = NDArray[np.bool_]

NO_WORKER = WorkerIndex(-1)
NO_ROW = -1
_NO_PROSPECT = Prospect()
_CURVE_MAX = (1 << 63) - 1
"""Predictors pack what they like into the number of a curve; a column has 64 bits."""


def bounded(value: int, highest: int) -> int:
    """Return ``value`` brought within ``0 <= n <= highest``; raises TypeError for what is no integer."""
    return min(max(index(value), 0), highest)


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What a worker holds: ``slots`` requests at once, ``kv_capacity_tokens`` (None: unknown)."""

    slots: int
    kv_capacity_tokens: int | None = None


@dataclass(slots=True)
class Entry:
    """One request in the ledger. Times are the caller's clock in seconds; None: has not happened.

    ``waiting_since_s`` is when it last entered the pool: on arrival, or when a worker failed it. While the
    request is bound, ``output_tokens`` is kept by the ledger (Ledger.output_tokens).
    """

    id: RequestId
    request: PendingRequest
    arrived_s: float
    waiting_since_s: float
    state: State = State.PENDING
    worker: WorkerIndex = NO_WORKER
    row: int = NO_ROW
    prompt_tokens: int = 0
    output_tokens: int = 0
    passed_over: int = 0
    bound_s: float | None = None
    first_token_s: float | None = None
    avoid: frozenset[WorkerIndex] = frozenset()


class Ledger:
    """Sticky bindings and KV tokens of the workers of one barrier group."""

    def __init__(self, workers: Sequence[WorkerLimits]) -> None:
        if not workers:
            msg = "a barrier group needs at least one worker"
            raise InvalidInputError(msg)
        self._slots = [w.slots for w in workers]
        self._kv_capacity = [
            KV_UNLIMITED_TOKENS if w.kv_capacity_tokens is None else w.kv_capacity_tokens for w in workers
        ]
        self._slots_total = sum(self._slots)
        self._kv_capacity_max = max(self._kv_capacity)
        self._kv_tokens = [0] * len(workers)
        self._requests = [0] * len(workers)
        self._ids = cast("Iterator[RequestId]", count())
        self._entries: dict[RequestId, Entry] = {}
        self._pending: dict[RequestId, Entry] = {}
        self._retrying: dict[RequestId, Entry] = {}
        self._rows: list[Entry] = []
        self._row_id = array("q")
        self._row_worker = array("q")
        self._row_kv_tokens = array("q")
        self._row_output_tokens = array("q")
        self._row_curve = array("q")
        self._row_length_max = array("q")
        self._row_certain = array("b")
        self._columns = (
            self._row_id,
            self._row_worker,
            self._row_kv_tokens,
            self._row_output_tokens,
            self._row_curve,
            self._row_length_max,
            self._row_certain,
        )

    def __repr__(self) -> str:
        """Show the state in one line, for tests and logs."""
        return (
            f"<Ledger pending={self.pending} bound={self.bound} kv_tokens={self._kv_tokens} "
            f"requests={self._requests}>"
        )

    # What is there.

    @property
    def workers(self) -> int:
        """G, the workers of the group."""
        return len(self._slots)

    @property
    def pending(self) -> int:
        """Requests waiting for a worker, retries included."""
        return len(self._pending) + len(self._retrying)

    @property
    def waiting_since_s(self) -> float | None:
        """When the request that has waited longest entered the pool (seconds); None while none waits."""
        oldest = [
            next(iter(pool.values())).waiting_since_s for pool in (self._pending, self._retrying) if pool
        ]
        return min(oldest, default=None)

    @property
    def bound(self) -> int:
        """Requests bound to a worker."""
        return len(self._rows)

    @property
    def kv_tokens(self) -> tuple[int, ...]:
        """Booked load of each worker, in KV tokens."""
        return tuple(self._kv_tokens)

    @property
    def requests(self) -> tuple[int, ...]:
        """Bound requests of each worker."""
        return tuple(self._requests)

    @property
    def kv_capacity_tokens_max(self) -> int:
        """KV capacity of the largest worker; a longer prompt can never be served."""
        return self._kv_capacity_max

    @property
    def slots_total(self) -> int:
        """Slots of all workers together."""
        return self._slots_total

    def turnover_steps(self, output_tokens_mean: float) -> float:
        """Return how many steps pass between two requests that leave a full worker (steps)."""
        return output_tokens_mean * self.workers / self.slots_total

    def entry(self, request_id: RequestId) -> Entry:
        """Return the request's entry; raises LifecycleError once it has ended."""
        try:
            return self._entries[request_id]
        except KeyError:
            msg = f"request {request_id} is not in the ledger: it has ended or never arrived"
            raise LifecycleError(msg) from None

    def pending_by_age(self) -> Iterator[Entry]:
        """Iterate over the waiting requests that are not retries, oldest first."""
        return iter(self._pending.values())

    def alone(self) -> Entry | None:
        """Return the one request that waits, None if none or several do, or it is a retry."""
        if len(self._pending) != 1 or self._retrying:
            return None
        return next(iter(self._pending.values()))

    def retrying(self) -> tuple[Entry, ...]:
        """Return the requests that a worker failed and that wait for another."""
        return tuple(self._retrying.values())

    def active(self) -> ActiveRequests:
        """Return the bound requests as arrays (copies)."""
        return ActiveRequests(
            worker=np.array(self._row_worker, dtype=np.int64),
            kv_tokens=np.array(self._row_kv_tokens, dtype=np.int64),
            output_tokens=np.array(self._row_output_tokens, dtype=np.int64),
            curve=np.array(self._row_curve, dtype=np.int64),
            length_max=np.array(self._row_length_max, dtype=np.int64),
            certain=np.array(self._row_certain, dtype=bool),
        )

    def output_tokens(self, request_id: RequestId) -> int:
        """Return the output tokens booked for a request."""
        entry = self.entry(request_id)
        return entry.output_tokens if entry.row == NO_ROW else self._row_output_tokens[entry.row]

    def row_ids(self) -> IntArray:
        """Return the ids of the bound requests in the order of ``active`` and ``grow_rows``, int64[N]."""
        return np.array(self._row_id, dtype=np.int64)

    def state(self, routable: Sequence[bool], *, late_binding: bool) -> RoundState:
        """Return the workers as a decision round finds them (copies).

        ``routable`` (G) masks workers that must not be chosen: they get no free slots, while their load still
        counts for the envelope. Without ``late_binding`` slots and KV room are unlimited, because the
        worker queues what it cannot run.
        """
        if late_binding:
            slots_free = list(map(sub, self._slots, self._requests))
            kv_free = list(map(sub, self._kv_capacity, self._kv_tokens))
            # Rare: early binding, or an estimate that was corrected, has given a worker more than it holds.
            if min(slots_free) < 0:
                slots_free = [max(slots, 0) for slots in slots_free]
            if min(kv_free) < 0:
                kv_free = [max(kv_tokens, 0) for kv_tokens in kv_free]
        else:
            slots_free = [SLOTS_UNLIMITED] * len(routable)
            kv_free = [KV_UNLIMITED_TOKENS] * len(routable)
        if not all(routable):
            slots_free = [slots if ok else 0 for slots, ok in zip(slots_free, routable, strict=True)]
        # By position, in the order of its fields: this is done for each request.
        return RoundState(
            self._kv_tokens.copy(),
            self._requests.copy(),
            self._slots,
            slots_free,
            self._kv_capacity,
            kv_free,
        )

    # What happens.

    def arrive(self, request: PendingRequest, now_s: float) -> RequestId:
        """Enter a request into the pool; raises InvalidInputError for one that would corrupt the books.

        A prompt of more than TOKENS_MAX tokens counts as that many, one that was guessed as at most the KV
        capacity of the largest worker, so that it can be placed at all.
        """
        prompt_tokens = request.prompt_tokens
        if prompt_tokens < 0:
            msg = f"prompt_tokens must be at least 0, got {prompt_tokens}"
            raise InvalidInputError(msg)
        if prompt_tokens > self._kv_capacity_max and not request.prompt_is_exact:
            prompt_tokens = self._kv_capacity_max
        request_id = next(self._ids)
        entry = Entry(request_id, request, now_s, now_s, prompt_tokens=bounded(prompt_tokens, TOKENS_MAX))
        self._entries[request_id] = entry
        self._pending[request_id] = entry
        return request_id

    def bind(
        self, request_id: RequestId, worker: WorkerIndex, now_s: float, prospect: Prospect | None = None
    ) -> None:
        """Bind a waiting request to ``worker`` and book its prompt there, before the engine has seen it.

        Raises LifecycleError, and TypeError for a prospect that is made of no integers; nothing is booked
        then.
        """
        entry = self.entry(request_id)
        if not 0 <= worker < self.workers:
            msg = f"there is no worker {worker} among {self.workers}"
            raise LifecycleError(msg)
        curve, length_max, certain = prospect or _NO_PROSPECT
        row = (
            request_id,
            index(worker),
            entry.prompt_tokens,
            0,
            bounded(curve, _CURVE_MAX),
            bounded(length_max, LENGTH_UNLIMITED),
            bool(certain),
        )
        state = after(entry.state, Event.BIND)
        # From here on nothing can fail: each value fits its column.
        entry.state = state
        self._leave_pool(request_id)
        entry.worker, entry.bound_s, entry.row = worker, now_s, len(self._rows)
        self._rows.append(entry)
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)
        self._kv_tokens[worker] += entry.prompt_tokens
        self._requests[worker] += 1

    def first_token(self, request_id: RequestId, now_s: float) -> None:
        """Note that prefill is over."""
        entry = self.entry(request_id)
        entry.state = after(entry.state, Event.FIRST_TOKEN)
        entry.first_token_s = now_s

    def grow(self, request_id: RequestId, tokens: int) -> None:
        """Book ``tokens`` more streamed tokens; fewer than zero takes back, never below no output.

        The output is never more than TOKENS_MAX.
        """
        entry = self.entry(request_id)
        row = entry.row
        if row == NO_ROW:
            msg = f"request {request_id} is not bound and cannot grow"
            raise LifecycleError(msg)
        before = self._row_output_tokens[row]
        change = bounded(before + tokens, TOKENS_MAX) - before
        self._row_output_tokens[row] += change
        self._row_kv_tokens[row] += change
        self._kv_tokens[entry.worker] += change

    def grow_rows(self, rows: BoolArray) -> None:
        """Book one more token for each bound request that ``rows`` (bool[N], in order of ``row_ids``) picks.

        For a simulator, in which a step is one instant: the same as ``grow`` one by one.
        """
        for column in (self._row_output_tokens, self._row_kv_tokens):
            np.frombuffer(column, dtype=np.int64)[rows] += 1
        grown = np.bincount(np.array(self._row_worker, dtype=np.int64)[rows], minlength=self.workers)
        self._kv_tokens = [kv + more for kv, more in zip(self._kv_tokens, grown.tolist(), strict=True)]

    def correct_prompt(self, request_id: RequestId, prompt_tokens: int) -> None:
        """Replace the prompt estimate by what the worker reports, at least 0 and at most TOKENS_MAX."""
        entry = self.entry(request_id)
        if entry.row == NO_ROW:
            msg = f"request {request_id} is not bound: nothing can have reported its prompt"
            raise LifecycleError(msg)
        change = bounded(prompt_tokens, TOKENS_MAX) - entry.prompt_tokens
        entry.prompt_tokens += change
        self._row_kv_tokens[entry.row] += change
        self._kv_tokens[entry.worker] += change

    def pass_over(self, waiting: Sequence[Entry], admitted: Sequence[int]) -> None:
        """Count the requests that overtake: of ``waiting``, oldest first, ``admitted`` (positions) go.

        Each that stays has been passed over by those behind it that go.
        """
        position = 0
        for younger, next_admitted in zip(range(len(admitted), 0, -1), admitted, strict=True):
            for entry in waiting[position:next_admitted]:
                entry.passed_over += younger
            position = next_admitted + 1

    def retry(self, request_id: RequestId, now_s: float) -> None:
        """Return a request to the pool, before all others, and remember the worker that failed it."""
        entry = self.entry(request_id)
        entry.state = after(entry.state, Event.RETRY)
        entry.avoid |= {entry.worker}
        self._unbind(entry)
        entry.worker, entry.output_tokens, entry.waiting_since_s = NO_WORKER, 0, now_s
        self._retrying[request_id] = entry

    def end(self, request_id: RequestId, event: Event) -> Entry:
        """End a request by FINISH, FAIL, CANCEL or EXPIRE: return its load and forget it."""
        entry = self.entry(request_id)
        state = after(entry.state, event)
        if state not in TERMINAL:
            msg = f"{event.name} does not end a request"
            raise LifecycleError(msg)
        if entry.row == NO_ROW:
            self._leave_pool(request_id)
        else:
            self._unbind(entry)
        entry.state = state
        del self._entries[request_id]
        return entry

    def _leave_pool(self, request_id: RequestId) -> None:
        if self._pending.pop(request_id, None) is None:
            del self._retrying[request_id]

    def _unbind(self, entry: Entry) -> None:
        """Return the entry's load and close its row with the last one."""
        row = entry.row
        entry.output_tokens = self._row_output_tokens[row]
        self._kv_tokens[entry.worker] -= self._row_kv_tokens[row]
        self._requests[entry.worker] -= 1
        last = self._rows.pop()
        moved = [column.pop() for column in self._columns]
        if last is not entry:
            self._rows[row] = last
            last.row = row
            for column, value in zip(self._columns, moved, strict=True):
                column[row] = value
        entry.row = NO_ROW
