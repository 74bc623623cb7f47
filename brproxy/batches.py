"""Closed batches, such as rollouts: requests that count once all of them are done go longest first. Pure.

A request names its batch. Those of a batch that wait change places among themselves, and with nobody else:
who is not of it waits as long as without batches. The longest expected goes first, so that no long one is
left to begin when all others are done.

What is expected of a prompt is the mean length of its outputs, those of its *siblings* in the batch included:
with T tokens in the d siblings that have ended, x_i in those that run, and a prior of κ outputs of m tokens::

    (T + Σ_i (x_i - m)+ + κ m) / (d + κ)

The prior is what the predictor had learnt of that very prompt when its first sibling came, in an earlier
epoch, say; of a prompt that it does not know it is the batch's own mean, with κ = 1. (Of lengths without
memory all tokens of those that run would count, see Epstein and Sobel 1953, "Life testing". But until an
output is as long as expected it tells little. The architecture's decisions have what either gives.) Of
prompts of which as much is expected those go first of which fewest have begun: a prompt tells most by its
first samples.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from itertools import islice

import numpy as np

from brproxy.dispatcher import Dispatcher
from brproxy.happenings import Happenings, Observer
from brproxy.ledger import Ledger
from brproxy.lifecycle import Entry, Event
from brproxy.prediction.predictor import (
    CERTAIN_OUTPUTS,
    NOTHING_KNOWN,
    Expectation,
    FloatArray,
)
from brproxy.roster import Member
from brproxy.types import PendingRequest, RequestId
from brproxy.waiting import Growth

_UNKNOWN_OUTPUTS = 1.0
"""κ where nothing is known of a prompt."""

_BEYOND = 16
"""Requests of a batch, beyond those there are slots for, that a round may choose from.

More of them balance prompts better, and send a short one before a long one more often.
"""

_OTHERS = 0
"""Number of all the prompts of a batch that there was no room for."""

_COLUMNS = 5
_BEGUN, _ENDED, _TOKENS, _PRIOR_TOKENS, _PRIOR_OUTPUTS = range(_COLUMNS)
"""What is known of a prompt: outputs that have begun, that ended, the tokens of these, and its prior."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """``batches_max`` are known at once, each for ``kept_s`` seconds after its last request came.

    ``prompts_max`` prompts of all of them together are told apart. A request of one batch more is served as
    one of none.
    """

    batches_max: int = 64
    prompts_max: int = 65_536
    kept_s: float = 600.0


class _Batch:
    """One batch: what is known of its prompts, by number, and which of its requests wait and run."""

    def __init__(self) -> None:
        self.last_s = 0.0
        self.count = self.placed = 0
        self.numbers: dict[int, int] = {}
        self.waiting: dict[int, dict[RequestId, Entry]] = {}
        self.running: dict[RequestId, tuple[Entry, int]] = {}
        self.rows = np.zeros((16, _COLUMNS))
        self.add(NOTHING_KNOWN)

    @property
    def is_idle(self) -> bool:
        """Whether none of its requests waits or runs."""
        return not (self.waiting or self.running)

    def add(self, expectation: Expectation) -> int:
        """Return the number of one more prompt."""
        number = self.count
        if number == len(self.rows):
            self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)])
        self.rows[number, _PRIOR_TOKENS:] = expectation
        self.count += 1
        return number

    def place(self, entry: Entry, number: int) -> None:
        """Have a request wait in a place."""
        self.waiting.setdefault(number, {})[entry.id] = entry
        self.placed += 1

    def leave(self, request_id: RequestId, number: int) -> None:
        """Take a request from those that wait in a place, if it does."""
        siblings = self.waiting.get(number, {})
        if siblings.pop(request_id, None) is None:
            return
        self.placed -= 1
        if not siblings:
            del self.waiting[number]

    def expected_tokens(self, ledger: Ledger, mean_tokens: float) -> FloatArray:
        """Return how long an output of each prompt is expected to get (tokens, float64[P]).

        ``mean_tokens``: what is expected before any of the batch has run.
        """
        _, ended, tokens, prior, outputs = self.rows[: self.count].T
        running = self.running.values()
        streamed = ledger.streamed([entry for entry, _ in running])
        numbers = np.array([number for _, number in running], dtype=np.int64)
        mean = (tokens.sum() + streamed.sum() + mean_tokens) / (ended.sum() + 1.0)
        is_known = outputs > 0
        prior = np.where(is_known, prior, mean)
        outputs = np.where(is_known, outputs, _UNKNOWN_OUTPUTS)
        beyond = np.bincount(numbers, np.maximum(streamed - prior[numbers], 0.0), minlength=self.count)
        expected: FloatArray = (tokens + beyond + outputs * prior) / (ended + outputs)
        return expected

    def in_turn(self, expected_tokens: FloatArray) -> Iterator[Entry]:
        """Yield those that wait: the longest expected first, of equals those of which fewest have begun.

        Lazily: a round looks at few, and there may be thousands of prompts.
        """
        numbers = np.fromiter(self.waiting, dtype=np.int64, count=len(self.waiting))
        longest, begun = -expected_tokens[numbers], self.rows[numbers, _BEGUN]
        order = np.lexsort((numbers, begun, longest))
        siblings: dict[int, Iterator[Entry]] = {}
        # Those of which one has had its turn are behind their equals.
        again: list[tuple[float, float, int]] = []
        for position in order:
            turn = float(longest[position]), float(begun[position]), int(numbers[position])
            while again and again[0] < turn:
                yield from self._next(again, siblings)
            heappush(again, turn)
        while again:
            yield from self._next(again, siblings)

    def _next(
        self, again: list[tuple[float, float, int]], siblings: dict[int, Iterator[Entry]]
    ) -> Iterator[Entry]:
        """Yield the oldest of the first prompt of ``again``, which has its next turn behind its equals."""
        longest, begun, number = again[0]
        if number not in siblings:
            siblings[number] = iter(self.waiting[number].values())
        entry = next(siblings[number], None)
        if entry is None:
            heappop(again)
        else:
            heapreplace(again, (longest, begun + 1.0, number))
            yield entry


class Batches(Observer):
    """The batches of one group, told what happens to its requests: a discipline for those that wait."""

    def __init__(self, dispatcher: Dispatcher, limits: BatchLimits) -> None:
        self.limits = limits
        self._costs = dispatcher.costs
        self._ledger = dispatcher.ledger
        self._predictor = dispatcher.predictor
        self._faults = dispatcher.faults
        self._mean_tokens = 1.0
        # The one that a request came to last is at the end.
        self._batches: OrderedDict[str, _Batch] = OrderedDict()
        self._prompts = 0
        # Of each request of a batch that has not ended: the batch, and the number of its prompt there.
        self._known: dict[RequestId, tuple[_Batch, int]] = {}

    def __len__(self) -> int:
        """Return how many batches are known."""
        return len(self._batches)

    def in_turn(self, entries: Collection[Entry], slots_free: int) -> Iterable[Entry | None]:
        """Return who gets the place of each of ``entries``, see ``waiting.Discipline``."""
        return self._turns(entries, slots_free) if self._known else entries

    def growth(self, waiting: Sequence[Entry]) -> Growth | None:
        """Return what is expected to come, see ``waiting.Foreseer``; None if not all are of one batch.

        Nor where prefill holds up decoding: there prompts go in step first of all. What has become longer
        than expected is taken to go on for half as long again. Of what runs besides nobody knows.
        """
        known = [self._known.get(entry.id) for entry in waiting]
        batch = known[0][0] if known[0] else None
        costs = self._costs()
        prefills = costs is not None and costs.s_per_prefill_token > 0
        if batch is None or prefills or any(each is None or each[0] is not batch for each in known):
            return None
        expected = self._expected_tokens(batch)
        running = [entry for entry, _ in batch.running.values()]
        streamed = self._ledger.streamed(running)
        more = expected[[number for _, number in batch.running.values()] or slice(0)] - streamed
        more = np.where(more > 0, more, streamed / 2) * [entry.sequences for entry in running]
        workers = np.array([entry.worker for entry in running], dtype=np.int64)
        of_workers = np.bincount(workers, more, len(self._ledger.requests)).tolist()
        numbers = [each[1] for each in known if each]
        more_of = (expected[numbers] * [entry.sequences for entry in waiting]).tolist()
        present = self._ledger.roster.present
        return Growth(more_of, of_workers if present is None else [of_workers[g] for g in present])

    def arrived(self, entry: Entry) -> None:
        """See Observer.arrived."""
        if not entry.request.batch or not entry.sequences:
            return
        batch = self._find(entry.request.batch, entry.arrived_s)
        if batch is None:
            return
        number = self._number(batch, entry.request)
        self._known[entry.id] = batch, number
        # Who may not go everywhere has no place, and only teaches the others.
        if not entry.avoid:
            batch.place(entry, number)

    def bound(self, entry: Entry, waited_s: float) -> None:
        """See Observer.bound."""
        known = self._known.get(entry.id)
        if known is not None:
            batch, number = known
            batch.leave(entry.id, number)
            batch.running[entry.id] = entry, number
            batch.rows[number, _BEGUN] += 1

    def retried(self, entry: Entry, member: Member) -> None:
        """See Observer.retried."""
        known = self._known.get(entry.id)
        if known is not None:
            batch, number = known
            del batch.running[entry.id]
            batch.rows[number, _BEGUN] -= 1

    def ended(self, entry: Entry, event: Event, waited_s: float | None) -> None:
        """See Observer.ended. One that its client left, or its worker failed, teaches nothing."""
        known = self._known.pop(entry.id, None)
        if known is None:
            return
        batch, number = known
        batch.leave(entry.id, number)
        if batch.running.pop(entry.id, None) and event is Event.FINISH and entry.output_tokens:
            batch.rows[number, _ENDED] += 1
            batch.rows[number, _TOKENS] += entry.output_tokens / max(1, entry.sequences)

    def _turns(self, entries: Collection[Entry], slots_free: int) -> Iterator[Entry | None]:
        shown = slots_free + _BEYOND
        hidden = sum(max(batch.placed - shown, 0) for batch in self._batches.values())
        left = len(entries) - hidden
        turns: dict[int, Iterator[Entry]] = {}
        for entry in entries:
            if not left:
                # Behind are only those that are hidden, and there may be many.
                return
            chosen: Entry | None = entry
            known = self._known.get(entry.id)
            if known is not None:
                batch, _ = known
                turn = turns.get(id(batch))
                if turn is None:
                    in_turn = batch.in_turn(self._expected_tokens(batch))
                    turn = turns[id(batch)] = islice(in_turn, shown)
                chosen = next(turn, None)
            left -= chosen is not None
            yield chosen

    def _expected_tokens(self, batch: _Batch) -> FloatArray:
        try:
            self._mean_tokens = self._predictor.mean_output_tokens
        except Exception as error:  # noqa: BLE001 - the last one will do
            self._faults.note("predictor", error)
        return batch.expected_tokens(self._ledger, self._mean_tokens)

    def _find(self, name: str, now_s: float) -> _Batch | None:
        """Return the batch of that name, to which a request comes; None if there is no room for another."""
        batch = self._batches.get(name)
        if batch is None:
            self._forget(now_s)
            if len(self._batches) >= self.limits.batches_max:
                return None
            batch = self._batches[name] = _Batch()
        batch.last_s = now_s
        self._batches.move_to_end(name)
        return batch

    def _forget(self, now_s: float) -> None:
        """Forget the batches that were kept for long enough, and if there is no room the oldest idle one."""
        idle = [name for name, batch in self._batches.items() if batch.is_idle]
        old = [name for name in idle if self._batches[name].last_s < now_s - self.limits.kept_s]
        if not old and len(self._batches) >= self.limits.batches_max:
            old = idle[:1]
        for name in old:
            self._prompts -= self._batches.pop(name).count - 1

    def _number(self, batch: _Batch, request: PendingRequest) -> int:
        """Return the number of a request's prompt in its batch."""
        key = request.prompt_hash
        number = None if key is None else batch.numbers.get(key)
        if number is not None:
            return number
        if self._prompts >= self.limits.prompts_max:
            return _OTHERS
        expectation = self._predictor.expectation(request)
        number = batch.add(expectation)
        self._prompts += 1
        # What is certain of one is not of its siblings.
        if key is not None and expectation.outputs < CERTAIN_OUTPUTS:
            batch.numbers[key] = number
        return number


class _FirstOfAll(Observer):
    """Has ``batches`` told of what happens from the first request of any batch on: mostly there is none."""

    def __init__(self, batches: Batches, happenings: Happenings) -> None:
        self._batches = batches
        self._happenings = happenings
        self._has_come = False

    def arrived(self, entry: Entry) -> None:
        """See Observer.arrived. Those that are told from now on are told of this one as well."""
        if entry.request.batch and not self._has_come:
            self._has_come = True
            self._happenings.tell(self._batches)


def take_batches(dispatcher: Dispatcher, limits: BatchLimits) -> Batches:
    """Have those that wait in a group go by their batches from now on."""
    batches = Batches(dispatcher, limits)
    dispatcher.happenings.tell(_FirstOfAll(batches, dispatcher.happenings))
    dispatcher.waiting.order_by(batches.in_turn)
    dispatcher.foreseer = batches.growth
    return batches
