"""What a DP deployment is in the barrier-step model: its size, and what a step of it costs. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from brproxy.step_costs import StepCosts
from brproxy.types import InvalidInputError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

DISPATCH_STEPS_MAX = 1000
"""A router that is so many steps behind is none."""

TOKENS_PER_STEP_MAX = 3
"""Most tokens that a request decodes in a step: its own, and two that were predicted with it."""

SLOWNESS_MAX = 1000.0
"""A worker that takes so many times as long is down."""


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """A deployment: ``step_base_s`` is t0, ``step_s_per_kv_token`` is a; seconds and tokens throughout.

    ``prefill_tokens_max``: most prompt tokens that a worker prefills in one step, less what it decodes in it
    (chunked prefill, as vLLM's ``max_num_batched_tokens``); None: whole prompts, as many as there are.
    ``decode_factor_under_prefill``: in a step in which a worker prefills its KV tokens cost so many times as
    much (attention kernels that are made for one of the two). ``step_s_per_request``: cost of a request of
    the worker that runs most, whose number counts as the next one of ``batch_buckets`` (increasing; captured
    graphs pad to those); beyond the last, and without any, as it is.
    ``tokens_per_step``: mean number of tokens that a request decodes in a step, 1 to 3 at random
    (multi-token prediction); the first step of a request gives one.
    ``slots_each`` and ``slowness``, one for each worker: its slots in place of ``slots``, and how many times
    as long its KV and prefill tokens take.
    ``dispatch_steps``: how many steps later a request takes part than the one in which a router decides on
    it; only the simulator looks at it, in a real or emulated deployment it follows from the network.
    """

    workers: int = 8
    slots: int = 64
    kv_capacity_tokens: int | None = None
    step_base_s: float = 0.030
    step_s_per_kv_token: float = 100e-9
    prefill_s_per_token: float = 0.0
    prefill_tokens_max: int | None = None
    dispatch_steps: int = 1
    decode_factor_under_prefill: float = 1.0
    step_s_per_request: float = 0.0
    batch_buckets: tuple[int, ...] = ()
    tokens_per_step: float = 1.0
    slots_each: tuple[int, ...] = ()
    slowness: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what is no deployment."""
        for mistake in (*self._size_mistakes(), *self._cost_mistakes()):
            raise InvalidInputError(mistake)

    def _size_mistakes(self) -> Iterator[str]:
        if self.workers < 1 or self.slots < 1:
            yield f"workers and slots must be at least 1, got {self.workers} and {self.slots}"
        if self.kv_capacity_tokens is not None and self.kv_capacity_tokens < 1:
            yield f"kv_capacity_tokens must be at least 1, got {self.kv_capacity_tokens}"
        for name, values in (("slots_each", self.slots_each), ("slowness", self.slowness)):
            if values and len(values) != self.workers:
                yield f"{name} must have one value for each of {self.workers} workers, got {len(values)}"
        if min(self.worker_slots, default=0) < 1:
            yield f"slots_each must be at least 1 each, got {list(self.slots_each)}"
        most = max(self.worker_slots, default=0)
        if self.prefill_tokens_max is not None and self.prefill_tokens_max < most:
            # As engines refuse it: with every slot decoding but one, nothing would ever be prefilled.
            yield f"prefill_tokens_max must be at least the slots, {most}, got {self.prefill_tokens_max}"
        if not 0 <= self.dispatch_steps <= DISPATCH_STEPS_MAX:
            yield f"dispatch_steps must be 0 to {DISPATCH_STEPS_MAX}, got {self.dispatch_steps}"

    def _cost_mistakes(self) -> Iterator[str]:
        per_token = self.step_s_per_kv_token, self.prefill_s_per_token, self.step_s_per_request
        if not (0 < self.step_base_s < math.inf and all(0 <= cost < math.inf for cost in per_token)):
            yield "step_base_s must be positive, the cost of KV and prefill tokens and requests at least 0"
        if not 1 <= self.decode_factor_under_prefill < math.inf:
            yield f"decode_factor_under_prefill must be at least 1, got {self.decode_factor_under_prefill}"
        buckets = list(self.batch_buckets)
        if buckets != sorted(set(buckets)) or (buckets and buckets[0] < 1):
            yield f"batch_buckets must increase, from at least 1, got {buckets}"
        if not 1 <= self.tokens_per_step <= TOKENS_PER_STEP_MAX:
            yield f"tokens_per_step must be 1 to {TOKENS_PER_STEP_MAX}, got {self.tokens_per_step}"
        if not all(0 < slowness <= SLOWNESS_MAX for slowness in self.slowness):
            yield f"slowness must be above 0 and at most {SLOWNESS_MAX:g}, got {list(self.slowness)}"

    @property
    def worker_slots(self) -> tuple[int, ...]:
        """Return the slots of each worker."""
        return self.slots_each or (self.slots,) * self.workers

    @property
    def tokens_in_step_max(self) -> int:
        """Return the most tokens that a request decodes in a step."""
        return TOKENS_PER_STEP_MAX if self.tokens_per_step > 1 else 1

    @property
    def costs(self) -> StepCosts:
        """Return what a step costs, as a router may know it."""
        # Slowness is told relative to the group's mean.
        mean = sum(self.slowness) / len(self.slowness) if self.slowness else 1.0
        costs = StepCosts(
            self.step_base_s,
            self.step_s_per_kv_token * mean,
            self.prefill_s_per_token * mean,
            self.prefill_tokens_max,
            tuple(slowness / mean for slowness in self.slowness) or None,
        )
        return costs.of_a_token(self.tokens_per_step)

    def work(self, kv_tokens: IntArray, prefill_tokens: IntArray) -> IntArray | FloatArray:
        """Return what the workers' KV tokens weigh in a step, in KV tokens of a plain worker, float64[G].

        With nothing unequal, that is ``kv_tokens`` themselves.
        """
        work: IntArray | FloatArray = kv_tokens
        if self.decode_factor_under_prefill > 1:
            work = np.where(prefill_tokens > 0, self.decode_factor_under_prefill, 1.0) * work
        return work * np.array(self.slowness) if self.slowness else work

    def step_s(self, work: IntArray | FloatArray, prefill_tokens: IntArray, requests_max: int) -> float:
        """Return what a step takes (s) with that ``work`` and ``prefill_tokens`` of each worker (G).

        ``requests_max`` run on the worker that runs most.
        """
        prefill = prefill_tokens * np.array(self.slowness) if self.slowness else prefill_tokens
        return (
            self.step_base_s
            + self.step_s_per_kv_token * float(work.max())
            + self.prefill_s_per_token * float(prefill.max())
            + self.step_s_per_request * self.bucket(requests_max)
        )

    def bucket(self, requests: int) -> int:
        """Return what a number of requests is padded to."""
        place = bisect_left(self.batch_buckets, requests)
        return self.batch_buckets[place] if place < len(self.batch_buckets) else requests
