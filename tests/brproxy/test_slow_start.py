"""A worker that comes back empty gets its slots bit by bit; nobody else notices, nobody waits for ever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.health import HealthThresholds
from brproxy.ledger import Ledger
from brproxy.lifecycle import Event, entry_of
from brproxy.prediction.predictor import make_predictor
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policy import POLICIES, make_policy
from brproxy.types import PendingRequest, RequestId, WorkerIndex

RAMP_S = 10.0
SLOTS = 64


def record(roster, index, *, ok, now_s):
    roster.record(roster.member(index), ok=ok, reason="", now_s=now_s)


def ledger_of(workers=4, ramp_s=RAMP_S):
    roster = Roster(HealthThresholds(unhealthy_after=1))
    for index in range(workers):
        roster.add(str(index), WorkerLimits(SLOTS))
    ledger = Ledger(roster, ramp_s)
    for index in range(workers):
        record(roster, index, ok=True, now_s=0.0)
    return ledger


def returns(ledger, index, now_s):
    record(ledger.roster, index, ok=False, now_s=now_s)
    record(ledger.roster, index, ok=True, now_s=now_s)


def bind(ledger, number, worker, now_s=0.0):
    ledger.bind(entry_of(RequestId(number), PendingRequest(10), now_s, 10**6), WorkerIndex(worker), now_s)


def free(ledger, now_s, routable=None, late_binding=True):
    mask = ledger.roster.routable() if routable is None else routable
    return ledger.state(mask, late_binding=late_binding, now_s=now_s).slots_free


def test_a_start_is_not_slow():
    assert free(ledger_of(), 0.0) == [SLOTS] * 4


def test_slots_grow_evenly_and_all_are_there_at_the_end():
    ledger = ledger_of()
    returns(ledger, 1, 100.0)
    seen = [free(ledger, 100.0 + s)[1] for s in (0.0, 0.1, 2.5, 5.0, 7.5, 9.9, 10.0)]
    assert seen == [1, 1, 16, 32, 48, 64, 64]
    assert free(ledger, 101.0)[1] == SLOTS, "it is over"


@given(st.integers(0, 30), st.lists(st.floats(0, 12), max_size=8))
def test_it_never_takes_more_than_its_share_and_only_ever_more_of_it(bound, times):
    ledger = ledger_of()
    returns(ledger, 2, 100.0)
    for number in range(bound):
        bind(ledger, number, 2)
    before = 0
    for at_s in sorted(times):
        slots = free(ledger, 100.0 + at_s)
        share = SLOTS if at_s >= RAMP_S else max(1, int(np.ceil(SLOTS * at_s / RAMP_S)))
        assert before <= slots[2] <= max(0, share - bound)
        assert slots[:2] + slots[3:] == [SLOTS] * 3, "the others are left alone"
        before = slots[2]


def test_one_that_still_has_requests_is_not_empty():
    ledger = ledger_of()
    bind(ledger, 0, 1)
    returns(ledger, 1, 100.0)
    assert free(ledger, 100.0)[1] == SLOTS - 1


def test_one_that_joins_or_comes_up_late_is_new():
    ledger = ledger_of()
    ledger.roster.add("late", WorkerLimits(SLOTS))
    record(ledger.roster, 4, ok=True, now_s=100.0)
    assert free(ledger, 102.5) == [SLOTS] * 4 + [16]


def test_where_most_are_new_nobody_is_spared():
    ledger = ledger_of()
    for index in range(2):
        returns(ledger, index, 100.0)
    assert free(ledger, 100.0) == [1, 1, SLOTS, SLOTS]
    returns(ledger, 2, 100.0)
    assert free(ledger, 100.0) == [SLOTS] * 4
    # Whoever is out spares nobody.
    ledger = ledger_of(2)
    returns(ledger, 0, 100.0)
    assert free(ledger, 100.0) == [1, SLOTS]
    record(ledger.roster, 1, ok=False, now_s=100.0)
    assert free(ledger, 100.0) == [SLOTS, 0]


def test_one_that_goes_out_again_or_away_begins_anew():
    ledger = ledger_of()
    returns(ledger, 1, 100.0)
    returns(ledger, 1, 105.0)
    assert free(ledger, 107.5)[1] == 16
    ledger.roster.remove("1", 0)
    # Its index is another's now, which waits for its first check.
    ledger.roster.add("other", WorkerLimits(SLOTS))
    assert free(ledger, 107.5, [True] * 4)[1] == SLOTS


def test_off_is_off():
    ledger = ledger_of(ramp_s=0.0)
    returns(ledger, 1, 100.0)
    assert free(ledger, 100.0) == [SLOTS] * 4


@pytest.mark.parametrize("policy", POLICIES.names())
@pytest.mark.parametrize("together", [False, True], ids=["one-by-one", "together"])
def test_no_policy_floods_it_and_all_is_admitted_in_time(policy, together):
    ledger = ledger_of()
    parts = make_policy(policy), make_predictor("survival"), np.random.default_rng(0), PoolLimits()
    dispatcher = Dispatcher(ledger, *parts)
    for number in range(30):
        entry = dispatcher.enter(PendingRequest(1000), 0.0)
        dispatcher.bind(entry.id, WorkerIndex(number % 3), 0.0)
    returns(ledger, 3, 100.0)
    mask = ledger.roster.routable()
    for _ in range(40):
        dispatcher.enter(PendingRequest(100), 101.0)
        if not together:
            dispatcher.decide(101.0, mask)
    dispatcher.decide(101.0, mask)
    assert 1 <= ledger.requests[3] <= 7, "a tenth of its slots"
    if policy == "prefill-in-step":
        # It has them wait for what is prefilled now, for a while.
        dispatcher.decide(106.5, mask)
    assert dispatcher.waiting.count == 0, "the others have room"
    for _ in range(100):
        dispatcher.enter(PendingRequest(100), 111.0)
    dispatcher.decide(111.0, mask)
    assert ledger.requests[3] > 7
    for entry in list(ledger._rows):
        dispatcher.end(entry.id, Event.FINISH)
    assert ledger.kv_tokens == (0, 0, 0, 0)
