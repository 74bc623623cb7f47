"""The cluster model in virtual time, driven by the proxy's own dispatcher, ledger, policies and predictors.

Requests arrive between steps and are decided on before the next one begins, as in the proxy, whose tick is
much shorter than a step. A late-binding policy's request starts with the next step, an early-binding one's
waits in its worker's queue. Nothing here decides anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.ledger import BoolArray, Ledger
from brproxy.lifecycle import Event
from brproxy.prediction.predictor import PredictorParams, make_predictor
from brproxy.prediction.quality import PredictionQuality
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policy import PolicyParams, make_policy
from brproxy.step_costs import StepCosts
from brproxy.types import PendingRequest, RequestId
from loadgen.barrier import BarrierRecord, BarrierStats
from loadgen.cluster import Cluster, ClusterSettings, IntArray
from loadgen.workload import TraceRequest, Workload

FloatArray = NDArray[np.float64]

_POOL = PoolLimits(requests_max=1 << 40, wait_s_max=1e12)


@dataclass(frozen=True, slots=True)
class SimulatedPolicy:
    """A policy and a predictor by name, with their parameters; None: the defaults."""

    policy: str
    predictor: str = "survival"
    policy_params: PolicyParams | None = None
    predictor_params: PredictorParams | None = None


@dataclass(frozen=True, slots=True)
class Simulation:
    """What happened. Per request, float64[N] in order of arrival, NaN where the run ended before.

    ``wait_s``: arrival to the step that admits it. ``ttft_s``: arrival to first token. ``tpot_s``: time for
    each token after the first. ``steady_s``: from 25 % to 95 % of the arrivals, what ``barrier`` is over.
    ``loads``: start of each step (float64[S]) and KV tokens of each worker in it (int64[S, G]), if kept.
    """

    barrier: BarrierStats
    record: BarrierRecord
    steady_s: tuple[float, float]
    wait_s: FloatArray
    ttft_s: FloatArray
    tpot_s: FloatArray
    finished: BoolArray
    preemptions: int
    quality: PredictionQuality
    loads: tuple[FloatArray, IntArray]


def simulate(
    workload: Workload,
    settings: ClusterSettings,
    choice: SimulatedPolicy,
    seed: int,
    *,
    drain: bool = True,
    keep_loads: bool = False,
) -> Simulation:
    """Run ``workload`` to its end, or without ``drain`` to the end of its steady part."""
    return _Run(workload, settings, choice, seed, keep_loads=keep_loads).run(drain=drain)


class _Run:
    def __init__(
        self,
        workload: Workload,
        settings: ClusterSettings,
        choice: SimulatedPolicy,
        seed: int,
        *,
        keep_loads: bool,
    ) -> None:
        costs = StepCosts(settings.step_base_s, settings.step_s_per_kv_token, settings.prefill_s_per_token)
        limits = WorkerLimits(settings.slots, settings.kv_capacity_tokens)
        self._dispatcher = Dispatcher(
            Ledger(Roster.of([limits] * settings.workers)),
            make_policy(choice.policy, choice.policy_params),
            make_predictor(choice.predictor, choice.predictor_params),
            np.random.default_rng(seed),
            _POOL,
            costs=lambda: costs,
        )
        self._requests = workload.requests
        self._cluster = Cluster(settings)
        self._routable = (True,) * settings.workers
        self._record = BarrierRecord()
        count = len(workload.requests)
        self._arrival_s = np.array([r.arrival_s for r in workload.requests])
        self._started_s = np.full(count, np.nan)
        self._first_s = np.full(count, np.nan)
        self._last_s = np.full(count, np.nan)
        self._next = 0
        self._keep_loads = keep_loads
        self._loads: list[tuple[float, IntArray]] = []

    def run(self, *, drain: bool) -> Simulation:
        count = len(self._requests)
        steady_s = (
            float(self._arrival_s[count * 25 // 100]),
            float(self._arrival_s[count * 95 // 100]),
        )
        now_s = float(self._arrival_s[0])
        while drain or now_s < steady_s[1]:
            self._arrivals(now_s)
            self._decide(now_s)
            step = self._cluster.begin_step()
            if step is None:
                if self._next == count:
                    break
                now_s = float(self._arrival_s[self._next])
                continue
            if self._keep_loads:
                self._loads.append((now_s, step.kv_tokens))
            tokens = self._step(now_s, now_s + step.duration_s)
            self._record.add(now_s, step.duration_s, step.kv_tokens, tokens)
            now_s += step.duration_s
        return self._result(steady_s)

    def _arrivals(self, now_s: float) -> None:
        """Let everything arrive that is due, each at its own time."""
        while self._next < len(self._requests) and self._arrival_s[self._next] <= now_s:
            request = self._requests[self._next]
            # The ledger numbers requests from 0 in order of arrival: ids are positions in the workload.
            self._dispatcher.arrive(pending_request(request), request.arrival_s)
            self._next += 1

    def _decide(self, now_s: float) -> None:
        for entry in self._dispatcher.decide(now_s, self._routable):
            request = self._requests[entry.id]
            self._cluster.submit(entry.id, entry.worker, request.prompt_tokens, request.output_tokens)

    def _step(self, begun_s: float, ended_s: float) -> int:
        """Decode a token for everything that runs; return how many there were."""
        result = self._cluster.end_step()
        ids = result.request_ids
        new = ids[np.isnan(self._first_s[ids])]
        self._started_s[new] = begun_s
        self._first_s[new] = ended_s
        ledger = self._dispatcher.ledger
        for request_id in new.tolist():
            ledger.first_token(RequestId(request_id), ended_s)
        decoded = np.zeros(len(self._requests), dtype=bool)
        decoded[ids] = True
        ledger.grow_rows(decoded[ledger.row_ids()])
        finished = ids[result.finished]
        self._last_s[finished] = ended_s
        for request_id in finished.tolist():
            self._dispatcher.end(RequestId(request_id), Event.FINISH)
        return len(ids)

    def _result(self, steady_s: tuple[float, float]) -> Simulation:
        outputs = np.array([r.output_tokens for r in self._requests], dtype=np.float64)
        finished = ~np.isnan(self._last_s)
        tpot_s = np.full(len(outputs), np.nan)
        several = finished & (outputs > 1)
        tpot_s[several] = (self._last_s - self._first_s)[several] / (outputs[several] - 1)
        return Simulation(
            barrier=self._record.stats(*steady_s),
            record=self._record,
            steady_s=steady_s,
            wait_s=self._started_s - self._arrival_s,
            ttft_s=self._first_s - self._arrival_s,
            tpot_s=tpot_s,
            finished=finished,
            preemptions=self._cluster.preemptions,
            quality=self._dispatcher.quality.report(),
            loads=(
                np.array([start_s for start_s, _ in self._loads]),
                np.array([kv_tokens for _, kv_tokens in self._loads]),
            ),
        )


def pending_request(request: TraceRequest) -> PendingRequest:
    """Return a workload's request as the router sees it, with what only a simulator knows."""
    return PendingRequest(
        request.prompt_tokens,
        prompt_hash=request.prompt_key,
        prefix_hash=request.prefix_key,
        output_tokens_true=request.output_tokens,
        prompt_is_exact=True,
    )
