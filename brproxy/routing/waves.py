"""A decision round where prefill is dear and slots are scarce: prompts go in waves. Pure.

``prefill.py`` says what a wave is, and when one goes. A wave is a prefill envelope p and a KV level: worker g
is filled up to the lesser of p and what its KV load is below the level (prompt tokens), those with the most
to fill first. Which are best depends on what waits, so some envelopes and levels are filled with real
requests and compared: by p and what the KV envelope rises, against what is prefilled and the slots that are
filled.

* The slots of a worker are filled with the oldest requests that leave something for the slots behind them,
  the last slot with the largest request that still fits. So prompts sum up to about p everywhere.
* Prompts larger than an ordinary p wait for a wave in which enough others are as large. Who has been passed
  over too often goes with the next wave, which then has at least that p.
* A request whose beginning is cached on a worker is filled in first there, and counts for what is not cached.
* KV room is made as in ``balance.py``: the worker with the most of it takes nothing else.

In chunks a wave takes some steps. Filling the prefill margins that are left until it ends was measured, and
does not pay: what is left must be guessed, and each guess that is too high opens an envelope.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from brproxy.routing.overdue import MAKE_ROOM_FROM
from brproxy.routing.prefill import PrefillTerms
from brproxy.routing.view import NOT_ADMITTED, ClusterView, FloatArray, IntArray

_ENVELOPES = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
"""Envelopes that are tried, as shares of the mean with which all slots would be filled."""

_KV_BOUND = (0.25, 0.0, 0.5)
"""KV levels that are tried: the share of the workers that take less than p because of the level."""

_PREFILL_WORTH = 1.05
"""What a prefilled token is worth, of its share 1 / G of a full envelope: other waves are not full either."""

_KV_WORTH = 0.5
"""What a KV token below the envelope is worth, of its share 1 / G of a full KV envelope."""

_AHEAD = 2
"""A request that is not a worker's last may take so many times its share of what is left to fill."""


class Wave(NamedTuple):
    """Requests with their workers, by position and place, and the ``room`` that they fill (tokens, [G]).

    ``envelope``: p, in tokens. ``cost``: what it costs all workers (prefill tokens); less is better.
    """

    cost: float
    admitted: list[tuple[int, int]]
    envelope: float
    room: list[float]


class Stock:
    """Requests that a wave may take, by position: the oldest, or the largest, that fits.

    ``by_size`` are the positions in order of their prompts, ``sizes`` those prompts (tokens).
    """

    def __init__(self, prompts: Sequence[int], by_size: Sequence[int], sizes: Sequence[int]) -> None:
        self._prompts = prompts
        self._by_size = by_size
        self._sizes = sizes
        self._left = bytearray(b"\1") * len(prompts)
        self._first = 0
        # Counted from 1: where to look on below a rank that has been taken.
        self._below = list(range(-1, len(prompts)))

    def take(self, request: int) -> bool:
        """Take a request; tell whether it was still there."""
        was_there = bool(self._left[request])
        self._left[request] = 0
        return was_there

    def oldest(self, prompt_tokens_max: float) -> int | None:
        """Take the oldest request of at most so many prompt tokens, None if there is none."""
        left, prompts = self._left, self._prompts
        position = self._first = left.find(1, self._first)
        while position >= 0:
            if prompts[position] <= prompt_tokens_max:
                left[position] = 0
                return position
            position = left.find(1, position + 1)
        self._first = max(self._first, 0)
        return None

    def largest(self, prompt_tokens_max: float) -> int | None:
        """Take the largest request of at most so many prompt tokens, None if there is none."""
        left, by_size, below = self._left, self._by_size, self._below
        first = rank = bisect_right(self._sizes, prompt_tokens_max)
        while rank and not left[by_size[rank - 1]]:
            rank = below[rank]
        # Whoever comes by here again goes at once to where this one found something.
        while first > rank:
            below[first], first = rank, below[first]
        if not rank:
            return None
        request = by_size[rank - 1]
        left[request] = 0
        return request


class _Filling:
    """What a worker takes in a wave: requests with the tokens that each adds, and what is left to fill."""

    def __init__(self, slots: int, room: float, kv_free: int) -> None:
        self.slots, self.left, self.kv_free = slots, room, kv_free
        self.added: list[tuple[int, float]] = []

    def add(self, request: int, prompt_tokens: float, kv_tokens: int, sequences: int) -> None:
        self.added.append((request, prompt_tokens))
        self.slots -= sequences
        self.left -= prompt_tokens
        self.kv_free -= kv_tokens


class PrefillRound:
    """A round over ``view`` that opens a prefill envelope; ``terms`` are those of the view.

    ``kv_load`` is each worker's load, now or as a mean over a horizon (float64[G], KV tokens).
    ``overdue``: how overdue the oldest requests are (float64[W], see ``overdue.py``).
    """

    def __init__(
        self,
        view: ClusterView,
        terms: PrefillTerms,
        kv_load: FloatArray,
        overdue: FloatArray,
    ) -> None:
        self._view = view
        self._terms = terms
        self._kv_load: list[float] = kv_load.tolist()
        self._slots_free: list[int] = view.slots_free.tolist()
        self._kv_free: list[int] = view.kv_free.tolist()
        self._prompts: list[int] = view.prompt_tokens.tolist()
        self._sequences = view.each_sequences()
        self._overdue: list[int] = np.flatnonzero(overdue >= 1).tolist()
        self._make_room(np.flatnonzero(overdue >= MAKE_ROOM_FROM).tolist())
        # Of equal sizes the oldest is looked at first.
        self._by_size = sorted(range(view.waiting), key=lambda i: (self._prompts[i], -i))
        self._sizes = [self._prompts[i] for i in self._by_size]
        self._by_kv = sorted(self._kv_load)
        self._guests: dict[int, list[tuple[int, float]]] = {}
        for request, home in enumerate(view.each_home()):
            if home is not None:
                self._guests.setdefault(home.place, []).append((request, home.discount_tokens))

    def run(self) -> IntArray:
        """Return the decision, int64[N]."""
        decision = np.full(self._view.waiting, NOT_ADMITTED, dtype=np.int64)
        best = min(self.waves(), key=lambda wave: wave.cost, default=None)
        for request, worker in self._oldest() if best is None else best.admitted:
            decision[request] = worker
        return decision

    def waves(self) -> list[Wave]:
        """Return the waves that were compared; none where no request suits any worker.

        Envelopes are tried from the middle up and down for as long as that gets better, then KV levels.
        """
        prompts, workers = self._prompts, self._view.workers
        share = sum(self._slots_free) * sum(prompts) / len(prompts) / workers
        least = max((prompts[request] for request in self._overdue), default=0)
        tried = {prompts[0], *(share * factor for factor in _ENVELOPES)}
        envelopes = sorted({max(float(p), float(least)) for p in tried})
        middle = bisect_left(envelopes, max(share, least))
        waves = [best := self._filled(envelopes[middle], _KV_BOUND[0])]
        for direction in (range(middle + 1, len(envelopes)), range(middle - 1, -1, -1)):
            for position in direction:
                waves.append(self._filled(envelopes[position], _KV_BOUND[0]))
                if waves[-1].cost >= best.cost:
                    break
                best = waves[-1]
        waves += [self._filled(best.envelope, bound) for bound in _KV_BOUND[1:]]
        return [wave for wave in waves if wave.admitted]

    def _make_room(self, late: Sequence[int]) -> None:
        """Leave the worker with the most KV room to one that is late, where all lack room for it."""
        free = [g for g, slots in enumerate(self._slots_free) if slots > 0]
        roomiest = max(free, key=self._kv_free.__getitem__, default=None)
        if roomiest is not None and any(self._prompts[i] > self._kv_free[roomiest] for i in late):
            self._slots_free[roomiest] = 0

    def _oldest(self) -> list[tuple[int, int]]:
        """Return the oldest request that has room, and the least loaded worker that has it."""
        for request, prompt in enumerate(self._prompts):
            fits = [g for g, kv in enumerate(self._kv_free) if self._slots_free[g] > 0 and kv >= prompt]
            if fits:
                return [(request, min(fits, key=self._kv_load.__getitem__))]
        return []

    def _filled(self, envelope: float, bound: float) -> Wave:
        """Fill the workers up to an envelope and a KV level, those with the most room first.

        ``bound``: for this share of the workers the level is the limit, not the envelope. What is overdue
        goes to the first of them that have KV room.
        """
        by_kv = self._by_kv
        level = by_kv[len(by_kv) - 1 - round(bound * len(by_kv))] + envelope
        room = [min(envelope, level - kv) for kv in self._kv_load]
        stock = Stock(self._prompts, self._by_size, self._sizes)
        order = [g for g, slots in enumerate(self._slots_free) if slots > 0]
        order.sort(key=lambda g: -room[g])
        fillings = {g: _Filling(self._slots_free[g], room[g], self._kv_free[g]) for g in order}
        for request in self._overdue:
            prompt, sequences = self._prompts[request], self._sequences[request]
            worker = next((g for g in order if not fillings[g].added and self._kv_free[g] >= prompt), None)
            if worker is not None:
                stock.take(request)
                fillings[worker].add(request, prompt, prompt, sequences)
        # Before any worker takes what is at home with another.
        for worker in order:
            self._take_in(self._guests.get(worker, ()), fillings[worker], stock)
        for worker in order:
            self._fill(fillings[worker], stock)
        admitted = [(request, worker) for worker in order for request, _ in fillings[worker].added]
        added = [0.0] * len(room)
        for worker in order:
            added[worker] = sum((prompt_tokens for _, prompt_tokens in fillings[worker].added), 0.0)
        return Wave(self._cost(added, len(admitted)), admitted, envelope, room)

    def _take_in(self, guests: Sequence[tuple[int, float]], filling: _Filling, stock: Stock) -> None:
        """Add those that are at home with a worker, for what is not cached of them."""
        for request, discount_tokens in guests:
            prompt = self._prompts[request]
            prompt_tokens = max(prompt - discount_tokens, 0.0)
            fits = prompt_tokens <= filling.left and prompt <= filling.kv_free
            if filling.slots > 0 and fits and stock.take(request):
                filling.add(request, prompt_tokens, prompt, self._sequences[request])

    def _fill(self, filling: _Filling, stock: Stock) -> None:
        """Fill what is left of a worker's room."""
        while filling.slots > 0:
            most = min(filling.left, filling.kv_free)
            ahead = min(most, _AHEAD * filling.left / filling.slots)
            request = stock.oldest(ahead) if filling.slots > 1 else None
            if request is None:
                request = stock.largest(most)
            if request is None:
                return
            prompt = self._prompts[request]
            filling.add(request, prompt, prompt, self._sequences[request])

    def _cost(self, added: list[float], slots: int) -> float:
        """Return what a wave costs, of which each worker gets so many of the ``added`` tokens."""
        terms = self._terms
        mean = sum(added) / len(added)
        kv = max(map(float.__add__, self._kv_load, added)) - max(self._kv_load)
        return (
            max(added) - _PREFILL_WORTH * mean + terms.kv_token * (kv - _KV_WORTH * mean) - terms.slot * slots
        )
