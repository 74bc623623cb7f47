"""The dispatcher of one barrier group: pool -> view -> forecast -> policy -> bindings. Synchronous, no I/O.

The proxy drives it from a timer, the simulator from virtual time; both call the same three methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

import numpy as np

from brproxy.ledger import BoolArray, Entry, Ledger
from brproxy.lifecycle import Event
from brproxy.prediction.predictor import ActiveRequests, AnyPredictor, truncate
from brproxy.prediction.quality import QualityMonitor
from brproxy.routing.policy import AnyPolicy
from brproxy.routing.view import NOT_ADMITTED, FloatArray
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

    def decide(self, now_s: float, routable: BoolArray) -> list[Assignment]:
        """Run one decision round over everything that waits and bind what it admits.

        ``routable`` is bool[G]: workers that may be chosen. Requests that a worker failed are placed first,
        one by one, away from the workers that failed them as long as there are others.
        """
        assignments: list[Assignment] = []
        if not self.ledger.pending or not routable.any():
            return assignments
        for entry in self.ledger.retrying():
            others = routable.copy()
            others[list(entry.avoid)] = False
            assignments += self._route([entry], others if others.any() else routable, now_s)
        waiting = list(islice(self.ledger.pending_by_age(), self._worth_seeing(routable)))
        if waiting:
            assignments += self._route(waiting, routable, now_s)
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

    def _worth_seeing(self, routable: BoolArray) -> int:
        """Return how many of the oldest requests a round can make use of."""
        if not self.policy.params.late_binding:
            return self.limits.requests_max
        slots_free = self.ledger.slots_free(routable)
        return slots_free + self.policy.lookahead_requests if slots_free else 0

    def _route(self, waiting: Sequence[Entry], routable: BoolArray, now_s: float) -> list[Assignment]:
        view = self.ledger.view(
            waiting,
            routable,
            late_binding=self.policy.params.late_binding,
            forecast=self._forecast(),
            output_tokens_mean=self.predictor.mean_output_tokens,
            lookahead_turnovers=self.predictor.LOOKAHEAD_TURNOVERS,
        )
        decision = self.policy.route(view, self._rng)
        admitted: list[int] = np.flatnonzero(decision != NOT_ADMITTED).tolist()
        if not admitted:
            return []
        chosen = set(admitted)
        self.ledger.pass_over([waiting[i] for i in range(admitted[-1]) if i not in chosen])
        assignments = [Assignment(waiting[i].id, WorkerIndex(int(decision[i]))) for i in admitted]
        for i, assignment in zip(admitted, assignments, strict=True):
            prospect = self.predictor.prospect(waiting[i].request)
            self.ledger.bind(assignment.request_id, assignment.worker, now_s, prospect)
        return assignments

    def _forecast(self) -> FloatArray | None:
        turnover_steps = self.ledger.turnover_steps(self.predictor.mean_output_tokens)
        horizon_steps = self.policy.horizon_steps(turnover_steps, self.predictor.LOOKAHEAD_TURNOVERS)
        if horizon_steps == 0:
            return None
        active = self.ledger.active()
        self._rounds += 1
        if self._rounds % ROUNDS_PER_SAMPLE == 0 and self.ledger.bound:
            self._sample(active, horizon_steps)
        return self.predictor.forecast(active, self.ledger.workers, horizon_steps)

    def _sample(self, active: ActiveRequests, horizon_steps: int) -> None:
        """Note what the predictor says of one running request, to be compared with the truth later."""
        row = int(self._rng.integers(self.ledger.bound))
        one = active.only(np.arange(self.ledger.bound) == row)
        if not one.certain[0]:
            survival = self.predictor.survival(one, horizon_steps)
            truncate(survival, one)
            request_id = RequestId(int(self.ledger.row_ids()[row]))
            self.quality.watch(request_id, int(one.output_tokens[0]), survival[0])
