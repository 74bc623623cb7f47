"""Rounds in which a policy holds requests although slots are free."""

import numpy as np

from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.ledger import Ledger
from brproxy.lifecycle import Event
from brproxy.prediction.predictor import make_predictor
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policies.br_0 import Br0Policy
from brproxy.routing.policy import POLICIES
from brproxy.routing.view import NOT_ADMITTED
from brproxy.step_costs import StepCosts
from brproxy.types import PendingRequest, RequestId
from tests.brproxy.test_dispatcher import dispatcher_of, routable


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
    assert seen == [2 + 64, 2 + 256]
