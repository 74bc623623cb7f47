"""A deployment that steps in virtual time, whose costs are known, with what a proxy would see of it.

Unlike ``loadgen``'s its workers may differ in speed, prefill in chunks and send several tokens in an event.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.ledger import Ledger
from brproxy.lifecycle import Event
from brproxy.prediction.predictor import make_predictor
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policy import make_policy
from brproxy.step_model import StepModel
from brproxy.types import PendingRequest


@dataclass
class Truth:
    """What a step costs; ``slowness`` of each worker's KV tokens; ``chunk``: most tokens prefilled in one."""

    base_s: float = 0.030
    s_per_kv_token: float = 100e-9
    s_per_prefill_token: float = 0.0
    slowness: tuple = (1.0,) * 4
    chunk: int | None = None


@dataclass
class Traffic:
    """Requests: share of the slots that they take on average, means of prompt and output (tokens).

    Events have ``tokens_per_event`` tokens on average. What is seen comes late by some ``jitter_s``.
    """

    slots: int = 16
    share: float = 0.7
    prompt_tokens: float = 2000.0
    output_tokens: float = 100.0
    tokens_per_event: float = 1.0
    policy: str = "least-kv"
    jitter_s: float = 0.001

    def requests_per_s(self, truth):
        """Return how many keep so many slots taken, as far as a step takes as long as it would on average."""
        bound = self.share * self.slots
        admitted = len(truth.slowness) * bound / self.output_tokens
        step_s = (
            truth.base_s
            + truth.s_per_kv_token * max(truth.slowness) * bound * (self.prompt_tokens + self.output_tokens)
            + truth.s_per_prefill_token * self.prompt_tokens * admitted
        )
        return admitted / step_s


@dataclass
class Request:
    """One in a worker's queue or running there; ``left`` of its prompt is to be prefilled."""

    entry: object
    output: int
    left: int
    kv: int = 0
    to_tell: int = 0
    has_begun: bool = False


@dataclass
class Worker:
    queue: deque = field(default_factory=deque)
    running: list = field(default_factory=list)

    def prefill(self, chunk, slots):
        """Prefill what one step may; return how many tokens that is."""
        done, slots = 0, slots - len(self.running)
        while self.queue and slots > 0 and (chunk is None or done < chunk):
            request = self.queue[0]
            part = request.left if chunk is None else min(chunk - done, request.left)
            request.left -= part
            request.kv += part
            done += part
            if not request.left:
                self.running.append(self.queue.popleft())
                slots -= 1
        return done


class Stepping:
    """Runs with ``model`` looking on as in a proxy."""

    def __init__(self, truth, traffic=None, seed=0, given=None):
        self.truth, self.traffic = truth, traffic or Traffic()
        self.rate = self.traffic.requests_per_s(truth)
        self.rng = np.random.default_rng(seed)
        self.workers = [Worker() for _ in truth.slowness]
        self.ledger = Ledger(Roster.of([WorkerLimits(self.traffic.slots)] * len(self.workers)))
        self.model = StepModel(self.ledger, given)
        self.dispatcher = Dispatcher(
            self.ledger,
            make_policy(self.traffic.policy),
            make_predictor("survival"),
            np.random.default_rng(seed),
            PoolLimits(1 << 40, 1e12),
            costs=self.model.costs,
        )
        self.dispatcher.happenings.tell(self.model.windows)
        self.now_s = self.next_s = 0.0
        self.steps = 0
        self.ended = False

    def run(self, steps):
        """Go on for so many steps; return the model."""
        until = self.steps + steps
        while self.steps < until:
            self.arrive()
            for entry in self.dispatcher.decide(self.now_s, (True,) * len(self.workers)):
                request = Request(entry, *entry.request.session_keys, entry.prompt_tokens)
                self.workers[entry.worker].queue.append(request)
            if self.ended and self.model.is_due(self.now_s):
                self.model.look(self.now_s + self.late_s(), self.now_s)
            duration_s = self.begin()
            if duration_s is None:
                self.now_s = self.next_s
                continue
            self.now_s += duration_s
            self.steps += 1
            self.end()
        return self.model

    def late_s(self):
        return abs(self.rng.normal(0, self.traffic.jitter_s)) if self.traffic.jitter_s else 0.0

    def arrive(self):
        rng, traffic = self.rng, self.traffic
        while self.next_s <= self.now_s:
            prompt = 1 + int(rng.lognormal(np.log(traffic.prompt_tokens) - 0.5, 1.0))
            output = 1 + int(rng.exponential(traffic.output_tokens))
            self.dispatcher.arrive(PendingRequest(prompt, session_keys=(output,)), self.next_s)
            self.next_s += rng.exponential(1 / self.rate)

    def begin(self):
        """Return how long the step takes that begins, None where there is nothing to do."""
        truth = self.truth
        prefills = [worker.prefill(truth.chunk, self.traffic.slots) for worker in self.workers]
        loads = [sum(request.kv for request in worker.running) for worker in self.workers]
        if not any(loads) and not any(prefills):
            return None
        slowest = max(slow * load for slow, load in zip(truth.slowness, loads, strict=True))
        return truth.base_s + truth.s_per_kv_token * slowest + truth.s_per_prefill_token * max(prefills)

    def end(self):
        self.ended = False
        for worker in self.workers:
            for request in worker.running:
                self.decode(request)
            worker.running = [request for request in worker.running if request.output]

    def decode(self, request):
        """Decode a token, and tell it if an event is due; the first one always is, and the last."""
        request.kv += 1
        request.to_tell += 1
        request.output -= 1
        request_id = request.entry.id
        if not request.has_begun:
            request.has_begun = True
            self.ledger.first_token(request_id, self.now_s + self.late_s())
        elif request.output and self.rng.random() * self.traffic.tokens_per_event > 1:
            return
        self.ledger.grow(request_id, request.to_tell)
        request.to_tell = 0
        if not request.output:
            self.ended = True
            self.dispatcher.end(request_id, Event.FINISH)
