"""Rounds in which a policy holds requests although slots are free."""

from itertools import accumulate

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.ledger import Ledger
from brproxy.lifecycle import Event
from brproxy.prediction.predictor import make_predictor
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policies.br_0 import Br0Policy
from brproxy.routing.policy import POLICIES, make_policy
from brproxy.routing.view import NOT_ADMITTED
from brproxy.step_costs import StepCosts
from brproxy.types import PendingRequest, RequestId
from tests.brproxy.test_dispatcher import dispatcher_of, routable
from tests.draws import draws


class Holding(Br0Policy):
    """Admits nobody before slots have been held for two seconds, and notes what it saw."""

    def __init__(self):
        super().__init__(POLICIES.get("br-0").Params())
        self.seen = []

    def route(self, view, rng):
        self.seen.append(view.held_s)
        waits = np.full(view.waiting, NOT_ADMITTED)
        return super().route(view, rng) if view.held_s >= 2 else waits


def test_a_round_knows_for_how_long_slots_have_been_held():
    dispatcher = dispatcher_of(slots=(1, 1))
    policy = Holding()
    dispatcher.decide_by(policy)
    for _ in range(3):
        dispatcher.arrive(PendingRequest(100), 0.0)
    for now_s in (5.0, 6.5, 7.0):
        dispatcher.decide(now_s, routable(dispatcher))
    assert policy.seen == [0.0, 1.5, 2.0]
    assert dispatcher.ledger.bound == 2
    # While no slot is free nobody is held; and what was bound ends the time.
    dispatcher.arrive(PendingRequest(100), 8.0)
    dispatcher.decide(20.0, routable(dispatcher))
    dispatcher.end(RequestId(0), Event.FINISH)
    for now_s in (30.0, 31.0):
        dispatcher.decide(now_s, routable(dispatcher))
    assert policy.seen[3:] == [0.0, 1.0]


def test_requests_are_seen_as_far_as_the_policy_looks_at_these_costs():
    costs = StepCosts(0.03, 1e-7, 2e-5)
    seen = []
    for known in (None, costs):
        ledger = Ledger(Roster.of([WorkerLimits(1)] * 2))
        policy = Holding()
        policy.route = lambda view, rng: seen.append(view.waiting) or np.full(view.waiting, NOT_ADMITTED)
        predictor, rng = make_predictor("survival"), np.random.default_rng(0)
        dispatcher = Dispatcher(ledger, policy, predictor, rng, PoolLimits(999, 9.0), costs=lambda k=known: k)
        for _ in range(400):
            dispatcher.arrive(PendingRequest(100), 0.0)
        dispatcher.decide(0.0, routable(dispatcher))
    assert seen == [2 + 400 // 8, 2 + 256]


class WholeSteps:
    """A prefill group that steps together: whole prompts, those that are there when a step begins."""

    def __init__(self, dispatcher):
        self.dispatcher = dispatcher
        self.queued, self.running, self.ends_s = [], [], 0.0

    def go_on(self, now_s):
        ledger = self.dispatcher.ledger
        if self.running and now_s >= self.ends_s:
            for entry in self.running:
                ledger.first_token(entry.id, now_s)
                ledger.rest(entry.id)
                self.dispatcher.end(entry.id, Event.FINISH)
            self.running = []
        if not self.running and self.queued:
            self.running, self.queued = self.queued, []
            sums = [0] * len(ledger.requests)
            for entry in self.running:
                sums[entry.worker] += entry.prompt_tokens
            self.ends_s = now_s + 0.03 + 1e-4 * max(sums)


@draws(40)
@given(
    gaps_ms=st.lists(st.integers(0, 400), min_size=1, max_size=40),
    prompts=st.lists(st.sampled_from([10, 300, 2000, 12_000]), min_size=40, max_size=40),
    stuck=st.booleans(),
)
def test_nobody_waits_over_the_bound_for_a_step_and_all_is_given_back(gaps_ms, prompts, stuck):
    dispatcher = dispatcher_of(slots=(99,) * 3)
    dispatcher.decide_by(
        make_policy("prefill-in-step", POLICIES.get("prefill-in-step").Params(wait_s_max=2.0))
    )
    group, now_ms, bound_s = WholeSteps(dispatcher), 0, {}
    if stuck:
        # Nobody will ever hear of it.
        lost = dispatcher.arrive(PendingRequest(5), 0.0)
        dispatcher.decide(0.0, routable(dispatcher))
    arrivals = list(zip(accumulate(gaps_ms), prompts, strict=False))
    while arrivals or len(dispatcher.waiting) or group.running or group.queued:
        while arrivals and arrivals[0][0] <= now_ms:
            dispatcher.arrive(PendingRequest(arrivals.pop(0)[1]), now_ms / 1e3)
        group.go_on(now_ms / 1e3)
        for entry in dispatcher.decide(now_ms / 1e3, routable(dispatcher)):
            bound_s[entry.id] = now_ms / 1e3 - entry.arrived_s
            group.queued.append(entry)
        group.go_on(now_ms / 1e3)
        now_ms += 5
    assert max(bound_s.values()) <= 2 * 2.0 + 0.005
    if stuck:
        dispatcher.end(lost, Event.CANCEL)
    ledger = dispatcher.ledger
    assert not any((*ledger.prefill_tokens, *ledger.kv_tokens, *ledger.requests))


def test_who_is_alone_goes_at_once_and_who_comes_later_waits_for_the_step():
    dispatcher = dispatcher_of(slots=(9, 9))
    dispatcher.decide_by(make_policy("prefill-in-step"))
    first = dispatcher.arrive(PendingRequest(100), 0.0)
    assert len(dispatcher.decide(0.0, routable(dispatcher))) == 1
    for tokens in (30, 20, 20, 10):
        dispatcher.arrive(PendingRequest(tokens), 0.1)
        assert dispatcher.decide(0.1, routable(dispatcher)) == []
    dispatcher.ledger.first_token(first, 0.2)
    assert len(dispatcher.decide(0.2, routable(dispatcher))) == 4
    assert dispatcher.ledger.prefill_tokens == (40, 40)
