"""``loadgen bench``: what one decision round costs, in steady state, by size of the deployment.

The ledger is filled to a steady state: every slot taken by a request of random age. Before each round as many
requests end as a step of such a deployment ends, every other grows by a token, and the pool is filled up
again; only ``Dispatcher.decide`` is timed, forecast, policy and bookings included.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.ledger import Ledger, WorkerLimits
from brproxy.lifecycle import Event
from brproxy.prediction.predictor import make_predictor
from brproxy.routing.policy import POLICIES, make_policy
from brproxy.types import PendingRequest, RequestId, WorkerIndex
from loadgen.traces.synthetic import SYNTHETIC

_LAW = SYNTHETIC["proprietary"]
_FINISHED_BEFORE = 2000
_ROUNDS_BEFORE = 20


@dataclass(frozen=True, slots=True)
class BenchCase:
    """A deployment: G workers of ``slots`` each, ``waiting`` requests in the pool, horizon H (0: BR-0)."""

    workers: int
    slots: int
    waiting: int
    horizon_steps: int


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Seconds of a decision round, and the requests that it admitted on average."""

    case: BenchCase
    p50_s: float
    p99_s: float
    admitted: float


CASES = (
    BenchCase(8, 64, 200, 80),
    BenchCase(64, 64, 1000, 80),
    BenchCase(144, 64, 2000, 80),
    BenchCase(8, 64, 200, 0),
    BenchCase(8, 64, 200, 20),
    BenchCase(8, 64, 200, 320),
    BenchCase(8, 64, 2000, 80),
    BenchCase(8, 256, 200, 80),
    BenchCase(144, 64, 2000, 0),
)


def bench(case: BenchCase, rounds: int, seed: int) -> BenchResult:
    """Time ``rounds`` decision rounds of ``case``."""
    steady = _SteadyState(case, np.random.default_rng(seed))
    for _ in range(_ROUNDS_BEFORE):
        steady.round()
    # As the proxy does once it has started.
    gc.collect()
    gc.freeze()
    timed = [steady.round() for _ in range(rounds)]
    durations_s, admitted = zip(*timed, strict=True)
    p50_s, p99_s = np.percentile(durations_s, (50, 99)).tolist()
    return BenchResult(case, p50_s, p99_s, float(np.mean(admitted)))


class _SteadyState:
    def __init__(self, case: BenchCase, rng: np.random.Generator) -> None:
        self._case = case
        self._rng = rng
        name = "br-h" if case.horizon_steps else "br-0"
        params: dict[str, Any] = (
            {"horizon_steps": case.horizon_steps, "gamma": 0.97} if case.horizon_steps else {}
        )
        self._predictor = make_predictor("survival")
        self._dispatcher = Dispatcher(
            Ledger([WorkerLimits(case.slots)] * case.workers),
            make_policy(name, POLICIES.get(name).Params(**params)),
            self._predictor,
            rng,
            PoolLimits(1 << 40, 1e12),
        )
        self._lengths = self._outputs()
        for _ in range(_FINISHED_BEFORE):
            self._predictor.observe(PendingRequest(0), next(self._lengths))
        self._leaving_share = 1 / self._predictor.mean_output_tokens
        self._prompts = self._prompt_tokens()
        self._routable = np.ones(case.workers, dtype=bool)
        self._fill()

    def _outputs(self) -> Iterator[int]:
        while True:
            yield from _LAW.output_tokens(self._rng, 4096).tolist()

    def _prompt_tokens(self) -> Iterator[int]:
        while True:
            yield from _LAW.prompt_tokens(self._rng, 4096).tolist()

    def _fill(self) -> None:
        """Give every slot a request, somewhere in its life."""
        ledger = self._dispatcher.ledger
        for slot in range(self._case.workers * self._case.slots):
            request_id = self._dispatcher.arrive(PendingRequest(next(self._prompts)), 0.0)
            ledger.bind(request_id, WorkerIndex(slot % self._case.workers), 0.0)
            ledger.first_token(request_id, 0.0)
            ledger.grow(request_id, int(self._rng.integers(next(self._lengths))))

    def round(self) -> tuple[float, int]:
        """Let a step pass, then decide; return the seconds of the decision and what it admitted."""
        ledger = self._dispatcher.ledger
        ids = ledger.row_ids()
        ledger.grow_rows(np.ones(len(ids), dtype=bool))
        leaving = self._rng.random(len(ids)) < self._leaving_share
        # A round without anything to decide says nothing: at least one request leaves.
        leaving[self._rng.integers(len(ids))] = True
        for request_id in ids[leaving].tolist():
            self._dispatcher.end(RequestId(request_id), Event.FINISH)
        while ledger.pending < self._case.waiting:
            self._dispatcher.arrive(PendingRequest(next(self._prompts)), 0.0)
        started_s = time.perf_counter()
        assignments = self._dispatcher.decide(0.0, self._routable)
        duration_s = time.perf_counter() - started_s
        for assignment in assignments:
            ledger.first_token(assignment.request_id, 0.0)
        return duration_s, len(assignments)
