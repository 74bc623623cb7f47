"""The barrier-step model of a DP deployment. Pure: no time, no sockets, randomness as an argument.

All workers step together. A step takes ``t0 + a · max_g L_g`` plus the prefill work in it, the slowest
worker's again; L_g are the KV tokens of the requests that run on worker g (``cluster_settings`` has more that
a step may cost). Each running request decodes one token a step, or several at random.

As in a continuous-batching engine every worker has slots, a KV capacity and a first-come queue; when the KV
cache would overflow, the newest running requests are pushed back to the queue's front and later recomputed,
prompt and output so far.

Prefill is whole or in chunks: a worker then prefills so many tokens in a step, of those that came first, and
what is begun holds its slot and all its room while only the KV that is there is load. A request decodes its
first token in the step that ends its prefill.

A request whose KV comes from elsewhere is *loading* from the moment that it has a slot and room until
``loaded`` says that all is there; it then runs without prefill. KV that a worker keeps for somebody else is
reserved: it takes room and costs no time.

Running requests are columns of one array in order of admission, so that a step is array arithmetic.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from brproxy.types import InvalidInputError
from loadgen.cluster_settings import TOKENS_PER_STEP_MAX, ClusterSettings, FloatArray, IntArray

BoolArray = NDArray[np.bool_]

_ID, _WORKER, _PROMPT, _DECODED, _OUTPUT, _MISSING = range(6)
"""What is known of a running request; the last: tokens that have yet to be prefilled."""


@dataclass(slots=True)
class _Queued:
    request_id: int
    prompt_tokens: int
    output_tokens: int
    decoded_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of its prompt that need no prefill."""
    remote: bool = False
    """Whether its KV is still to come from elsewhere."""
    loaded: bool = False
    """Whether its KV came, so that there is nothing to prefill."""

    @property
    def prefill_tokens(self) -> int:
        if self.remote or self.loaded:
            return 0
        return self.prompt_tokens + self.decoded_tokens - self.cached_tokens

    @property
    def kv_tokens(self) -> int:
        return self.prompt_tokens + self.decoded_tokens + 1


# Not frozen: one of each is made every step, and to set what is takes three times as long.
@dataclass(slots=True)
class Step:
    """A step that has begun: how long it takes, and what makes it so.

    ``kv_tokens`` and ``prefill_tokens`` of each worker, int64[G]; ``work``: what its KV tokens weigh, in
    those of a plain worker (G); ``admitted``: who got a slot for it.
    """

    duration_s: float
    kv_tokens: IntArray
    prefill_tokens: IntArray
    work: IntArray | FloatArray
    admitted: list[int]


@dataclass(slots=True)
class StepResult:
    """What a step did: the requests that decoded (int64[K]) and which of them are done (bool[K]).

    ``output_tokens``: how many each of them decoded (int64[K]); None: one.
    """

    request_ids: IntArray
    finished: BoolArray
    output_tokens: IntArray | None = None


class Cluster:
    """The running and queued requests of every worker; ``rng`` draws how many tokens each decodes."""

    def __init__(self, settings: ClusterSettings, rng: np.random.Generator | None = None) -> None:
        self.settings = settings
        self._rng = rng or np.random.default_rng(0)
        self._slots = settings.worker_slots
        self.preempted = [0] * settings.workers
        self._queues: list[deque[_Queued]] = [deque() for _ in range(settings.workers)]
        self._queued: dict[int, int] = {}
        self._loading: dict[int, tuple[int, _Queued]] = {}
        self._reserved = np.zeros(settings.workers, dtype=np.int64)
        self._rows = np.empty((6, 0), dtype=np.int64)
        self._prefilling = False

    @property
    def running(self) -> IntArray:
        """Requests that run on each worker, int64[G]."""
        return np.bincount(self._rows[_WORKER], minlength=self.settings.workers)

    @property
    def preemptions(self) -> int:
        """Requests that were pushed back so far, on all workers."""
        return sum(self.preempted)

    @property
    def queued(self) -> list[int]:
        """Requests that wait in each worker's queue or for their KV."""
        loading = self._loading_requests()
        return [len(queue) + int(more) for queue, more in zip(self._queues, loading, strict=True)]

    @property
    def queued_tokens(self) -> list[int]:
        """Tokens that each worker has to prefill for the requests in its queue."""
        return [sum(q.prefill_tokens for q in queue) for queue in self._queues]

    @property
    def kv_tokens(self) -> IntArray:
        """Load L_g of each worker, int64[G]."""
        rows = self._rows
        return self._sums(rows[_PROMPT] + rows[_DECODED] - rows[_MISSING])

    @property
    def loading(self) -> list[int]:
        """Ids of the requests that have a slot and room, and wait for their KV."""
        return list(self._loading)

    def is_loading(self, request_id: int) -> bool:
        """Tell whether a request is among those."""
        return request_id in self._loading

    @property
    def kv_used_tokens(self) -> IntArray:
        """Tokens that take room on each worker, int64[G]: load, what is yet to be prefilled, and reserved."""
        rows = self._rows
        return self._sums(rows[_PROMPT] + rows[_DECODED]) + self._reserved

    def reserve(self, worker: int, kv_tokens: int) -> None:
        """Take room for ``kv_tokens`` tokens on ``worker``; fewer than none gives room back."""
        self._reserved[worker] += kv_tokens

    def check(self, prompt_tokens: int, output_tokens: int) -> None:
        """Raise InvalidInputError for a request that can never fit on any worker."""
        capacity = self.settings.kv_capacity_tokens
        if prompt_tokens < 0 or output_tokens < 1:
            msg = f"a request needs a prompt and an output, got {prompt_tokens} and {output_tokens} tokens"
            raise InvalidInputError(msg)
        if capacity is not None and prompt_tokens + output_tokens > capacity:
            msg = f"{prompt_tokens} + {output_tokens} tokens exceed the KV capacity of {capacity} tokens"
            raise InvalidInputError(msg)

    def submit(
        self,
        request_id: int,
        worker: int,
        prompt_tokens: int,
        output_tokens: int,
        *,
        remote: bool = False,
        cached_tokens: int = 0,
    ) -> None:
        """Queue a request on ``worker``; raises InvalidInputError when it can never fit there.

        ``remote``: its prompt's KV comes from elsewhere, see ``loading`` and ``loaded``. ``cached_tokens`` of
        it need no prefill; they are KV load like the others.
        """
        self.check(prompt_tokens, output_tokens)
        request = _Queued(request_id, prompt_tokens, output_tokens, 0, cached_tokens, remote)
        self._queues[worker].append(request)
        self._queued[request_id] = worker

    def loaded(self, request_id: int) -> None:
        """Take in that the KV of a loading request is there: it runs next. Unknown ids are ignored."""
        entry = self._loading.pop(request_id, None)
        if entry is None:
            return
        worker, request = entry
        self.reserve(worker, -request.kv_tokens)
        request.remote, request.loaded = False, True
        self._queues[worker].appendleft(request)
        self._queued[request_id] = worker

    def cancel(self, request_id: int) -> None:
        """Forget a request in any state; its slot and KV are free at once. Unknown ids are ignored."""
        if request_id in self._loading:
            worker, request = self._loading.pop(request_id)
            self.reserve(worker, -request.kv_tokens)
            return
        if request_id in self._queued:
            worker = self._queued.pop(request_id)
            queue = self._queues[worker]
            self._queues[worker] = deque(q for q in queue if q.request_id != request_id)
            return
        self._keep(self._rows[_ID] != request_id)

    def begin_step(self) -> Step | None:
        """Admit from the queues and return the step that begins; None when there is nothing to run."""
        self._preempt()
        prefill_tokens, admitted = self._prefill()
        if not self._rows.shape[1]:
            return None
        settings, kv_tokens = self.settings, self.kv_tokens
        work = settings.work(kv_tokens, prefill_tokens)
        requests_max = int(self.running.max()) if settings.step_s_per_request else 0
        duration_s = settings.step_s(work, prefill_tokens, requests_max)
        return Step(duration_s, kv_tokens, prefill_tokens, work, admitted)

    def end_step(self) -> StepResult:
        """Decode for every request whose prefill is over and let those that are done leave."""
        rows = self._rows
        decodes = rows[_MISSING] == 0 if self._prefilling else np.True_
        tokens = None if self.settings.tokens_per_step == 1 else self._drawn_tokens() * decodes
        rows[_DECODED] += decodes if tokens is None else tokens
        finished = rows[_DECODED] >= rows[_OUTPUT]
        result = StepResult(rows[_ID], finished, tokens)
        if self._prefilling:
            those = None if tokens is None else tokens[decodes]
            result = StepResult(rows[_ID][decodes], finished[decodes], those)
        if finished.any():
            self._keep(~finished)
        return result

    def _drawn_tokens(self) -> IntArray:
        """Return how many tokens each running request decodes: one at first, then 1 to 3 to its end."""
        rows = self._rows
        predicted = TOKENS_PER_STEP_MAX - 1
        share = (self.settings.tokens_per_step - 1) / predicted
        more = self._rng.binomial(predicted, share, rows.shape[1]) * (rows[_DECODED] > 0)
        tokens: IntArray = np.minimum(1 + more, rows[_OUTPUT] - rows[_DECODED])
        return tokens

    def _prefill(self) -> tuple[IntArray, list[int]]:
        """Go on with what is begun and move queued requests into free slots, as far as a step goes.

        Return the prompt tokens that the step prefills, int64[G], and who got a slot.
        """
        prefill_tokens = np.zeros(self.settings.workers, dtype=np.int64)
        if not self._queued and not self._prefilling:
            return prefill_tokens, []
        left = self._prefill_left()
        rows = self._rows
        if self._prefilling:
            for row in np.flatnonzero(rows[_MISSING]).tolist():
                worker = int(rows[_WORKER, row])
                tokens = int(min(rows[_MISSING, row], left[worker]))
                rows[_MISSING, row] -= tokens
                left[worker] -= tokens
                prefill_tokens[worker] += tokens
        admitted: list[tuple[int, _Queued, int]] = []
        if self._queued:
            for worker, request in self._admit(left):
                tokens = int(min(request.prefill_tokens, left[worker]))
                left[worker] -= tokens
                prefill_tokens[worker] += tokens
                admitted.append((worker, request, request.prefill_tokens - tokens))
            self._append(admitted)
        self._prefilling = self.settings.prefill_tokens_max is not None and bool(self._rows[_MISSING].any())
        return prefill_tokens, [request.request_id for _, request, _ in admitted]

    def _prefill_left(self) -> list[float]:
        """Return how many tokens each worker can prefill in a step beside those that it decodes."""
        most = self.settings.prefill_tokens_max
        if most is None:
            return [math.inf] * self.settings.workers
        rows = self._rows
        decoding = np.bincount(rows[_WORKER], rows[_MISSING] == 0, minlength=self.settings.workers)
        return [most - count for count in decoding.tolist()]

    def _admit(self, left: list[float]) -> Iterator[tuple[int, _Queued]]:
        """Take from the queues who has a slot and room; with nothing ``left`` to prefill others wait."""
        running, kv_tokens = self.running, self.kv_used_tokens
        loading = self._loading_requests()
        for worker, queue in enumerate(self._queues):
            slots = self._slots[worker] - int(running[worker] + loading[worker])
            kv_free = self._kv_free(worker, running, kv_tokens)
            while queue and slots > 0 and queue[0].kv_tokens <= kv_free:
                if queue[0].prefill_tokens and left[worker] <= 0:
                    break
                request = queue.popleft()
                del self._queued[request.request_id]
                slots -= 1
                kv_free -= request.kv_tokens
                if request.remote:
                    self._loading[request.request_id] = (worker, request)
                    self.reserve(worker, request.kv_tokens)
                else:
                    yield worker, request

    def _kv_free(self, worker: int, running: IntArray, kv_tokens: IntArray) -> float:
        if self.settings.kv_capacity_tokens is None:
            return float("inf")
        # Every running request is about to decode more.
        growth = self.settings.tokens_in_step_max
        return self.settings.kv_capacity_tokens - int(kv_tokens[worker] + growth * running[worker])

    def _loading_requests(self) -> IntArray:
        """Return the requests that are loading on each worker, int64[G]."""
        workers = [worker for worker, _ in self._loading.values()]
        return np.bincount(np.array(workers, dtype=np.int64), minlength=self.settings.workers)

    def _preempt(self) -> None:
        """Push the newest requests of an overflowing worker back to the front of its queue."""
        capacity = self.settings.kv_capacity_tokens
        if capacity is None or not self._rows.shape[1]:
            return
        growth = self.settings.tokens_in_step_max
        overflowing = np.flatnonzero(self.kv_used_tokens + growth * self.running > capacity)
        for worker in overflowing.tolist():
            columns = np.flatnonzero(self._rows[_WORKER] == worker)
            needs = (self._rows[_PROMPT] + self._rows[_DECODED] + growth)[columns]
            # At least the oldest stays: alone it fits, or it would not have been taken. What is reserved may
            # be in its way and will go again: until then the worker has more than it can hold.
            room = capacity - self._reserved[worker]
            kept = max(1, int(np.searchsorted(np.cumsum(needs), room, side="right")))
            self._push_back(worker, columns[kept:])

    def _push_back(self, worker: int, columns: IntArray) -> None:
        for column in columns[::-1].tolist():
            request_id, _, prompt, decoded, output, _ = self._rows[:, column].tolist()
            self._queues[worker].appendleft(_Queued(request_id, prompt, output, decoded))
            self._queued[request_id] = worker
        self.preempted[worker] += len(columns)
        keep = np.ones(self._rows.shape[1], dtype=bool)
        keep[columns] = False
        self._keep(keep)

    def _append(self, admitted: list[tuple[int, _Queued, int]]) -> None:
        if not admitted:
            return
        columns = [
            (r.request_id, worker, r.prompt_tokens, r.decoded_tokens, r.output_tokens, missing)
            for worker, r, missing in admitted
        ]
        self._rows = np.concatenate((self._rows, np.array(columns, dtype=np.int64).T), axis=1)

    def _keep(self, columns: BoolArray) -> None:
        self._rows = self._rows[:, columns]

    def _sums(self, tokens: IntArray) -> IntArray:
        """Return the sum over each worker's requests, int64[G]."""
        # Added up as floats, which are exact as far as any load goes.
        return np.bincount(self._rows[_WORKER], tokens, minlength=self.settings.workers).astype(np.int64)
