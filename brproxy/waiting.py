"""Who waits for a worker, in which order, and who has waited too long. Pure.

Each request that comes has a *place*, behind all others. A discipline may have requests change places;
without one it is first come, first served. How often a place has been passed over stays with it, so that
whoever gets it has what was due to the one before. Two kinds of requests have no place and go first, in the
order in which they came: those that a worker failed, and those that take no slot.
How long each has waited has nothing to do with the order: expiry goes by age alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

from brproxy.lifecycle import Entry
from brproxy.routing.view import SLOTS_UNLIMITED
from brproxy.types import BrproxyError, InvalidInputError, RequestId, WorkerIndex

Discipline = Callable[[Collection[Entry], int], Iterable[Entry | None]]
"""Returns who gets each place: the same requests in the order of their turn, given those who have them now.

None: a round that has so many slots free (the second argument) need not see this place. Of those that it sees
it may let one overtake, and it may look at the first few only.
"""


class PoolFullError(BrproxyError):
    """The pool holds as many waiting requests as it may."""


class PromptTooLongError(InvalidInputError):
    """The prompt exceeds the KV capacity of every worker: waiting would never help."""


class Growth(NamedTuple):
    """What is expected to come in the end: of each that waits, and of all that each worker runs (tokens)."""

    of_waiting: Sequence[float]
    of_workers: Sequence[float]


Foreseer = Callable[[Sequence[Entry]], Growth | None]
"""Returns what those that wait, and workers by place, will grow by; None where that is not what counts."""


class WaitingRoom:
    """The requests of one group that wait for a worker; ``discipline`` None: first come, first served.

    ``count`` wait (requests), ``plural`` of them have several sequences.
    """

    def __init__(self, discipline: Discipline | None = None) -> None:
        self._discipline = discipline
        self._first: dict[RequestId, Entry] = {}
        # Who has each place; a place goes with the request that leaves it, the others stay where they are.
        self._places: dict[int, Entry] = {}
        self._next_place = 0
        # In the order in which they began to wait: new ones come last, whoever they are.
        self._by_age: dict[RequestId, Entry] = {}
        # Not asked for by a call: every arrival looks at it several times.
        self.count = 0
        self.plural = 0

    def __len__(self) -> int:
        """Return how many wait."""
        return self.count

    def __repr__(self) -> str:
        """Show the state in one line, for tests and logs."""
        # As it was seen last: to look gives nobody another place.
        return f"<WaitingRoom first={list(self._first)} in_turn={[e.id for e in self._places.values()]}>"

    def order_by(self, discipline: Discipline) -> None:
        """Have ``discipline`` say who gets which place from now on."""
        self._discipline = discipline

    @property
    def since_s(self) -> float | None:
        """When the one that has waited longest began to (seconds); None while none waits."""
        for entry in self._by_age.values():
            return entry.waiting_since_s
        return None

    def find(self, request_id: RequestId) -> Entry | None:
        """Return the request's entry if it waits."""
        return self._by_age.get(request_id)

    def enter(self, entry: Entry) -> None:
        """Have a request wait, since ``entry.waiting_since_s``; first if it was failed or takes no slot."""
        self._by_age[entry.id] = entry
        self.count += 1
        if entry.avoid or not entry.sequences:
            self._first[entry.id] = entry
        else:
            entry.place = self._next_place
            self._places[entry.place] = entry
            self._next_place += 1
        if entry.sequences > 1:
            self.plural += 1

    def leave(self, entry: Entry) -> None:
        """Let a request go; raises KeyError for one that does not wait."""
        del self._by_age[entry.id]
        self.count -= 1
        if not self._first or self._first.pop(entry.id, None) is None:
            del self._places[entry.place]
        if entry.sequences > 1:
            self.plural -= 1

    def alone(self) -> Entry | None:
        """Return the one request that waits, None if none or several do, or it is one that goes first."""
        if self.count != 1 or self._first:
            return None
        return next(iter(self._by_age.values()))

    def first(self) -> Sequence[Entry]:
        """Return those that go first, in the order in which they came."""
        return tuple(self._first.values())

    def in_turn(self, slots_free: int = SLOTS_UNLIMITED) -> Iterator[Entry]:
        """Iterate over the others in the order of their turn, as far as a round with so many slots sees them.

        Nobody may come or leave meanwhile.
        """
        others = self._places.values()
        if self._discipline is None:
            return iter(others)
        return self._given_places(self._discipline(others, slots_free))

    def _given_places(self, in_turn: Iterable[Entry | None]) -> Iterator[Entry]:
        """Yield those of ``in_turn``, each once it has the place that is its turn's."""
        places = self._places
        for place, chosen in zip(places, in_turn, strict=False):
            if chosen is None:
                continue
            before = places[place]
            if before is not chosen:
                places[place], places[chosen.place] = chosen, before
                chosen.place, before.place = place, chosen.place
                chosen.passed_over, before.passed_over = before.passed_over, chosen.passed_over
            yield chosen

    def forgive(self, worker: WorkerIndex) -> None:
        """Let those that ``worker`` failed go there again: it has come back, or is another one by now."""
        for entry in self._first.values():
            entry.avoid -= {worker}

    def cap_prompts(self, prompt_tokens_max: int) -> None:
        """Count the prompts of those that wait as ``prompt_tokens_max`` at most, so that they can be placed.

        Even one that was counted: it fitted when it came, and its engine says so if it no longer does.
        """
        for entry in self._by_age.values():
            entry.prompt_tokens = min(entry.prompt_tokens, prompt_tokens_max)

    def late(self, now_s: float, wait_s_max: float) -> list[Entry]:
        """Return those that have waited longer than ``wait_s_max`` seconds, the oldest first."""
        deadline_s = now_s - wait_s_max
        # By age: a scan that finds nothing costs one look.
        return list(takewhile(lambda entry: entry.waiting_since_s < deadline_s, self._by_age.values()))

    def waited(
        self, waiting: Sequence[Entry], now_s: float, wait_s_max: float, matters_from: float
    ) -> list[float] | None:
        """Return the share of ``wait_s_max`` seconds that each of ``waiting`` has waited.

        None where nobody who waits has waited for ``matters_from`` of it.
        """
        since_s = self.since_s
        if since_s is None or now_s - since_s < matters_from * wait_s_max:
            return None
        return [(now_s - entry.waiting_since_s) / wait_s_max for entry in waiting]

    @staticmethod
    def pass_over(waiting: Sequence[Entry], admitted: Sequence[int]) -> None:
        """Count the requests that overtake: of ``waiting``, in turn, ``admitted`` (positions) go.

        Each that stays has been passed over by those behind it that go.
        """
        position = 0
        for younger, next_admitted in zip(range(len(admitted), 0, -1), admitted, strict=True):
            for entry in waiting[position:next_admitted]:
                entry.passed_over += younger
            position = next_admitted + 1
