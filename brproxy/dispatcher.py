"""The dispatcher of one barrier group: pool -> state -> forecast -> policy -> bindings. Synchronous, no I/O.

The proxy drives it from a timer, the simulator from virtual time; both call the same three methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

import numpy as np

from brproxy.ledger import Entry, Ledger
from brproxy.lifecycle import Event
from brproxy.prediction.predictor import ActiveRequests, AnyPredictor, truncate
from brproxy.prediction.quality import QualityMonitor
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


class PoolFullError(BrproxyError):
    """The pool holds as many waiting requests as it may."""


class PromptTooLongError(InvalidInputError):
    """The prompt exceeds the KV capacity of every worker: waiting would never help."""


class Dispatcher:
    """Decides, for one barrier group, which waiting request goes to which worker and when."""

    def __init__(
        self,
        ledger: Ledger,
        policy: AnyPolicy,
        predictor: AnyPredictor,
        rng: np.random.Generator,
        limits: PoolLimits,
    ) -> None:
        self.ledger = ledger
        self.policy = policy
        self.predictor = predictor
        self.limits = limits
        self.quality = QualityMonitor()
        self._rng = rng
        self._rounds = 0
        self._discounts_for: float | None = None
        self._discounts_now: FloatArray
        self._turnover_steps: float

    def arrive(self, request: PendingRequest, now_s: float) -> RequestId:
        """Take a request into the pool; raises PoolFullError or PromptTooLongError."""
        if request.prompt_tokens > self.ledger.kv_capacity_tokens_max:
            msg = (
                f"the prompt has about {request.prompt_tokens} tokens, "
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
        one by one, away from the workers that failed them as long as there are others.
        """
        ledger, late_binding = self.ledger, self.policy.params.late_binding
        if not any(routable):
            return []
        alone = ledger.alone()
        if alone is not None:
            return self._place(alone, ledger.state(routable, late_binding=late_binding), now_s)
        assignments: list[Assignment] = []
        for entry in ledger.retrying():
            others = [ok and g not in entry.avoid for g, ok in enumerate(routable)]
            state = ledger.state(others if any(others) else routable, late_binding=late_binding)
            assignments += self._place(entry, state, now_s)
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
        if event is Event.FINISH and entry.output_tokens:
            self.predictor.observe(entry.request, entry.output_tokens)
            self.quality.finished(request_id, entry.output_tokens)
        else:
            self.quality.dropped(request_id)
        return entry

    def _worth_seeing(self, state: RoundState) -> int:
        """Return how many of the oldest requests a round can make use of."""
        if not self.policy.params.late_binding:
            return self.limits.requests_max
        slots_free = sum(state.slots_free)
        return slots_free + self.policy.lookahead_requests if slots_free else 0

    def _place(self, entry: Entry, state: RoundState, now_s: float) -> list[Assignment]:
        """Decide on one request by itself, as most rounds do; the same as ``_route``."""
        discounts, _ = self._discounts()
        load: Sequence[float] = state.kv_tokens
        if len(discounts) > 1:
            active = self._active(len(discounts) - 1)
            load = self.predictor.discounted_load(active, self.ledger.workers, discounts).tolist()
        worker = self.policy.place(state, entry.prompt_tokens, load, self._rng)
        return [] if worker == NOT_ADMITTED else [self._bind(entry, worker, now_s)]

    def _bind(self, entry: Entry, worker: int, now_s: float) -> Assignment:
        assignment = Assignment(entry.id, WorkerIndex(worker))
        self.ledger.bind(*assignment, now_s, self.predictor.prospect(entry.request))
        return assignment

    def _discounts(self) -> tuple[FloatArray, float]:
        """Return the policy's discounts for the traffic as it is, and the turnover in steps."""
        mean_output_tokens = self.predictor.mean_output_tokens
        if mean_output_tokens != self._discounts_for:
            self._discounts_for = mean_output_tokens
            self._turnover_steps = self.ledger.turnover_steps(mean_output_tokens)
            turnovers = self.predictor.LOOKAHEAD_TURNOVERS
            self._discounts_now = self.policy.discounts(self._turnover_steps, turnovers)
        return self._discounts_now, self._turnover_steps

    def _route(self, waiting: Sequence[Entry], state: RoundState, now_s: float) -> list[Assignment]:
        """Decide on all of ``waiting`` together."""
        discounts, turnover_steps = self._discounts()
        horizon_steps = len(discounts) - 1
        forecast = None
        if horizon_steps:
            active = self._active(horizon_steps)
            forecast = self.predictor.forecast(active, self.ledger.workers, horizon_steps)
        view = ClusterView.of(
            state,
            [entry.prompt_tokens for entry in waiting],
            [entry.passed_over for entry in waiting],
            forecast,
            turnover_steps,
            self.predictor.LOOKAHEAD_TURNOVERS,
        )
        decision: list[int] = self.policy.route(view, self._rng).tolist()
        admitted = [i for i, worker in enumerate(decision) if worker != NOT_ADMITTED]
        if not admitted:
            return []
        self.ledger.pass_over(waiting, admitted)
        return [self._bind(waiting[i], decision[i], now_s) for i in admitted]

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
