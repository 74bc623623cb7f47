"""The ledger of one barrier group: who is bound where, and how many KV tokens that is. Pure.

The ledger is the only writer of load. Every booking is an integer that stays on the request until the
request ends, and ending returns exactly what is booked, on every path: the sum over a worker's requests is
its load at all times, and an idle group's load is exactly zero. Whatever number comes in is brought within
its bounds first (``bounded``), so that no sum can leave 64 bits, and a booking that is refused has changed
nothing.

Bound requests live in rows (``bound_rows.py``), and booking a token is a few integer additions.
What is kept for each worker is kept under the index that the roster gives it.

Beside what is booked stands each worker's offset: what its engine holds besides, as far as it tells.
Decisions see both together; the books themselves are never corrected by it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from operator import add, sub

import numpy as np
from numpy.typing import NDArray

from brproxy.bound_rows import KV_TOKENS, OUTPUT_TOKENS, SEQUENCES, WIDTH, WORKER, BoundRows
from brproxy.lifecycle import AFTER, NO_ROW, NO_WORKER, TERMINAL, Entry, Event, LifecycleError, State, bounded
from brproxy.prediction.predictor import LENGTH_UNLIMITED, NO_PROSPECT, Prospect
from brproxy.roster import Change, Member, MemberState, Roster, WorkerLimits
from brproxy.routing.view import KV_UNLIMITED_TOKENS, SLOTS_UNLIMITED, RoundState
from brproxy.slow_start import SlowStart
from brproxy.types import TOKENS_MAX, RequestId, WorkerIndex

BoolArray = NDArray[np.bool_]

# As plain names: looking a member of an enumeration up costs more than comparing it.
_BIND, _FIRST_TOKEN, _PREFILL = Event.BIND, Event.FIRST_TOKEN, State.PREFILL

_PACKED = struct.Struct(f"{WIDTH}q").pack
"""Eight integers as bytes: half of what an array of them takes to make."""

_NOTHING = WorkerLimits(0, 0)
"""What a member that has gone holds."""

_CURVE_MAX = (1 << 63) - 1
"""Predictors pack what they like into the number of a curve; a column has 64 bits."""


class Ledger(BoundRows):
    """Sticky bindings and KV tokens of the workers of one barrier group.

    ``kv_tokens`` and ``requests`` are by index of the member; a gap has none. ``kv_capacity_tokens_max`` is
    what the largest worker holds: a longer prompt can never be served. ``has_offset``: some worker's is not
    zero, which those ask who decide, as it mostly is. Who comes back gets its slots within ``slow_start_s``.
    """

    def __init__(self, roster: Roster, slow_start_s: float = 0.0) -> None:
        super().__init__(roster)
        self._slots: list[int] = []
        self._kv_capacity: list[int] = []
        self._slots_total = 0
        self.kv_capacity_tokens_max = KV_UNLIMITED_TOKENS
        self._is_here: list[bool] = []
        self._kv_tokens: list[int] = []
        self._requests: list[int] = []
        self._sequences: list[int] = []
        # Kept and not worked out: each request asks for them. Fewer than zero where more is bound than fits;
        # whether that may be so anywhere is kept as well.
        self._slots_free: list[int] = []
        self._is_overfull = False
        # Whether any worker that is there has a KV capacity.
        self.kv_is_limited = False
        # What no cache has of prompts that are booked and not prefilled, as far as first tokens tell.
        self._prefill_tokens: list[int] = []
        self._offset: list[int] = []
        self.has_offset = False
        for member in roster.members:
            self._member_changed(member, Change.ADDED)
        roster.observe(self._member_changed)
        self._slow_start = SlowStart(roster, slow_start_s, lambda index: not self._requests[index])

    def __repr__(self) -> str:
        """Show the state in one line, for tests and logs."""
        return f"<Ledger bound={self.bound} kv_tokens={self._kv_tokens} requests={self._requests}>"

    # What is there.

    @property
    def kv_tokens(self) -> tuple[int, ...]:
        """Booked load of each worker, in KV tokens."""
        return tuple(self._kv_tokens)

    @property
    def offset(self) -> tuple[int, ...]:
        """What each worker holds beside what is booked, in KV tokens; fewer than zero: less than booked."""
        return tuple(self._offset)

    @property
    def prefill_tokens(self) -> tuple[int, ...]:
        """What of the prompts of each worker has yet to be prefilled, without what is cached, in tokens."""
        return tuple(self._prefill_tokens)

    def load(self) -> list[int]:
        """Return the load of each worker as decisions see it: booked and offset, never less than none."""
        if not self.has_offset:
            return self._kv_tokens.copy()
        return [max(kv_tokens, 0) for kv_tokens in map(add, self._kv_tokens, self._offset)]

    def begun(self) -> list[int]:
        """Return what is booked on each worker for requests that have streamed a token (KV tokens)."""
        table = self._table()
        has_begun = table[:, OUTPUT_TOKENS] > 0
        columns = len(self._kv_tokens)
        # Added up as floats, which are exact as far as any load goes.
        sums = np.bincount(table[has_begun, WORKER], table[has_begun, KV_TOKENS], columns)
        return [int(kv_tokens) for kv_tokens in sums.tolist()]

    @property
    def requests(self) -> tuple[int, ...]:
        """Bound requests of each worker."""
        return tuple(self._requests)

    @property
    def sequences(self) -> tuple[int, ...]:
        """Sequences of each worker: they take its slots, and each is a request in the engine."""
        return tuple(self._sequences)

    @property
    def sequences_total(self) -> int:
        """Sequences of all workers together."""
        return sum(self._sequences)

    @property
    def slots_total(self) -> int:
        """Slots of all workers that are there together."""
        return self._slots_total

    def state(self, routable: Sequence[bool], *, late_binding: bool, now_s: float = 0.0) -> RoundState:
        """Return the workers as a decision round at ``now_s`` finds them (copies), by place.

        ``routable`` (by index) masks workers that must not be chosen: they get no free slots, while their
        load still counts for the envelope. Without ``late_binding`` slots and KV room are unlimited, because
        the worker queues what it cannot run.
        """
        kv_tokens = self.load() if self.has_offset else self._kv_tokens.copy()
        if late_binding:
            slots_free, kv_free = self._slots_free.copy(), self._kv_capacity
            # Rare: early binding, or several sequences in the last slot.
            if self._is_overfull:
                slots_free = [max(slots, 0) for slots in slots_free]
                self._is_overfull = min(self._slots_free) < 0
            if self.kv_is_limited:
                kv_free = list(map(sub, kv_free, kv_tokens))
                # Rare: an estimate that was corrected.
                if min(kv_free) < 0:
                    kv_free = [max(tokens, 0) for tokens in kv_free]
            else:
                kv_free = kv_free.copy()
        else:
            slots_free = [SLOTS_UNLIMITED] * len(routable)
            kv_free = [KV_UNLIMITED_TOKENS] * len(routable)
        if False in routable:
            slots_free = [slots if ok else 0 for slots, ok in zip(slots_free, routable, strict=True)]
        if self._slow_start.since_s:
            self._slow_start.ramp(slots_free, self._slots, self._sequences, routable, now_s)
        # By position, in the order of its fields: this is done for each request.
        state = RoundState(
            kv_tokens,
            self._sequences.copy(),
            self._slots,
            slots_free,
            self._kv_capacity,
            kv_free,
            self._prefill_tokens.copy(),
        )
        present = self.roster.present
        return state if present is None else state.only(present)

    def offset_by_place(self) -> list[int]:
        """Return the offset of each worker that is there, by place."""
        present = self.roster.present
        return self._offset if present is None else [self._offset[g] for g in present]

    # What happens.

    def set_offset(self, worker: WorkerIndex, kv_tokens: int) -> None:
        """Set what a worker holds beside what is booked, within TOKENS_MAX of zero (KV tokens)."""
        self._offset[worker] = max(-TOKENS_MAX, min(kv_tokens, TOKENS_MAX))
        self.has_offset = any(self._offset)

    def bind(self, entry: Entry, worker: WorkerIndex, now_s: float, prospect: Prospect | None = None) -> None:
        """Bind a waiting request to ``worker`` and book its prompt there, before the engine has seen it.

        Raises LifecycleError, RosterError, and TypeError or ValueError for a prospect that is made of no
        integers; nothing is booked then.
        """
        if not 0 <= worker < len(self._is_here) or not self._is_here[worker]:
            self.roster.member(worker)
        curve, length_max, certain = prospect or NO_PROSPECT
        # Asked by a call only where something is odd: each request comes by here.
        if not (0 <= curve <= _CURVE_MAX and 0 <= length_max <= LENGTH_UNLIMITED):
            curve, length_max = bounded(curve, _CURVE_MAX), bounded(length_max, LENGTH_UNLIMITED)
        prompt_tokens, sequences = entry.prompt_tokens, entry.sequences
        state = AFTER[entry.state][_BIND]
        try:
            row = _PACKED(entry.id, worker, prompt_tokens, 0, sequences, curve, length_max, bool(certain))
        except struct.error as error:
            raise TypeError(str(error)) from None
        # From here on nothing can fail: what is no integer has just raised.
        entry.state, entry.worker, entry.bound_s, entry.row = state, worker, now_s, len(self._rows)
        self._entries[entry.id] = entry
        self._rows.append(entry)
        self._cells.frombytes(row)
        self._kv_tokens[worker] += prompt_tokens
        self._requests[worker] += 1
        self._sequences[worker] += sequences
        self._slots_free[worker] = slots_free = self._slots_free[worker] - sequences
        if slots_free < 0:
            self._is_overfull = True
        entry.prefill_tokens = entry.uncached_tokens if entry.cached_tokens else prompt_tokens
        self._prefill_tokens[worker] += entry.prefill_tokens
        if sequences != 1:
            self._unusual_rows += 1

    def first_token(self, request_id: RequestId, now_s: float) -> None:
        """Note that prefill is over."""
        entry = self._entries.get(request_id) or self.entry(request_id)
        entry.state = AFTER[entry.state][_FIRST_TOKEN]
        entry.first_token_s = now_s
        self._prefill_tokens[entry.worker] -= entry.prefill_tokens

    def rest(self, request_id: RequestId) -> None:
        """Note that a request runs no more: it keeps its KV and takes no slot until it ends."""
        entry = self._entries.get(request_id) or self.entry(request_id)
        self._sequences[entry.worker] -= entry.sequences
        self._slots_free[entry.worker] += entry.sequences
        self._unusual_rows += entry.sequences == 1
        self._cells[entry.row * WIDTH + SEQUENCES] = entry.sequences = 0

    def grow(self, request_id: RequestId, tokens: int) -> None:
        """Book ``tokens`` more streamed tokens; fewer than zero takes back, never below no output.

        The output is never more than TOKENS_MAX.
        """
        entry, cells = self._entries.get(request_id) or self.entry(request_id), self._cells
        first = entry.row * WIDTH
        before = cells[first + OUTPUT_TOKENS]
        after_it = before + tokens
        if not 0 <= after_it <= TOKENS_MAX:
            after_it = bounded(after_it, TOKENS_MAX)
        change = after_it - before
        cells[first + OUTPUT_TOKENS] = after_it
        cells[first + KV_TOKENS] += change
        self._kv_tokens[entry.worker] += change

    def grow_rows(self, rows: BoolArray) -> None:
        """Book one more token for each bound request that ``rows`` (bool[N], in order of ``row_ids``) picks.

        For a simulator, in which a step is one instant: the same as ``grow`` one by one.
        """
        table = self._table()
        for column in (OUTPUT_TOKENS, KV_TOKENS):
            table[rows, column] += 1
        workers = table[rows, WORKER]
        grown = np.bincount(workers, minlength=len(self._kv_tokens))
        self._kv_tokens = [kv + more for kv, more in zip(self._kv_tokens, grown.tolist(), strict=True)]

    def correct_prompt(self, request_id: RequestId, prompt_tokens: int) -> None:
        """Replace the prompt estimate by what the worker reports, at least 0 and at most TOKENS_MAX."""
        entry = self._entries.get(request_id) or self.entry(request_id)
        if prompt_tokens == entry.prompt_tokens:
            return
        change = bounded(prompt_tokens, TOKENS_MAX) - entry.prompt_tokens
        entry.prompt_tokens += change
        self._cells[entry.row * WIDTH + KV_TOKENS] += change
        self._kv_tokens[entry.worker] += change
        self._uncached_changed(entry)

    def correct_cached(self, request_id: RequestId, cached_tokens: int) -> None:
        """Replace what was expected to be cached of a prompt by what its worker reports; load stays."""
        entry = self._entries.get(request_id) or self.entry(request_id)
        entry.home, entry.cached_tokens = entry.worker, bounded(cached_tokens, TOKENS_MAX)
        self._uncached_changed(entry)

    def _uncached_changed(self, entry: Entry) -> None:
        if entry.state is _PREFILL:
            change = entry.uncached_tokens - entry.prefill_tokens
            entry.prefill_tokens += change
            self._prefill_tokens[entry.worker] += change

    def take_back(self, entry: Entry, now_s: float) -> None:
        """Unbind a request that its worker failed, so that it waits again; raises LifecycleError."""
        state = AFTER[entry.state][Event.RETRY]
        worker = entry.worker
        self._unbind(entry)
        entry.avoid |= {worker}
        entry.state, entry.worker, entry.output_tokens = state, NO_WORKER, 0
        entry.waiting_since_s = now_s
        if not self._requests[worker]:
            self.roster.let_go(worker)

    def end(self, entry: Entry, event: Event) -> None:
        """Return the load of a bound request that ends by FINISH, FAIL or CANCEL; raises LifecycleError."""
        state = AFTER[entry.state][event]
        if state not in TERMINAL:
            msg = f"{event.name} does not end a request"
            raise LifecycleError(msg)
        self._unbind(entry)
        entry.state = state
        if not self._requests[entry.worker]:
            self.roster.let_go(entry.worker)

    def _unbind(self, entry: Entry) -> None:
        """Return the entry's load and close its row with the last one."""
        worker, cells = entry.worker, self._cells
        first = entry.row * WIDTH
        entry.output_tokens = cells[first + OUTPUT_TOKENS]
        self._kv_tokens[worker] -= cells[first + KV_TOKENS]
        self._requests[worker] -= 1
        self._sequences[worker] -= entry.sequences
        self._slots_free[worker] += entry.sequences
        if entry.first_token_s is None:
            self._prefill_tokens[worker] -= entry.prefill_tokens
        if entry.sequences != 1:
            self._unusual_rows -= 1
        del self._entries[entry.id]
        last, row = self._rows.pop(), cells[-WIDTH:]
        del cells[-WIDTH:]
        if last is not entry:
            self._rows[entry.row] = last
            last.row = entry.row
            cells[first : first + WIDTH] = row
        entry.row = NO_ROW

    def _member_changed(self, member: Member, change: Change) -> None:
        """Keep a column for each member that is there."""
        if change is Change.ADDED and member.index == len(self._slots):
            booked = self._kv_tokens, self._requests, self._sequences, self._prefill_tokens
            for column in (self._slots, self._slots_free, self._kv_capacity, self._offset, *booked):
                column.append(0)
            self._is_here.append(True)
        if change in {Change.ADDED, Change.GONE, Change.LIMITS}:
            limits = _NOTHING if change is Change.GONE else member.limits
            if change is not Change.LIMITS:
                self._is_here[member.index] = change is Change.ADDED
                self.set_offset(member.index, 0)
            self._slots[member.index] = limits.slots
            self._slots_free[member.index] = limits.slots - self._sequences[member.index]
            self._is_overfull = True
            self._kv_capacity[member.index] = _kv_capacity(limits)
            there = zip(self._kv_capacity, self._is_here, strict=True)
            self.kv_is_limited = any(here and tokens < KV_UNLIMITED_TOKENS for tokens, here in there)
        members = self.roster.members
        self._slots_total = sum(m.limits.slots for m in members)
        takers = [m for m in members if m.state is MemberState.ACTIVE] or members
        self.kv_capacity_tokens_max = max(
            (_kv_capacity(m.limits) for m in takers), default=KV_UNLIMITED_TOKENS
        )


def _kv_capacity(limits: WorkerLimits) -> int:
    return KV_UNLIMITED_TOKENS if limits.kv_capacity_tokens is None else limits.kv_capacity_tokens
