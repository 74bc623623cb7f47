"""The barrier-step model of a DP deployment. Pure: no time, no sockets, no randomness.

All workers step together. A step takes ``t0 + a · max_g L_g`` plus the prefill work in it, the slowest
worker's again; L_g are the KV tokens of the requests that run on worker g. Each running request decodes one
token a step. As in a continuous-batching engine every worker has slots, a KV capacity and a first-come
queue; when the KV cache would overflow, the newest running requests are pushed back to the queue's front and
later recomputed, prompt and output so far.

A request whose KV comes from elsewhere is *loading* from the moment that it has a slot and room until
``loaded`` says that all is there; it then runs without prefill. KV that a worker keeps for somebody else is
reserved: it takes room and costs no time.

Running requests are rows of parallel arrays in order of admission, so that a step is array arithmetic.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from brproxy.types import InvalidInputError

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

DISPATCH_STEPS_MAX = 1000
"""A router that is so many steps behind is none."""


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """A deployment: ``step_base_s`` is t0, ``step_s_per_kv_token`` is a; seconds and tokens throughout.

    ``dispatch_steps``: how many steps later a request takes part than the one in which a router decides on
    it; only the simulator looks at it, in a real or emulated deployment it follows from the network.
    """

    workers: int = 8
    slots: int = 64
    kv_capacity_tokens: int | None = None
    step_base_s: float = 0.030
    step_s_per_kv_token: float = 100e-9
    prefill_s_per_token: float = 0.0
    dispatch_steps: int = 1

    def __post_init__(self) -> None:
        """Refuse what is no deployment."""
        if self.workers < 1 or self.slots < 1:
            msg = f"workers and slots must be at least 1, got {self.workers} and {self.slots}"
            raise InvalidInputError(msg)
        if self.kv_capacity_tokens is not None and self.kv_capacity_tokens < 1:
            msg = f"kv_capacity_tokens must be at least 1, got {self.kv_capacity_tokens}"
            raise InvalidInputError(msg)
        if self.step_base_s <= 0 or self.step_s_per_kv_token < 0 or self.prefill_s_per_token < 0:
            msg = "step_base_s must be positive, the cost of KV and prefill tokens at least 0"
            raise InvalidInputError(msg)
        if not 0 <= self.dispatch_steps <= DISPATCH_STEPS_MAX:
            msg = f"dispatch_steps must be 0 to {DISPATCH_STEPS_MAX}, got {self.dispatch_steps}"
            raise InvalidInputError(msg)


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


@dataclass(frozen=True, slots=True)
class Step:
    """A step that has begun: how long it takes, and the load that makes it so (int64[G])."""

    duration_s: float
    kv_tokens: IntArray


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did: the requests that decoded a token (int64[K]) and which of them are done (bool[K])."""

    request_ids: IntArray
    finished: BoolArray


class Cluster:
    """The running and queued requests of every worker."""

    def __init__(self, settings: ClusterSettings) -> None:
        self.settings = settings
        self.preempted = [0] * settings.workers
        self._queues: list[deque[_Queued]] = [deque() for _ in range(settings.workers)]
        self._queued: dict[int, int] = {}
        self._loading: dict[int, tuple[int, _Queued]] = {}
        self._reserved = np.zeros(settings.workers, dtype=np.int64)
        self._ids = np.empty(0, dtype=np.int64)
        self._worker = np.empty(0, dtype=np.int64)
        self._prompt = np.empty(0, dtype=np.int64)
        self._decoded = np.empty(0, dtype=np.int64)
        self._output = np.empty(0, dtype=np.int64)

    @property
    def running(self) -> IntArray:
        """Requests that run on each worker, int64[G]."""
        return np.bincount(self._worker, minlength=self.settings.workers)

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
        kv = np.bincount(self._worker, self._prompt + self._decoded, minlength=self.settings.workers)
        return kv.astype(np.int64)

    @property
    def loading(self) -> list[int]:
        """Ids of the requests that have a slot and room, and wait for their KV."""
        return list(self._loading)

    def is_loading(self, request_id: int) -> bool:
        """Tell whether a request is among those."""
        return request_id in self._loading

    @property
    def kv_used_tokens(self) -> IntArray:
        """Tokens that take room on each worker: its load, and what is reserved, int64[G]."""
        return self.kv_tokens + self._reserved

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
        self._keep(self._ids != request_id)

    def begin_step(self) -> Step | None:
        """Admit from the queues and return the step that begins; None when there is nothing to run."""
        self._preempt()
        prefill_tokens = self._admit()
        if not len(self._ids):
            return None
        kv_tokens = self.kv_tokens
        settings = self.settings
        duration_s = (
            settings.step_base_s
            + settings.step_s_per_kv_token * float(kv_tokens.max())
            + settings.prefill_s_per_token * float(prefill_tokens.max())
        )
        return Step(duration_s, kv_tokens)

    def end_step(self) -> StepResult:
        """Decode a token for every running request and let those that are done leave."""
        self._decoded += 1
        result = StepResult(self._ids, self._decoded >= self._output)
        if result.finished.any():
            self._keep(~result.finished)
        return result

    def _admit(self) -> IntArray:
        """Move queued requests into free slots; return the prompt tokens to prefill, int64[G]."""
        prefill_tokens = np.zeros(self.settings.workers, dtype=np.int64)
        if not self._queued:
            return prefill_tokens
        running, kv_tokens = self.running, self.kv_used_tokens
        loading = self._loading_requests()
        admitted: list[tuple[int, _Queued]] = []
        for worker, queue in enumerate(self._queues):
            slots = self.settings.slots - int(running[worker] + loading[worker])
            kv_free = self._kv_free(worker, running, kv_tokens)
            while queue and slots > 0 and queue[0].kv_tokens <= kv_free:
                request = queue.popleft()
                del self._queued[request.request_id]
                slots -= 1
                kv_free -= request.kv_tokens
                if request.remote:
                    self._loading[request.request_id] = (worker, request)
                    self.reserve(worker, request.kv_tokens)
                else:
                    admitted.append((worker, request))
                    prefill_tokens[worker] += request.prefill_tokens
        self._append(admitted)
        return prefill_tokens

    def _kv_free(self, worker: int, running: IntArray, kv_tokens: IntArray) -> float:
        if self.settings.kv_capacity_tokens is None:
            return float("inf")
        # Every running request is about to decode one more token.
        return self.settings.kv_capacity_tokens - int(kv_tokens[worker] + running[worker])

    def _loading_requests(self) -> IntArray:
        """Return the requests that are loading on each worker, int64[G]."""
        workers = [worker for worker, _ in self._loading.values()]
        return np.bincount(np.array(workers, dtype=np.int64), minlength=self.settings.workers)

    def _preempt(self) -> None:
        """Push the newest requests of an overflowing worker back to the front of its queue."""
        capacity = self.settings.kv_capacity_tokens
        if capacity is None or not len(self._ids):
            return
        room = capacity - self._reserved
        overflowing = np.flatnonzero(self.kv_tokens + self.running > room)
        for worker in overflowing.tolist():
            rows = np.flatnonzero(self._worker == worker)
            needs = (self._prompt + self._decoded + 1)[rows]
            # At least the oldest stays: alone it fits, or it would not have been taken. What is reserved may
            # be in its way and will go again: until then the worker has more than it can hold.
            kept = max(1, int(np.searchsorted(np.cumsum(needs), room[worker], side="right")))
            self._push_back(worker, rows[kept:])

    def _push_back(self, worker: int, rows: IntArray) -> None:
        for row in rows[::-1].tolist():
            request = _Queued(
                int(self._ids[row]), int(self._prompt[row]), int(self._output[row]), int(self._decoded[row])
            )
            self._queues[worker].appendleft(request)
            self._queued[request.request_id] = worker
        self.preempted[worker] += len(rows)
        keep = np.ones(len(self._ids), dtype=bool)
        keep[rows] = False
        self._keep(keep)

    def _append(self, admitted: list[tuple[int, _Queued]]) -> None:
        if not admitted:
            return
        columns = np.array(
            [(r.request_id, w, r.prompt_tokens, r.decoded_tokens, r.output_tokens) for w, r in admitted],
            dtype=np.int64,
        ).T
        old = (self._ids, self._worker, self._prompt, self._decoded, self._output)
        self._ids, self._worker, self._prompt, self._decoded, self._output = (
            np.concatenate(pair) for pair in zip(old, columns, strict=True)
        )

    def _keep(self, rows: BoolArray) -> None:
        self._ids, self._worker, self._prompt, self._decoded, self._output = (
            column[rows] for column in (self._ids, self._worker, self._prompt, self._decoded, self._output)
        )
