"""``loadgen bench``: what one decision round costs, in steady state, by size of the deployment.

The ledger is filled to a steady state with requests of random age. Before each round as many requests end as
a step of such a deployment ends, every other grows by a token, and the pool is filled up again; only
``Dispatcher.decide`` is timed, forecast, policy and bookings included. Machines are shared: beside the time
on the clock stands the CPU time, which other processes hardly touch.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.ledger import BoolArray, Ledger
from brproxy.lifecycle import Event
from brproxy.prediction.predictor import make_predictor
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policy import POLICIES, make_policy
from brproxy.types import PendingRequest, RequestId, WorkerIndex
from loadgen.traces.synthetic import SYNTHETIC

_LAW = SYNTHETIC["proprietary"]
_FINISHED_BEFORE = 2000
_ROUNDS_BEFORE = 20


@dataclass(frozen=True, slots=True)
class BenchCase:
    """A deployment: G workers, ``waiting`` requests in the pool, horizon H in steps (0: BR-0).

    Each worker runs ``slots`` requests and has ``slots_free`` more slots. A request that waits alone arrives
    when another has left.
    """

    workers: int
    slots: int
    waiting: int
    horizon_steps: int
    slots_free: int = 0


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Seconds of a decision round on the clock and of CPU, and the requests that it admitted on average."""

    case: BenchCase
    p50_s: float
    p99_s: float
    cpu_p50_s: float
    cpu_p99_s: float
    admitted: float


GROUPS: dict[str, tuple[BenchCase, ...]] = {
    "alone": (
        BenchCase(8, 64, 1, 0, slots_free=64),
        BenchCase(8, 64, 1, 80, slots_free=64),
        BenchCase(64, 64, 1, 80, slots_free=64),
    ),
    "scale": (
        BenchCase(8, 64, 200, 80),
        BenchCase(64, 64, 1000, 80),
        BenchCase(144, 64, 2000, 80),
        BenchCase(144, 64, 2000, 0),
    ),
    "G": (BenchCase(8, 64, 200, 80), BenchCase(32, 64, 200, 80), BenchCase(144, 64, 200, 80)),
    "active": (BenchCase(8, 16, 200, 80), BenchCase(8, 64, 200, 80), BenchCase(8, 256, 200, 80)),
    "waiting": (BenchCase(8, 64, 20, 80), BenchCase(8, 64, 200, 80), BenchCase(8, 64, 2000, 80)),
    "H": tuple(BenchCase(8, 64, 200, horizon_steps) for horizon_steps in (0, 20, 80, 320)),
}
"""Cases by what grows in them."""

CASES = tuple(dict.fromkeys(case for group in GROUPS.values() for case in group))


def bench(case: BenchCase, rounds: int, seed: int) -> BenchResult:
    """Time ``rounds`` decision rounds of ``case``."""
    steady = _SteadyState(case, np.random.default_rng(seed))
    for _ in range(_ROUNDS_BEFORE):
        steady.round()
    # As the proxy does once it has started.
    gc.collect()
    gc.freeze()
    timed = [steady.round() for _ in range(rounds)]
    durations_s, cpu_s, admitted = zip(*timed, strict=True)
    p50_s, p99_s = np.percentile(durations_s, (50, 99)).tolist()
    cpu_p50_s, cpu_p99_s = np.percentile(cpu_s, (50, 99)).tolist()
    return BenchResult(case, p50_s, p99_s, cpu_p50_s, cpu_p99_s, float(np.mean(admitted)))


def bench_table(results: Iterable[BenchResult]) -> Table:
    """Return the results as a table, group by group: what grows stands in the first column."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, caption="P50 and P99 in µs")
    table.add_column("grows")
    for column in ("G", "active", "waiting", "H", "admitted", "P50", "P99", "CPU P50", "CPU P99"):
        table.add_column(column, justify="right")
    by_case = {result.case: result for result in results}
    for name, cases in GROUPS.items():
        for case in cases:
            result = by_case[case]
            sizes = (case.workers, case.workers * case.slots, case.waiting, case.horizon_steps)
            times_s = (result.p50_s, result.p99_s, result.cpu_p50_s, result.cpu_p99_s)
            table.add_row(
                name if case is cases[0] else "",
                *(f"{size:,}" for size in sizes),
                f"{result.admitted:.1f}",
                *(f"{time_s * 1e6:,.0f}" for time_s in times_s),
            )
        table.add_section()
    return table


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
            Ledger(Roster.of([WorkerLimits(case.slots + case.slots_free)] * case.workers)),
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
        self._routable = (True,) * case.workers
        self._fill()

    def _outputs(self) -> Iterator[int]:
        while True:
            yield from _LAW.output_tokens(self._rng, 4096).tolist()

    def _prompt_tokens(self) -> Iterator[int]:
        while True:
            yield from _LAW.prompt_tokens(self._rng, 4096).tolist()

    def _fill(self) -> None:
        """Give every worker its requests, somewhere in their life."""
        ledger = self._dispatcher.ledger
        for slot in range(self._case.workers * self._case.slots):
            request_id = self._dispatcher.arrive(PendingRequest(next(self._prompts)), 0.0)
            self._dispatcher.bind(request_id, WorkerIndex(slot % self._case.workers), 0.0)
            ledger.first_token(request_id, 0.0)
            ledger.grow(request_id, int(self._rng.integers(next(self._lengths))))

    def round(self) -> tuple[float, float, int]:
        """Let a step pass, then decide; return the seconds, the CPU seconds and how many were admitted."""
        ledger = self._dispatcher.ledger
        ids = ledger.row_ids()
        ledger.grow_rows(np.ones(len(ids), dtype=bool))
        for request_id in ids[self._leaving(len(ids))].tolist():
            self._dispatcher.end(RequestId(request_id), Event.FINISH)
        while len(self._dispatcher.waiting) < self._case.waiting:
            self._dispatcher.arrive(PendingRequest(next(self._prompts)), 0.0)
        started_cpu_s, started_s = time.thread_time(), time.perf_counter()
        admitted = self._dispatcher.decide(0.0, self._routable)
        duration_s, cpu_s = time.perf_counter() - started_s, time.thread_time() - started_cpu_s
        for entry in admitted:
            ledger.first_token(entry.id, 0.0)
        return duration_s, cpu_s, len(admitted)

    def _leaving(self, bound: int) -> BoolArray:
        """Return bool[N]: the requests that end in a step, as many as arrive where one arrives alone."""
        share = self._leaving_share if self._case.waiting > 1 else 0.0
        leaving = self._rng.random(bound) < share
        # A round without anything to decide says nothing: at least one request leaves.
        leaving[self._rng.integers(bound)] = True
        return leaving
