"""Prompts that are counted beside their requests: how many, whom to ask, what an answer changes. Pure.

A request is booked by its estimate at once, and its count is told here whenever it comes: to all that book
the prompt then, waiting or bound, and to whoever books it later (a second leg). What a worker has reported of
its own answer counts more: who takes that up sets ``count_number`` of the request to 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Final, Generic, TypeVar
from weakref import WeakKeyDictionary

from brproxy.dispatcher import Dispatcher
from brproxy.happenings import Observer
from brproxy.lifecycle import Entry
from brproxy.types import PendingRequest

OUTCOMES: Final = ("asked", "answered", "failed", "dropped")
"""What becomes of prompts: asked about, answered, failed (an error, or no time left), dropped: there was no
room to ask, or nobody to be asked, or they are none that can be counted."""


class Gate:
    """Lets questions through: ``in_flight_max`` at once, and ``per_second_max`` in a second on average.

    After a pause as many as that may come at one instant. Times are the caller's clock (seconds).
    """

    def __init__(self, in_flight_max: int, per_second_max: int) -> None:
        self._in_flight_max = in_flight_max
        self._per_second_max = per_second_max
        self._left = float(per_second_max)
        self._seen_s: float | None = None
        self.in_flight = 0

    def enter(self, now_s: float) -> bool:
        """Tell whether one more may go; it is counted until ``leave``."""
        if self._seen_s is not None and now_s > self._seen_s:
            more = (now_s - self._seen_s) * self._per_second_max
            self._left = min(self._left + more, self._per_second_max)
        self._seen_s = now_s if self._seen_s is None else max(now_s, self._seen_s)
        if self.in_flight >= self._in_flight_max or self._left < 1:
            return False
        self._left -= 1
        self.in_flight += 1
        return True

    def leave(self) -> None:
        """Note that one has come to its end."""
        self.in_flight -= 1


K = TypeVar("K")


class Pauses(Generic[K]):
    """Leaves those alone for ``pause_s`` seconds that have failed ``failures_max`` times in a row.

    After that one more failure is enough, until there is a success.
    """

    def __init__(self, failures_max: int, pause_s: float) -> None:
        self._failures_max = failures_max
        self._pause_s = pause_s
        # Weak: whoever has gone is forgotten.
        self._failures: WeakKeyDictionary[K, int] = WeakKeyDictionary()
        self._until_s: WeakKeyDictionary[K, float] = WeakKeyDictionary()

    def may_ask(self, who: K, now_s: float) -> bool:
        """Tell whether ``who`` may be asked."""
        return now_s >= self._until_s.get(who, now_s)

    def succeeded(self, who: K) -> None:
        """Note an answer."""
        self._failures.pop(who, None)
        self._until_s.pop(who, None)

    def failed(self, who: K, now_s: float) -> bool:
        """Note a failure; return whether it is the one that begins the first pause since a success."""
        failures = self._failures[who] = self._failures.get(who, 0) + 1
        if failures >= self._failures_max:
            self._until_s[who] = now_s + self._pause_s
        return failures == self._failures_max


@dataclass(slots=True)
class CountStats:
    """What came of counting so far: prompts by OUTCOMES, and tokens of those that were answered.

    ``error_tokens`` sums up how far each estimate was off, to either side.
    """

    prompts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    counted_tokens: int = 0
    estimated_tokens: int = 0
    error_tokens: int = 0

    def compare(self, estimate: int, counted: int) -> None:
        """Take in how a prompt was estimated, and what it is (tokens)."""
        self.counted_tokens += counted
        self.estimated_tokens += estimate
        self.error_tokens += abs(estimate - counted)


@dataclass(slots=True)
class _Open:
    """One prompt under way: its size once that is known, and who has booked it so far."""

    tokens: int | None = None
    booked: list[tuple[Dispatcher, Entry]] = field(default_factory=list)


class PromptCounts:
    """Brings counts to those that book the prompts, by the number that requests carry."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._open: dict[int, _Open] = {}

    def __len__(self) -> int:
        """Return how many prompts are under way."""
        return len(self._open)

    def watch(self, dispatcher: Dispatcher) -> None:
        """Have counts correct what the group of ``dispatcher`` books."""
        dispatcher.happenings.tell(_Watch(self, dispatcher))

    def begin(self, request: PendingRequest) -> int:
        """Give a request the number by which its count will be told."""
        number = request.count_number = next(self._numbers)
        self._open[number] = _Open()
        return number

    def end(self, number: int) -> None:
        """Forget a request: whatever is told of it after that changes nothing."""
        del self._open[number]

    def told(self, number: int, tokens: int) -> None:
        """Take in that a prompt is ``tokens``."""
        known = self._open.get(number)
        if known is None:
            return
        known.tokens = tokens
        for dispatcher, entry in known.booked:
            _correct(dispatcher, entry, tokens)

    def arrived(self, dispatcher: Dispatcher, entry: Entry) -> None:
        """Note that ``entry`` is booked with a prompt that may be counted."""
        known = self._open.get(entry.request.count_number)
        if known is None:
            return
        known.booked.append((dispatcher, entry))
        if known.tokens is not None:
            _correct(dispatcher, entry, known.tokens)


class _Watch(Observer):
    def __init__(self, counts: PromptCounts, dispatcher: Dispatcher) -> None:
        self._counts = counts
        self._dispatcher = dispatcher

    def arrived(self, entry: Entry) -> None:
        """See Observer.arrived."""
        self._counts.arrived(self._dispatcher, entry)


def _correct(dispatcher: Dispatcher, entry: Entry, tokens: int) -> None:
    # Unless its worker has reported what it is meanwhile.
    if entry.request.count_number:
        dispatcher.correct_prompt(entry, tokens)
