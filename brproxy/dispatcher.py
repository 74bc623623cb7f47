"""The dispatcher of one barrier group: pool -> state -> forecast -> policy -> bindings. Synchronous, no I/O.

The proxy drives it from a timer, the simulator from virtual time; both call the same three methods.

A round serves requests whatever its parts do. Without a forecast it balances the load as it is. Where a
policy raises, or names a worker that cannot be chosen, requests are decided one by one; who judges then is
the policy itself: a request that it raises for, while it decides a harmless one in its place, cannot be
decided and fails alone; a policy that raises for the harmless one as well is broken, and the least KV load
decides instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import cast

import numpy as np

from brproxy.faults import Faults
from brproxy.ledger import Entry, Ledger
from brproxy.lifecycle import Event
from brproxy.prediction.predictor import ActiveRequests, AnyPredictor, truncate
from brproxy.prediction.quality import QualityMonitor
from brproxy.routing.fscore import discounts_for
from brproxy.routing.policy import AnyPolicy
from brproxy.routing.view import NOT_ADMITTED, ClusterView, FloatArray, RoundState
from brproxy.types import Assignment, BrproxyError, InvalidInputError, PendingRequest, RequestId, WorkerIndex

ROUNDS_PER_SAMPLE = 16
"""One in so many rounds with a forecast samples a prediction: measuring must cost less than deciding."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """``requests_max`` wait at once; each waits at most ``wait_s_max`` seconds."""

    requests_max: int = 4096
    wait_s_max: float = 60.0


_HARMLESS_TOKENS = 1
"""Prompt of the request that shows whether a policy that raised is broken (tokens)."""

_NO_LOOKAHEAD = discounts_for(0, 1.0)


class RoutingError(BrproxyError):
    """A policy's or a predictor's answer is not what its interface says."""


class PoolFullError(BrproxyError):
    """The pool holds as many waiting requests as it may."""


class PromptTooLongError(InvalidInputError):
    """The prompt exceeds the KV capacity of every worker: waiting would never help."""


class Dispatcher:
    """Decides, for one barrier group, which waiting request goes to which worker and when.

    ``faults`` counts what went wrong in its parts. ``undecidable`` are the requests that the last round could
    not decide and never will: they still wait, and the caller ends them.
    """

    def __init__(
        self,
        ledger: Ledger,
        policy: AnyPolicy,
        predictor: AnyPredictor,
        rng: np.random.Generator,
        limits: PoolLimits,
        group: str = "",
    ) -> None:
        self.ledger = ledger
        self.policy = policy
        self.predictor = predictor
        self.limits = limits
        self.quality = QualityMonitor()
        self.faults = Faults(group)
        self.undecidable: list[RequestId] = []
        self._rng = rng
        self._rounds = 0
        self._policy_is_broken = False
        self._discounts_for: float | None = None
        self._discounts_now = _NO_LOOKAHEAD
        self._turnover_steps = 1.0

    def arrive(self, request: PendingRequest, now_s: float) -> RequestId:
        """Take a request into the pool; raises PoolFullError, and PromptTooLongError for an exact count.

        A guess that is too long for every worker may be wrong, and only the engine can tell.
        """
        if request.prompt_is_exact and request.prompt_tokens > self.ledger.kv_capacity_tokens_max:
            msg = (
                f"the prompt has {request.prompt_tokens} tokens, "
                f"more than the KV capacity of any worker ({self.ledger.kv_capacity_tokens_max} tokens)"
            )
            raise PromptTooLongError(msg)
        if self.ledger.pending >= self.limits.requests_max:
            msg = f"{self.ledger.pending} requests are waiting already, the most that the pool holds"
            raise PoolFullError(msg)
        return self.ledger.arrive(request, now_s)

    def decide(self, now_s: float, routable: Sequence[bool]) -> list[Assignment]:
        """Run one decision round over everything that waits and bind what it admits.

        ``routable`` (G) are the workers that may be chosen. Requests that a worker failed are placed first,
        one by one, away from the workers that failed them as long as there are others. Never raises for what
        a policy or a predictor does.
        """
        ledger, late_binding = self.ledger, self.policy.params.late_binding
        self.undecidable.clear()
        self._policy_is_broken = False
        if not any(routable):
            return []
        alone = ledger.alone()
        if alone is not None:
            return self._place([alone], ledger.state(routable, late_binding=late_binding), now_s)
        assignments: list[Assignment] = []
        for entry in ledger.retrying():
            others = [ok and g not in entry.avoid for g, ok in enumerate(routable)]
            state = ledger.state(others if any(others) else routable, late_binding=late_binding)
            assignments += self._place([entry], state, now_s)
        if not ledger.pending:
            return assignments
        state = ledger.state(routable, late_binding=late_binding)
        waiting = list(islice(ledger.pending_by_age(), self._worth_seeing(state)))
        if waiting:
            assignments += self._route(waiting, state, now_s)
        return assignments

    def expired(self, now_s: float) -> list[RequestId]:
        """Return the requests that have waited longer than the limit; the caller ends them."""
        deadline_s = now_s - self.limits.wait_s_max
        late = [e.id for e in self.ledger.retrying() if e.waiting_since_s < deadline_s]
        # The rest are in order of arrival: a scan that finds nothing must not cost the whole pool.
        late += [
            e.id for e in takewhile(lambda e: e.waiting_since_s < deadline_s, self.ledger.pending_by_age())
        ]
        return late

    def end(self, request_id: RequestId, event: Event) -> Entry:
        """End a request, return its load, and learn from it if it finished by itself."""
        entry = self.ledger.end(request_id, event)
        try:
            if event is Event.FINISH and entry.output_tokens:
                self.predictor.observe(entry.request, entry.output_tokens)
                self.quality.finished(request_id, entry.output_tokens)
            else:
                self.quality.dropped(request_id)
        except Exception as error:  # noqa: BLE001 - the request has ended, whatever is learnt from it
            self.faults.note("predictor", error)
        return entry

    def _worth_seeing(self, state: RoundState) -> int:
        """Return how many of the oldest requests a round can make use of."""
        if not self.policy.params.late_binding:
            return self.limits.requests_max
        slots_free = sum(state.slots_free)
        return slots_free + self.policy.lookahead_requests if slots_free else 0

    def _place(self, waiting: Sequence[Entry], state: RoundState, now_s: float) -> list[Assignment]:
        """Decide on requests one by one, as on most arrivals, when there is one; the same as ``_route``."""
        discounts, _ = self._discounts()
        load = self._discounted_load(state, discounts)
        assignments: list[Assignment] = []
        for entry in waiting:
            worker = self._choose(entry, state, load)
            if worker == NOT_ADMITTED:
                if entry.id in self.undecidable:
                    continue
                break
            self._bind(entry, worker, now_s, assignments)
            if len(waiting) > 1:
                state.admit(worker, entry.prompt_tokens)
                if load is not state.kv_tokens:
                    load[worker] += entry.prompt_tokens * float(discounts.sum())
        return assignments

    def _choose(self, entry: Entry, state: RoundState, load: list[float]) -> int:
        """Return the worker of one request or NOT_ADMITTED; one that cannot be decided is noted as such."""
        if not self._policy_is_broken:
            try:
                worker = self.policy.place(state, entry.prompt_tokens, load, self._rng)
                return _checked(worker, state)
            except Exception as error:  # noqa: BLE001 - whatever a policy raises, the round goes on
                self.faults.note("policy", error)
            try:
                _checked(self.policy.place(state, _HARMLESS_TOKENS, load, self._rng), state)
            except Exception:  # noqa: BLE001 - counted above
                self._policy_is_broken = True
            else:
                self.undecidable.append(entry.id)
                return NOT_ADMITTED
        eligible = state.eligible(entry.prompt_tokens)
        return min(eligible, key=state.kv_tokens.__getitem__, default=NOT_ADMITTED)

    def _bind(self, entry: Entry, worker: int, now_s: float, assignments: list[Assignment]) -> None:
        assignment = Assignment(entry.id, WorkerIndex(worker))
        try:
            prospect = self.predictor.prospect(entry.request)
            self.ledger.bind(*assignment, now_s, prospect)
        except Exception as error:  # noqa: BLE001 - a request is served without a prospect, too
            self.faults.note("predictor", error)
            self.ledger.bind(*assignment, now_s)
        assignments.append(assignment)

    def _discounts(self) -> tuple[FloatArray, float]:
        """Return the policy's discounts for the traffic as it is, and the turnover in steps."""
        part = "predictor"
        try:
            mean_output_tokens = self.predictor.mean_output_tokens
            if mean_output_tokens != self._discounts_for:
                turnover_steps = self.ledger.turnover_steps(mean_output_tokens)
                part = "policy"
                discounts = self.policy.discounts(turnover_steps, self.predictor.LOOKAHEAD_TURNOVERS)
                if discounts.ndim != 1 or not len(discounts) or not math.isfinite(discounts.sum()):
                    msg = f"discounts are no finite vector: {discounts}"
                    raise RoutingError(msg)  # noqa: TRY301 - as if the policy had raised it
                self._discounts_now, self._turnover_steps = discounts, turnover_steps
                self._discounts_for = mean_output_tokens
        except Exception as error:  # noqa: BLE001 - the last ones will do
            self.faults.note(part, error)
        return self._discounts_now, self._turnover_steps

    def _discounted_load(self, state: RoundState, discounts: FloatArray) -> list[float]:
        """Return each worker's discounted load; the load as it is where there is no forecast."""
        # A list of integers holds what policies take for numbers, and is not copied.
        now = cast("list[float]", state.kv_tokens)
        if len(discounts) == 1:
            return now
        workers = self.ledger.workers
        try:
            active = self._active(len(discounts) - 1)
            load: list[float] = self.predictor.discounted_load(active, workers, discounts).tolist()
            # An endless or missing number makes the sum one.
            if len(load) == workers and math.isfinite(sum(load)):
                return load
            self.faults.note("predictor", RoutingError(f"discounted_load of {workers} workers is {load}"))
        except Exception as error:  # noqa: BLE001 - whatever a predictor raises, the round goes on
            self.faults.note("predictor", error)
        return now

    def _forecast(self, state: RoundState, horizon_steps: int) -> FloatArray | None:
        """Return float64[G, H+1], the load as it is where there is no forecast; None without a horizon."""
        if not horizon_steps:
            return None
        shape = (self.ledger.workers, horizon_steps + 1)
        try:
            forecast = self.predictor.forecast(self._active(horizon_steps), *shape[:1], horizon_steps)
            if forecast.shape == shape and math.isfinite(forecast.sum()):
                return forecast
            self.faults.note("predictor", RoutingError(f"no finite forecast of shape {shape}: {forecast}"))
        except Exception as error:  # noqa: BLE001 - whatever a predictor raises, the round goes on
            self.faults.note("predictor", error)
        return np.repeat(np.array(state.kv_tokens, dtype=np.float64)[:, None], shape[1], axis=1)

    def _route(self, waiting: Sequence[Entry], state: RoundState, now_s: float) -> list[Assignment]:
        """Decide on all of ``waiting`` together; one by one if the policy raises."""
        try:
            chosen = self._decision(waiting, state)
            admitted = [i for i, worker in enumerate(chosen) if _checked(worker, state) != NOT_ADMITTED]
        except Exception as error:  # noqa: BLE001 - whatever a policy raises, the round goes on
            self.faults.note("policy", error)
            return self._place(waiting, state, now_s)
        if not admitted:
            return []
        self.ledger.pass_over(waiting, admitted)
        assignments: list[Assignment] = []
        for i in admitted:
            self._bind(waiting[i], chosen[i], now_s, assignments)
        return assignments

    def _decision(self, waiting: Sequence[Entry], state: RoundState) -> list[int]:
        """Return the worker of each of ``waiting``, as the policy says; raises whatever it does."""
        discounts, turnover_steps = self._discounts()
        view = ClusterView.of(
            state,
            [entry.prompt_tokens for entry in waiting],
            [entry.passed_over for entry in waiting],
            self._forecast(state, len(discounts) - 1),
            turnover_steps,
            self.predictor.LOOKAHEAD_TURNOVERS,
        )
        decision = self.policy.route(view, self._rng)
        if decision.shape != (len(waiting),):
            msg = f"{len(waiting)} requests wait, and the decision has shape {decision.shape}"
            raise RoutingError(msg)
        chosen: list[int] = decision.tolist()
        return chosen

    def _active(self, horizon_steps: int) -> ActiveRequests:
        """Return the bound requests, and now and then note what is predicted of one."""
        active = self.ledger.active()
        self._rounds += 1
        if self._rounds % ROUNDS_PER_SAMPLE == 0 and self.ledger.bound:
            self._sample(active, horizon_steps)
        return active

    def _sample(self, active: ActiveRequests, horizon_steps: int) -> None:
        """Note what the predictor says of one running request, to be compared with the truth later."""
        row = int(self._rng.integers(self.ledger.bound))
        one = active.only(slice(row, row + 1))
        if not one.certain[0]:
            survival = self.predictor.survival(one, horizon_steps)
            truncate(survival, one)
            request_id = RequestId(int(self.ledger.row_ids()[row]))
            self.quality.watch(request_id, int(one.output_tokens[0]), survival[0])


def _checked(worker: int, state: RoundState) -> int:
    """Return ``worker``; raises RoutingError for none that a round over ``state`` may choose."""
    if worker != NOT_ADMITTED and (worker < 0 or state.slots_free[worker] <= 0):
        msg = f"worker {worker} cannot be chosen"
        raise RoutingError(msg)
    return worker
