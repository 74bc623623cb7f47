"""What passes through a group, as windows of some steps each: how long, what load, which prefills. Pure.

Nothing here runs for a token. The ledger is looked at about twice a second, and two looks make a window: the
requests that decoded at both have each grown by one token a step, so that their mean growth counts the steps
between, also where chunks carry several tokens. A look is of an instant in which a step has just ended, as a
request's last token says, and is read a little later, when all tokens of that step have come: so a window is
of whole steps.

A step here is one token of each request, see step_costs.py: that is what growth counts.

Prompts come to the windows in which they were prefilled by their first tokens. What several workers prefill
in one step holds all up by the largest, so a window has the sum of that over its steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from brproxy.happenings import Observer
from brproxy.ledger import Ledger
from brproxy.lifecycle import Entry, Event
from brproxy.roster import Member
from brproxy.step_chunks import Prefill, prefill_sums
from brproxy.types import RequestId

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

HELD_S = 8.0
"""Longest until a window is told (seconds): what is prefilled in it in chunks has its first token only later.
It is told as soon as none is left that was bound and had not begun at its end."""

STEPS_MIN = 2.0
"""Steps of a window at least: with fewer it goes on until the next look."""

_COUNT_ERROR = 0.01
"""And the standard error of their count at most, relative: few requests whose events carry several tokens
count badly, the better the longer."""

_LONGEST_S = 4.0
"""But no window is longer, if a look comes (seconds): load varies in it."""

_WINDOWS_HELD_MAX = 64
_PREFILLS_MAX = 4096

_GREW_LIKE_OTHERS = (0.5, 2.0)
"""Growth over the median of a request that counts steps: one that was preempted, or whose client does not
read, grew by less, and one whose count was corrected by what it was off."""


class Pace(NamedTuple):
    """What is known of a group's steps: their base, and what a KV token makes one longer by (seconds).

    And what a prompt token does, for each of ``step_chunks.CHUNKS``, of which ``chunk`` holds (tokens).
    """

    base_s: float
    s_per_kv_token: float
    s_per_prefill_token: Sequence[float]
    chunk: int | None

    def plain_s(self, kv_tokens: FloatArray) -> float:
        """Return how long a step takes that prefills nothing (seconds)."""
        return self.base_s + self.s_per_kv_token * float(kv_tokens.max(initial=0.0))


class Window(NamedTuple):
    """Some steps in a row: ``steps`` of them ``between_s``, two times in seconds.

    ``before`` and ``after``: KV tokens of each of ``members`` at both ends, float64[G]. ``prefill_tokens``:
    the sum over the steps of ``max_g P_g``, the prompt tokens of the worker that prefills most, for each of
    ``step_chunks.CHUNKS``; ``prefills`` are those that it may be of.
    """

    between_s: tuple[float, float]
    steps: float
    before: FloatArray
    after: FloatArray
    prefills: tuple[Prefill, ...]
    prefill_tokens: tuple[float, ...]
    members: tuple[Member, ...]

    @property
    def duration_s(self) -> float:
        """How long the steps took together (seconds)."""
        return self.between_s[1] - self.between_s[0]

    def at_pace(self, pace: Pace) -> Window:
        """Return the window with its prompts summed up by what is known of the group now."""
        plain_s = pace.plain_s(self.after)
        sums = prefill_sums(self.prefills, self.between_s, self.steps, plain_s, pace.s_per_prefill_token)
        return self._replace(prefill_tokens=sums)


class _Look(NamedTuple):
    """The group when a step had just ended: ids and output tokens of the requests that decode, by id.

    ``unbegun`` are the ids of those that are bound and have no token, in order. ``kv_tokens`` are the load of
    the step that comes, ``kv_ran`` that of the one that has ended.
    """

    at_s: float
    ids: IntArray
    unbegun: IntArray
    output_tokens: IntArray
    kv_tokens: FloatArray
    kv_ran: FloatArray
    members: tuple[Member, ...]


class _Held(NamedTuple):
    """A window that is not told yet."""

    steps: float
    before: _Look
    after: _Look


class StepWindows(Observer):
    """The windows of the group whose ledger this is; it is told of the group's happenings.

    ``pace`` is what is known of it, None: nothing yet.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.pace: Pace | None = None
        self._ledger = ledger
        self._read_s = float("-inf")
        self._begun = np.empty(0, dtype=np.int64)
        self._unbegun = np.empty(0, dtype=np.int64)
        self._last: _Look | None = None
        self._held: deque[_Held] = deque(maxlen=_WINDOWS_HELD_MAX)
        # As they are, since a worker may say only later what it had cached of a prompt.
        self._prefills: deque[Entry] = deque(maxlen=_PREFILLS_MAX)
        self._step_s_min = float("inf")

    def ended(self, entry: Entry, event: Event, waited_s: float | None) -> None:
        """See Observer.ended: one that has begun since the last look was prefilled since."""
        if entry.first_token_s is not None and entry.first_token_s > self._read_s:
            self._prefills.append(entry)

    def look(self, at_s: float, read_s: float) -> list[Window]:
        """Look at the ledger, where all that was streamed until ``at_s`` is booked; a step ended then.

        ``read_s`` is now (seconds). Returns the windows that can be told by now.
        """
        look, begun = self._look(at_s)
        for request_id in begun[~_among(begun, self._begun)].tolist():
            self._prefilled(self._ledger.entry(RequestId(request_id)))
        self._begun, self._read_s = begun, read_s
        before = self._last
        if before is None or before.members != look.members or look.at_s <= before.at_s:
            self._last = look
            return self._told(read_s)
        steps, error = _steps(before, look)
        is_good = steps >= STEPS_MIN and error <= _COUNT_ERROR * steps
        if is_good or at_s - before.at_s >= _LONGEST_S:
            self._last = look
            if steps >= STEPS_MIN:
                self._held.append(_Held(steps, before, look))
                self._step_s_min = min(self._step_s_min, (at_s - before.at_s) / steps)
        return self._told(read_s)

    def _look(self, at_s: float) -> tuple[_Look, IntArray]:
        """Return the group as it is, and the ids of all requests that have begun, in order."""
        active, ids = self._ledger.active(), self._ledger.row_ids()
        members = tuple(self._ledger.roster.members)
        begun = active.output_tokens > 0
        # What is bound beyond a worker's slots waits in its engine, and that may be what has not begun; what
        # comes in several chunks does not decode before the last one.
        sequences = self._ledger.sequences
        is_over = np.array([sequences[m.index] > m.limits.slots for m in members], dtype=bool)
        runs = begun | ~is_over[active.worker]
        if self.pace is not None and self.pace.chunk is not None:
            runs &= begun | (active.kv_tokens <= self.pace.chunk)
        # What has just been bound comes with the next step; what streams nothing ran already.
        unbegun, ran = np.sort(ids[~begun]), begun | (runs & _among(ids, self._unbegun))
        self._unbegun = unbegun
        offset = np.array(self._ledger.offset_by_place())
        kv_tokens, kv_ran = (
            np.maximum(np.bincount(active.worker[rows], active.kv_tokens[rows], len(members)) + offset, 0.0)
            for rows in (runs, ran)
        )
        # Of several sequences some end before the others, and what rests grows no more.
        counts = begun if active.sequences is None else begun & (active.sequences == 1)
        in_order = np.argsort(ids[counts])
        outputs = active.output_tokens[counts][in_order]
        look = _Look(at_s, ids[counts][in_order], unbegun, outputs, kv_tokens, kv_ran, members)
        return look, np.sort(ids[begun])

    def _prefilled(self, entry: Entry) -> None:
        if entry.first_token_s is not None:
            self._prefills.append(entry)

    def _told(self, read_s: float) -> list[Window]:
        told = []
        while self._held and self._is_over(self._held[0].after, read_s):
            told.append(self._window(self._held.popleft()))
        if told:
            # Chunks come before their first token: what is before all windows is in none of them.
            oldest_s = self._held[0].before.at_s if self._held else read_s - HELD_S
            while self._prefills and _first_token_s(self._prefills[0]) < oldest_s - HELD_S:
                self._prefills.popleft()
        return told

    def _is_over(self, end: _Look, read_s: float) -> bool:
        """Tell whether all that was prefilled before ``end`` has shown, or has had its time."""
        return end.at_s + HELD_S <= read_s or not _among(end.unbegun, self._unbegun).any()

    def _window(self, held: _Held) -> Window:
        steps, before, after = held
        between_s = before.at_s, after.at_s
        prefills = tuple(
            Prefill(first_token_s, entry.worker, entry.uncached_tokens)
            for entry in self._prefills
            if (first_token_s := _first_token_s(entry)) > before.at_s
        )
        sums = prefill_sums(prefills, between_s, steps, self._step_s_min) if self.pace is None else ()
        window = Window(between_s, steps, before.kv_tokens, after.kv_ran, prefills, sums, after.members)
        return window if self.pace is None else window.at_pace(self.pace)


def _first_token_s(entry: Entry) -> float:
    return float("-inf") if entry.first_token_s is None else entry.first_token_s


def _steps(before: _Look, after: _Look) -> tuple[float, float]:
    """Return the steps between two looks and their standard error, 0 where nobody decoded all the time."""
    stayed = _among(after.ids, before.ids)
    if not stayed.any():
        return 0.0, 0.0
    rows = np.searchsorted(before.ids, after.ids[stayed])
    grown = after.output_tokens[stayed] - before.output_tokens[rows]
    median = float(np.median(grown))
    least, most = (share * median for share in _GREW_LIKE_OTHERS)
    counted = grown[(grown >= least) & (grown <= most)]
    if median <= 0:
        return 0.0, 0.0
    return float(counted.mean()), float(counted.std() / np.sqrt(len(counted)))


def _among(ids: IntArray, in_order: IntArray) -> NDArray[np.bool_]:
    """Tell which of ``ids`` are among those ``in_order``, bool as ``ids``."""
    if not len(in_order):
        return np.zeros(len(ids), dtype=bool)
    rows = np.minimum(np.searchsorted(in_order, ids), len(in_order) - 1)
    result: NDArray[np.bool_] = in_order[rows] == ids
    return result
