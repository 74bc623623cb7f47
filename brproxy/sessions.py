"""Which worker last served a session of a group, and how much of it that worker probably has cached. Pure.

A session is known by keys: the name that its client gives it, or what its messages were. What is kept is
bounded in number, the least recently used go first, and in age. A worker that went out or away has lost its
cache as far as anybody knows, and one through which more tokens have gone since than its KV cache has room
for beside what runs has evicted the session's: engines evict what was used least recently.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from brproxy.happenings import Observer
from brproxy.ledger import Ledger
from brproxy.lifecycle import NO_WORKER, Entry, Event
from brproxy.roster import Change, Member
from brproxy.routing.view import Home
from brproxy.types import TOKENS_MAX, WorkerIndex

_HAS_LOST_ITS_CACHE = frozenset({Change.ADDED, Change.GONE, Change.UNHEALTHY})


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """``sessions_max`` are remembered, each for ``kept_s`` seconds after its last request was bound.

    A cache holds whole blocks of ``block_tokens``. A cached token counts for ``discount`` KV tokens of load.
    """

    sessions_max: int = 65_536
    kept_s: float = 600.0
    block_tokens: int = 16
    discount: float = 1.0


class _Served(NamedTuple):
    """What is kept of a session: who served it, ``cached_tokens`` of it, and when (seconds).

    ``times_lost`` and ``through_tokens`` are the worker's at that time.
    """

    worker: WorkerIndex
    cached_tokens: int
    bound_s: float
    times_lost: int
    through_tokens: int


class Sessions(Observer):
    """The sessions of one group, learnt from requests that end.

    Of requests that belong to a session ``new`` had nothing cached anywhere, ``hits`` went where they had,
    with ``cached_tokens`` in all, and ``moved`` went elsewhere.
    """

    def __init__(self, ledger: Ledger, limits: SessionLimits) -> None:
        self._ledger = ledger
        self._roster = ledger.roster
        self._limits = limits
        self._served: OrderedDict[int, _Served] = OrderedDict()
        # By index of the member: how often it lost its cache, and what has gone through it (tokens).
        self._times_lost: dict[int, int] = {}
        self._through: dict[int, int] = {}
        self.new = self.hits = self.moved = self.cached_tokens = 0
        self._roster.observe(self._member_changed)

    def __len__(self) -> int:
        """Return how many keys are remembered."""
        return len(self._served)

    def recall(self, entry: Entry, now_s: float) -> None:
        """Note on a request that has come where it is at home, if it is anywhere."""
        block = self._limits.block_tokens
        for key in entry.request.session_keys:
            served = self._served.get(key)
            if served is None:
                continue
            if not self._is_cached(served, now_s):
                del self._served[key]
                continue
            self._served.move_to_end(key)
            if entry.request.goes_on:
                most = min(TOKENS_MAX, self._ledger.kv_capacity_tokens_max)
                entry.prompt_tokens = min(entry.prompt_tokens + served.cached_tokens, most)
            # The last token of a prompt is always computed: its logits are what the first output comes from.
            before_last = max(entry.prompt_tokens - 1, 0) // block * block
            entry.home, entry.cached_tokens = served.worker, min(served.cached_tokens, before_last)
            return

    def home(self, entry: Entry) -> Home | None:
        """Return where a request is at home, for a round; None without a home, or once that has gone."""
        if not entry.cached_tokens:
            return None
        index, place = int(entry.home), self._roster.place
        present = self._roster.present
        if present is not None and index not in present:
            return None
        discount_tokens = self._limits.discount * entry.cached_tokens
        return Home(index if place is None else int(place[index]), discount_tokens)

    def homes(self, waiting: Sequence[Entry]) -> list[Home | None] | None:
        """Return where each of those that wait is at home; None if none of them is."""
        homes = [self.home(entry) if entry.cached_tokens else None for entry in waiting]
        return homes if any(homes) else None

    def bound(self, entry: Entry, waited_s: float) -> None:
        """See Observer.bound."""
        if not entry.request.session_keys:
            return
        if entry.home == NO_WORKER:
            self.new += 1
        elif entry.home == entry.worker:
            self.hits += 1
            self.cached_tokens += entry.cached_tokens
        else:
            self.moved += 1

    def ended(self, entry: Entry, event: Event, waited_s: float | None) -> None:
        """See Observer.ended."""
        worker = entry.worker
        if worker == NO_WORKER or entry.bound_s is None:
            return
        tokens = entry.prompt_tokens + entry.output_tokens
        through = self._through[worker] = self._through.get(worker, 0) + tokens
        # Whoever leaves in the middle leaves a cache behind, too; of a failure nobody knows.
        is_cached = event is Event.FINISH or (event is Event.CANCEL and entry.first_token_s is not None)
        keys = entry.request.session_keys
        if not (keys and is_cached and entry.sequences):
            return
        of_one = entry.prompt_tokens + entry.output_tokens // entry.sequences
        cached_tokens = of_one - of_one % self._limits.block_tokens
        lost = self._times_lost.get(worker, 0)
        self._served[keys[0]] = _Served(worker, cached_tokens, entry.bound_s, lost, through)
        self._served.move_to_end(keys[0])
        if len(self._served) > self._limits.sessions_max:
            self._served.popitem(last=False)

    def _is_cached(self, served: _Served, now_s: float) -> bool:
        worker = served.worker
        if now_s - served.bound_s > self._limits.kept_s:
            return False
        if self._times_lost.get(worker, 0) != served.times_lost:
            return False
        capacity = self._roster.member(worker).limits.kv_capacity_tokens
        if capacity is None:
            return True
        room = capacity - self._ledger.load()[worker]
        return self._through[worker] - served.through_tokens <= room

    def _member_changed(self, member: Member, change: Change) -> None:
        if change in _HAS_LOST_ITS_CACHE:
            self._times_lost[member.index] = self._times_lost.get(member.index, 0) + 1
