"""The cluster model in virtual time, driven by the proxy's own dispatcher, ledger, policies and predictors.

The proxy's tick is much shorter than a step, but no request gets to an engine in the instant in which a slot
falls free. While a step runs the proxy sees the tokens of the one before, fills the slots that those freed,
and takes in what arrives; what it decides then reaches the engine ``dispatch_steps`` steps later, 1 of them
with the step that comes next. So a slot that is freed by a step stays empty in the one after it, unless its
worker has a queue, as under an early-binding policy. With 0 freed slot and next request meet in the same
instant, between two steps. Nothing here decides anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from brproxy.batches import BatchLimits, take_batches
from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.ledger import BoolArray, Ledger
from brproxy.lifecycle import Entry, Event
from brproxy.prediction.predictor import PredictorParams, make_predictor
from brproxy.prediction.quality import PredictionQuality
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policy import PolicyParams, make_policy
from brproxy.step_model import StepModel
from brproxy.types import PendingRequest, RequestId
from loadgen.barrier import BarrierRecord, BarrierStats
from loadgen.cluster import Cluster, Step
from loadgen.cluster_settings import TOKENS_PER_STEP_MAX, ClusterSettings, FloatArray, IntArray
from loadgen.workload import TraceRequest, Workload

_POOL = PoolLimits(requests_max=1 << 40, wait_s_max=1e12)

IDLE_S_MAX = 600.0
"""A policy that leaves requests waiting for so long, while nothing runs, will never admit them (seconds)."""


@dataclass(frozen=True, slots=True)
class SimulatedPolicy:
    """A policy and a predictor by name, with their parameters; None: the defaults.

    ``learns_costs``: it knows what a step costs by what a proxy would have learnt by then, not by the truth.
    ``takes_batches``: requests of a closed batch go longest first, not as they came.
    """

    policy: str
    predictor: str = "survival"
    policy_params: PolicyParams | None = None
    predictor_params: PredictorParams | None = None
    learns_costs: bool = False
    takes_batches: bool = True


class Loads(NamedTuple):
    """What each step began with: when, float64[S], and KV tokens, prompt tokens and requests, int64[S, G]."""

    start_s: FloatArray
    kv_tokens: IntArray
    prefill_tokens: IntArray
    requests: IntArray


@dataclass(frozen=True, slots=True)
class Simulation:
    """What happened. Per request, float64[N] in order of arrival, NaN where the run ended before.

    ``wait_s``: arrival to the step that admits it. ``ttft_s``: arrival to first token. ``tpot_s``: time for
    each token after the first. ``finished`` were served to their end, ``aborted`` left before (bool[N]).
    ``makespan_s``: first arrival to the last answer, None where the run ended before.
    ``steady_s``: from 25 % to 95 % of the arrivals, what ``barrier`` is over. Of a closed batch, whose
    requests all arrive at once, that is the whole run. ``steady``: the requests of that part. ``loads``: of
    every step, if kept. ``steps``: what was learnt of them, None where the truth was known. ``learnt``: what
    its predictor keeps.
    """

    barrier: BarrierStats
    record: BarrierRecord
    steady_s: tuple[float, float]
    steady: slice
    wait_s: FloatArray
    ttft_s: FloatArray
    tpot_s: FloatArray
    finished: BoolArray
    aborted: BoolArray
    preemptions: int
    makespan_s: float | None
    quality: PredictionQuality
    steps: StepModel | None
    loads: Loads
    learnt: Mapping[str, Any]


def simulate(
    workload: Workload,
    settings: ClusterSettings,
    choice: SimulatedPolicy,
    seed: int,
    *,
    drain: bool = True,
    keep_loads: bool = False,
    learnt: Mapping[str, Any] | None = None,
) -> Simulation:
    """Run ``workload`` to its end, or without ``drain`` to the end of its steady part.

    ``learnt``: what the predictor had learnt before, as from its file (None: nothing).
    """
    run = _Run(workload, settings, choice, seed, keep_loads=keep_loads)
    if learnt is not None:
        run.predictor.restore(dict(learnt))
    return run.run(drain=drain)


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
        costs = settings.costs
        limits = [WorkerLimits(slots, settings.kv_capacity_tokens) for slots in settings.worker_slots]
        ledger = Ledger(Roster.of(limits))
        self.predictor = make_predictor(choice.predictor, choice.predictor_params)
        self._model = StepModel(ledger) if choice.learns_costs else None
        self._dispatcher = Dispatcher(
            ledger,
            make_policy(choice.policy, choice.policy_params),
            self.predictor,
            np.random.default_rng(seed),
            _POOL,
            costs=self._model.costs if self._model else lambda: costs,
        )
        if self._model:
            self._dispatcher.happenings.tell(self._model.windows)
        # Who binds on arrival puts nobody into an order.
        if choice.takes_batches and self._dispatcher.policy.params.late_binding:
            take_batches(self._dispatcher, BatchLimits())
        self._requests = workload.requests
        # Its own generator: what a policy draws must not change what the deployment does.
        self._cluster = Cluster(settings, np.random.default_rng((seed, 1)))
        self._routable = (True,) * settings.workers
        self._record = BarrierRecord()
        count = len(workload.requests)
        self._arrival_s = np.array([r.arrival_s for r in workload.requests])
        self._started_s = np.full(count, np.nan)
        self._first_s = np.full(count, np.nan)
        self._last_s = np.full(count, np.nan)
        self._aborted = np.zeros(count, dtype=bool)
        self._without_token = 0
        self._next = 0
        self._steps = 0
        self._dispatch_steps = settings.dispatch_steps
        # What is decided and not there yet, each with the step that it can take part in at the earliest.
        self._in_transit: deque[tuple[int, Entry]] = deque()
        self._has_ended = False
        self._keep_loads = keep_loads
        self._loads: list[tuple[float, IntArray, IntArray, IntArray]] = []

    def run(self, *, drain: bool) -> Simulation:
        count = len(self._requests)
        steady = slice(count * 25 // 100, count * 95 // 100)
        steady_s = float(self._arrival_s[steady.start]), float(self._arrival_s[steady.stop])
        is_closed = bool(self._arrival_s[0] == self._arrival_s[-1])
        now_s = float(self._arrival_s[0])
        busy_s = now_s
        while drain or is_closed or now_s < steady_s[1]:
            self._arrivals(now_s)
            step = self._begin_step(now_s)
            if step is None:
                if self._next < count:
                    now_s = self._arrival_s[self._next].item()
                elif self._dispatcher.waiting.count and now_s < busy_s + IDLE_S_MAX:
                    now_s += self._cluster.settings.step_base_s
                else:
                    break
                continue
            if self._keep_loads:
                self._loads.append((now_s, step.kv_tokens, step.prefill_tokens, self._cluster.running))
            if step.admitted:
                self._admitted(step.admitted, now_s)
            ended_s = now_s + step.duration_s
            if self._dispatch_steps:
                self._decide(now_s)
            self._look(now_s)
            if self._dispatch_steps and self._arrivals(ended_s):
                self._decide(ended_s)
            tokens = self._end_step(ended_s)
            self._record.add(now_s, step, tokens)
            self._steps += 1
            now_s = busy_s = ended_s
        if is_closed:
            steady, steady_s = slice(None), (steady_s[0], busy_s)
        return self._result(steady, steady_s)

    def _arrivals(self, now_s: float) -> bool:
        """Let everything arrive that is due, each at its own time; tell whether anything did."""
        first = self._next
        while self._next < len(self._requests) and self._arrival_s[self._next] <= now_s:
            request = self._requests[self._next]
            # The ledger numbers requests from 0 in order of arrival: ids are positions in the workload.
            self._dispatcher.arrive(pending_request(request), request.arrival_s)
            self._next += 1
        return self._next > first

    def _begin_step(self, now_s: float) -> Step | None:
        """Begin a step with what is there by now; None where nothing runs."""
        if not self._dispatch_steps:
            self._decide(now_s)
        self._deliver(self._steps)
        step = self._cluster.begin_step()
        if step is None and self._dispatch_steps:
            # No step is under way that a request would have to wait for.
            self._decide(now_s)
            self._deliver(self._steps + self._dispatch_steps)
            step = self._cluster.begin_step()
        return step

    def _decide(self, now_s: float) -> None:
        due = self._steps + self._dispatch_steps
        self._in_transit.extend((due, entry) for entry in self._dispatcher.decide(now_s, self._routable))

    def _look(self, now_s: float) -> None:
        """Have what is learnt of steps look as in a proxy: a step has ended, and free slots are taken."""
        if self._model and self._has_ended and self._model.is_due(now_s):
            self._model.look(now_s, now_s)

    def _deliver(self, step: int) -> None:
        """Hand the workers what they can take into ``step``, in the order in which it was decided."""
        while self._in_transit and self._in_transit[0][0] <= step:
            _, entry = self._in_transit.popleft()
            request = self._requests[entry.id]
            self._cluster.submit(entry.id, entry.worker, request.prompt_tokens, request.decoded_tokens)

    def _admitted(self, request_ids: list[int], now_s: float) -> None:
        """Note when each got a slot, those that were preempted for the first time only."""
        for request_id in request_ids:
            if np.isnan(self._started_s[request_id]):
                self._started_s[request_id] = now_s
                self._without_token += 1

    def _end_step(self, ended_s: float) -> int:
        """Decode for everything that runs, and end what is done or left; return how many tokens it was."""
        result = self._cluster.end_step()
        ids = result.request_ids
        ledger = self._dispatcher.ledger
        if self._without_token:
            new = ids[np.isnan(self._first_s[ids])]
            self._without_token -= len(new)
            self._first_s[new] = ended_s
            for request_id in new.tolist():
                ledger.first_token(RequestId(request_id), ended_s)
        if result.output_tokens is None:
            tokens = len(ids)
            decoded = np.zeros(len(self._requests), dtype=bool)
            decoded[ids] = True
            ledger.grow_rows(decoded[ledger.row_ids()])
        else:
            tokens = int(result.output_tokens.sum())
            grown = np.zeros(len(self._requests), dtype=np.int64)
            grown[ids] = result.output_tokens
            for least in range(1, TOKENS_PER_STEP_MAX + 1):
                ledger.grow_rows(grown[ledger.row_ids()] >= least)
        finished = ids[result.finished]
        self._has_ended = bool(len(finished))
        self._last_s[finished] = ended_s
        for request_id in finished.tolist():
            aborted = self._requests[request_id].aborted_after_tokens is not None
            self._aborted[request_id] = aborted
            self._dispatcher.end(RequestId(request_id), Event.CANCEL if aborted else Event.FINISH)
        return tokens

    def _result(self, steady: slice, steady_s: tuple[float, float]) -> Simulation:
        outputs = np.array([r.decoded_tokens for r in self._requests], dtype=np.float64)
        finished = ~np.isnan(self._last_s) & ~self._aborted
        tpot_s = np.full(len(outputs), np.nan)
        several = finished & (outputs > 1)
        tpot_s[several] = (self._last_s - self._first_s)[several] / (outputs[several] - 1)
        return Simulation(
            barrier=self._record.stats(*steady_s),
            record=self._record,
            steady_s=steady_s,
            steady=steady,
            wait_s=self._started_s - self._arrival_s,
            ttft_s=self._first_s - self._arrival_s,
            tpot_s=tpot_s,
            finished=finished,
            aborted=self._aborted,
            preemptions=self._cluster.preemptions,
            makespan_s=None
            if np.isnan(self._last_s).any()
            else float(self._last_s.max() - self._arrival_s[0]),
            quality=self._dispatcher.quality.report(),
            steps=self._model,
            learnt=self.predictor.state(),
            loads=Loads(*(np.array([row[i] for row in self._loads]) for i in range(len(Loads._fields)))),
        )


def pending_request(request: TraceRequest) -> PendingRequest:
    """Return a workload's request as the router sees it, with what only a simulator knows."""
    return PendingRequest(
        request.prompt_tokens,
        prompt_hash=request.prompt_key,
        prefix_hash=request.prefix_key,
        user=request.user,
        batch=request.batch,
        output_tokens_true=request.output_tokens,
        prompt_is_exact=True,
    )
