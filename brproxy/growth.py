"""Room for requests to grow: what of a worker's KV capacity a round must not give away. Pure.

A request that is admitted into the last free token has the engine preempt another one in the next step, as
all that run grow. So a round sees less room than there is: what running requests and newcomers are *expected*
to hold at the worst moment to come (requests that end give back more than the others grow, mostly, but not in
a group that has just been filled) must fit, and beside it a share of the capacity, for chance: between two
requests that leave a worker those that stay grow by about a mean output together, now and then by several.

With F(h) the expected load of a worker h steps ahead without newcomers, S(h) the probability that one of
those runs for longer, and C the capacity without that share, P prompt tokens and k sequences of newcomers fit
where::

    F(h) + S(h) · (P + k h) <= C    for all h

k is as many as fit with prompts as long as those that wait are on average; a round may leave a little of the
room, which the next one sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from brproxy.faults import Faults
from brproxy.ledger import Ledger
from brproxy.lifecycle import Entry
from brproxy.prediction.predictor import LENGTH_UNLIMITED, ActiveRequests, AnyPredictor
from brproxy.routing.view import KV_UNLIMITED_TOKENS, FloatArray, RoundState

_STEPS = np.array([0, *(int(8 * 1.25**n) for n in range(37))], dtype=np.int64)
"""How far ahead the load is looked at (decode steps): up to 24,652, the more coarsely, the further."""

_SURVIVAL_MIN = 1e-9
"""A newcomer is as good as gone where its survival is less."""

_MEANS_MAX = 2.0
"""Where there is room for all to grow by so many mean outputs nobody looks ahead: they grow by less."""

_NEWCOMER = ActiveRequests(
    worker=np.zeros(1, dtype=np.int64),
    kv_tokens=np.zeros(1, dtype=np.int64),
    output_tokens=np.zeros(1, dtype=np.int64),
    curve=np.zeros(1, dtype=np.int64),
    length_max=np.full(1, LENGTH_UNLIMITED, dtype=np.int64),
    certain=np.zeros(1, dtype=bool),
)


class GrowthRoom:
    """Leaves room to grow on the workers of ``ledger``, as ``predictor`` expects it."""

    def __init__(self, ledger: Ledger, predictor: AnyPredictor, faults: Faults) -> None:
        self._ledger = ledger
        self._predictor = predictor
        self._faults = faults

    def leave(self, state: RoundState, waiting: Sequence[Entry], share: float) -> None:
        """Take from ``state`` what is to be left free by a round over ``waiting``.

        ``share`` of each worker's capacity is left for chance (0: nothing is left at all). A worker that runs
        nothing takes any one request that its capacity has room for. The room of policies that bind early is
        unlimited, as the worker queues; so nothing is taken from it.
        """
        if share <= 0 or not waiting or min(state.kv_free) >= KV_UNLIMITED_TOKENS >> 1:
            return
        prompts = [entry.prompt_tokens for entry in waiting]
        if not self._is_tight(state, prompts):
            return
        capacity = np.array(state.kv_capacity, dtype=np.float64) * (1.0 - share)
        try:
            room, sequences = self._room(state, capacity, sum(prompts) / len(prompts))
        except Exception as error:  # noqa: BLE001 - whatever a predictor raises, the round goes on
            self._faults.note("predictor", error)
            room = capacity - np.array(state.kv_tokens, dtype=np.float64)
            sequences = np.array(state.slots_free, dtype=np.float64)
        largest = max(prompts)
        left = zip(np.maximum(room, 0.0).astype(np.int64).tolist(), sequences.tolist(), strict=True)
        for worker, (tokens, count) in enumerate(left):
            if state.kv_capacity[worker] >= KV_UNLIMITED_TOKENS:
                continue
            slots_free = state.slots_free[worker]
            if state.requests[worker] == 0 and largest > tokens:
                # It would never have more room for this one.
                state.slots_free[worker] = min(slots_free, 1)
                continue
            state.kv_free[worker] = min(state.kv_free[worker], tokens)
            state.slots_free[worker] = min(slots_free, int(count))

    def _is_tight(self, state: RoundState, prompts: Sequence[int]) -> bool:
        """Tell whether some worker might have too little room for what it has and what may come."""
        growth = _MEANS_MAX * self._predictor.mean_output_tokens
        waiting, tokens, largest = len(prompts), sum(prompts), max(prompts)
        rows = zip(state.kv_free, state.requests, state.slots_free, strict=True)
        return any(
            slots > 0 and kv_free < min(tokens, slots * largest) + growth * (requests + min(slots, waiting))
            for kv_free, requests, slots in rows
        )

    def _room(
        self, state: RoundState, capacity: FloatArray, prompt_tokens_mean: float
    ) -> tuple[FloatArray, FloatArray]:
        """Return how many prompt tokens and how many sequences each worker may be given, float64[G]."""
        load = self._predictor.load_at(self._ledger.active(), len(capacity), _STEPS)
        # What is not booked stays: nobody knows when it goes.
        load += (np.array(state.kv_tokens) - load[:, 0])[:, None]
        survival = np.maximum(self._predictor.survival_at(_NEWCOMER, _STEPS)[0], _SURVIVAL_MIN)
        most = (capacity[:, None] - load) / survival
        each = np.maximum(prompt_tokens_mean + _STEPS, 1.0)
        sequences = np.maximum(np.floor((most / each).min(axis=1)), 1.0)
        return (most - sequences[:, None] * _STEPS).min(axis=1), sequences
