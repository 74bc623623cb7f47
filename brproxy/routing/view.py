"""What a routing policy sees: one barrier group at one instant, as arrays or as lists.

A view is a snapshot. Policies never write to it; what a round changes lives in the round's own copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from brproxy.step_costs import StepCosts
from brproxy.types import BrproxyError, InvalidInputError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

KV_UNLIMITED_TOKENS = 1 << 60
"""Stands for "no known KV capacity": larger than any load, small enough to subtract from without overflow."""

SLOTS_UNLIMITED = 1 << 40
"""Stands for "as many as you like": what an early-binding policy is shown, since the worker queues."""

NOT_ADMITTED = -1
"""In a routing decision: the request stays in the pool."""


class RoutingError(BrproxyError):
    """A policy's or a predictor's answer is not what its interface says."""


class Home(NamedTuple):
    """Where the beginning of a waiting request is probably cached: ``place``, and what that is worth there.

    ``discount_tokens``: the worker counts as that much lighter for this request (KV tokens). Policies that
    take no affinity do not look at it.
    """

    place: int
    discount_tokens: float


@dataclass(slots=True)
class RoundState:
    """The G workers of one barrier group as lists, for choices that take one request at a time.

    The fields are those of ClusterView. Looking through lists of a few numbers costs a fraction of what a
    call on an array does, whatever it computes.
    """

    kv_tokens: list[int]
    requests: list[int]
    slots: list[int]
    slots_free: list[int]
    kv_capacity: list[int]
    kv_free: list[int]
    prefill_tokens: list[int]

    @staticmethod
    def of(view: ClusterView) -> RoundState:
        """Return the workers of ``view`` at the start of a round."""
        return RoundState(
            kv_tokens=view.kv_tokens.tolist(),
            requests=view.requests.tolist(),
            slots=view.slots.tolist(),
            slots_free=view.slots_free.tolist(),
            kv_capacity=view.kv_capacity.tolist(),
            kv_free=view.kv_free.tolist(),
            prefill_tokens=[0] * view.workers
            if view.prefill_tokens is None
            else view.prefill_tokens.tolist(),
        )

    def only(self, present: Sequence[int]) -> RoundState:
        """Return the workers that ``present`` (indices) names, in its order."""
        fields = (
            *(self.kv_tokens, self.requests, self.slots, self.slots_free),
            *(self.kv_capacity, self.kv_free, self.prefill_tokens),
        )
        return RoundState(*([field[g] for g in present] for field in fields))

    def eligible(self, prompt_tokens: int) -> list[int]:
        """Return the workers with a free slot and KV room for a prompt, in index order."""
        free = zip(self.slots_free, self.kv_free, strict=True)
        return [g for g, (slots, kv) in enumerate(free) if slots > 0 and kv >= prompt_tokens]

    def fits(self, worker: int, prompt_tokens: int) -> bool:
        """Tell whether a worker has a free slot, and KV room for a prompt."""
        return self.slots_free[worker] > 0 and self.kv_free[worker] >= prompt_tokens

    def admit(self, worker: int, prompt_tokens: int, sequences: int = 1) -> None:
        """Book a request, so that the rest of the round sees it."""
        self.kv_tokens[worker] += prompt_tokens
        self.requests[worker] += sequences
        self.slots_free[worker] -= sequences
        self.kv_free[worker] -= prompt_tokens
        self.prefill_tokens[worker] += prompt_tokens


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a round may know beside who is where; the fields are those of ClusterView.

    ``forecast`` None: the load now is all there is.
    """

    forecast: FloatArray | None = None
    turnover_steps: float = 1.0
    lookahead_turnovers: float = 1.0
    growth_foreseen: float = 0.0
    costs: StepCosts | None = None
    waited: Sequence[float] | None = None
    held_s: float = 0.0
    wait_s_max: float = 1.0


@dataclass(frozen=True, slots=True)
class ClusterView:
    """G workers of one barrier group and N waiting requests, oldest first.

    ``kv_tokens[G]``: booked load L_g, the KV tokens of everything bound to the worker.
    ``requests[G]``: bound requests, running and queued in the worker; one of n sequences counts as n.
    ``slots[G]``: most sequences the worker runs at once.
    ``slots_free[G]``: slots that are left; 0 for a worker that must not be chosen. A request needs one, and
    takes one for each of its sequences.
    ``kv_capacity[G]``, ``kv_free[G]``: KV tokens in all and left; KV_UNLIMITED_TOKENS where unknown.
    ``prompt_tokens[N]``: s_i of each waiting request.
    ``passed_over[N]``: younger requests that were admitted before it.
    ``waited[N]``: the share of the pool's limit in time that each has waited, 1 when it is to be sent away;
    None: nobody has waited for as long as matters to the policy (``RoutingPolicy.WAITED_FROM``).
    ``wait_s_max``: that limit (seconds).
    ``sequences[N]``: how many each decodes side by side; None: each one.
    ``homes[N]``: where each is at home, None where nothing is known; None: none of them is.
    ``forecast[G, H+1]``: expected load 0, 1, …, H decode steps ahead; column 0 is ``kv_tokens``.
    ``turnover_steps``: decode steps between two sequences that leave a worker, mean output / those that run.
    ``lookahead_turnovers``: how many of those the forecast is worth looking ahead.
    ``growth_foreseen``: how much of the growth until the next departure the forecast has (share).
    ``prefill_tokens[G]``: prompts that are booked and have yet to be prefilled; None: nobody counts them.
    ``costs``: what a step costs; None: nobody knows.
    ``held_s``: how long slots have been left free although requests wait (seconds).
    """

    kv_tokens: IntArray
    requests: IntArray
    slots: IntArray
    slots_free: IntArray
    kv_capacity: IntArray
    kv_free: IntArray
    prompt_tokens: IntArray
    passed_over: IntArray
    forecast: FloatArray
    turnover_steps: float = 1.0
    lookahead_turnovers: float = 1.0
    sequences: IntArray | None = None
    prefill_tokens: IntArray | None = None
    homes: Sequence[Home | None] | None = None
    growth_foreseen: float = 0.0
    costs: StepCosts | None = None
    waited: FloatArray | None = None
    held_s: float = 0.0
    wait_s_max: float = 1.0

    def __post_init__(self) -> None:
        """Refuse arrays whose shapes do not belong together; every policy relies on that."""
        workers = len(self.kv_tokens)
        if workers == 0:
            msg = "a barrier group needs at least one worker"
            raise InvalidInputError(msg)
        shape = self.kv_tokens.shape
        if not (
            shape == self.requests.shape == self.slots.shape == self.slots_free.shape
            and shape == self.kv_capacity.shape == self.kv_free.shape
        ):
            msg = f"every per-worker array must have shape ({workers},)"
            raise InvalidInputError(msg)
        if self.prefill_tokens is not None and self.prefill_tokens.shape != shape:
            msg = f"prefill_tokens must have shape ({workers},)"
            raise InvalidInputError(msg)
        if self.passed_over.shape != self.prompt_tokens.shape:
            msg = "passed_over and prompt_tokens must have the same shape (N,)"
            raise InvalidInputError(msg)
        if self.waited is not None and self.waited.shape != self.prompt_tokens.shape:
            msg = "waited and prompt_tokens must have the same shape (N,)"
            raise InvalidInputError(msg)
        if self.sequences is not None and self.sequences.shape != self.prompt_tokens.shape:
            msg = "sequences and prompt_tokens must have the same shape (N,)"
            raise InvalidInputError(msg)
        if self.homes is not None and len(self.homes) != self.waiting:
            msg = "homes must be as many as prompt_tokens, N"
            raise InvalidInputError(msg)
        if self.forecast.ndim != 2 or len(self.forecast) != workers or self.forecast.shape[1] < 1:
            msg = f"forecast must have shape ({workers}, H+1), got {self.forecast.shape}"
            raise InvalidInputError(msg)

    @staticmethod
    def of(
        state: RoundState,
        prompt_tokens: Sequence[int],
        passed_over: Sequence[int],
        outlook: Outlook | None = None,
        sequences: Sequence[int] | None = None,
        homes: Sequence[Home | None] | None = None,
    ) -> ClusterView:
        """Return the view of ``state`` and what waits; without an outlook, the load now is all there is."""
        kv_tokens = np.array(state.kv_tokens, dtype=np.int64)
        outlook = outlook or Outlook()
        forecast = outlook.forecast
        return ClusterView(
            kv_tokens=kv_tokens,
            requests=np.array(state.requests, dtype=np.int64),
            slots=np.array(state.slots, dtype=np.int64),
            slots_free=np.array(state.slots_free, dtype=np.int64),
            kv_capacity=np.array(state.kv_capacity, dtype=np.int64),
            kv_free=np.array(state.kv_free, dtype=np.int64),
            prompt_tokens=np.array(prompt_tokens, dtype=np.int64),
            passed_over=np.array(passed_over, dtype=np.int64),
            forecast=kv_tokens.astype(np.float64)[:, None] if forecast is None else forecast,
            turnover_steps=outlook.turnover_steps,
            lookahead_turnovers=outlook.lookahead_turnovers,
            sequences=None if sequences is None else np.array(sequences, dtype=np.int64),
            prefill_tokens=np.array(state.prefill_tokens, dtype=np.int64),
            homes=homes,
            growth_foreseen=outlook.growth_foreseen,
            costs=outlook.costs,
            waited=None if outlook.waited is None else np.array(outlook.waited, dtype=np.float64),
            held_s=outlook.held_s,
            wait_s_max=outlook.wait_s_max,
        )

    @property
    def workers(self) -> int:
        """G, the workers of the group."""
        return len(self.kv_tokens)

    def each_sequences(self) -> list[int]:
        """Return how many sequences each of the waiting requests has."""
        return [1] * self.waiting if self.sequences is None else self.sequences.tolist()

    def each_home(self) -> Sequence[Home | None]:
        """Return where each of the waiting requests is at home."""
        return [None] * self.waiting if self.homes is None else self.homes

    @property
    def waiting(self) -> int:
        """N, the waiting requests that the round may admit."""
        return len(self.prompt_tokens)


def checked(worker: int, state: RoundState) -> int:
    """Return ``worker``; raises RoutingError for none that a round over ``state`` may choose."""
    if worker != NOT_ADMITTED and (worker < 0 or state.slots_free[worker] <= 0):
        msg = f"worker {worker} cannot be chosen"
        raise RoutingError(msg)
    return worker
