"""What an offset does to decisions, and that without one nothing is as it was not before."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.ledger import Ledger
from brproxy.prediction.predictor import make_predictor
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policy import make_policy
from brproxy.types import PendingRequest, WorkerIndex

BALANCING = ["br-0", "br-h", "least-kv"]
loads = st.lists(st.tuples(st.integers(0, 5000), st.integers(-9000, 9000)), min_size=2, max_size=5)


def dispatcher_of(policy, workers, capacity=None, predictor="survival"):
    return Dispatcher(
        Ledger(Roster.of([WorkerLimits(8, capacity)] * workers)),
        make_policy(policy),
        make_predictor(predictor),
        np.random.default_rng(0),
        PoolLimits(100, 10.0),
    )


def load(dispatcher, worker, prompt_tokens):
    request_id = dispatcher.arrive(PendingRequest(prompt_tokens), 0.0)
    dispatcher.bind(request_id, WorkerIndex(worker), 0.0)


def decide(dispatcher):
    return [entry.worker for entry in dispatcher.decide(1.0, [True] * len(dispatcher.roster))]


@pytest.mark.parametrize("policy", BALANCING)
@pytest.mark.parametrize("waiting", [1, 3])
def test_what_did_not_come_through_is_load(policy, waiting):
    dispatcher = dispatcher_of(policy, 2)
    load(dispatcher, 1, 5000)
    dispatcher.ledger.set_offset(WorkerIndex(0), 50_000)
    for _ in range(waiting):
        dispatcher.arrive(PendingRequest(100), 0.0)
    assert decide(dispatcher) == [1] * waiting
    dispatcher.ledger.set_offset(WorkerIndex(0), 0)
    for _ in range(waiting):
        dispatcher.arrive(PendingRequest(100), 0.0)
    assert decide(dispatcher) == [0] * waiting, "and it is none once it has gone"


@pytest.mark.parametrize("policy", BALANCING)
def test_what_is_booked_and_not_there_is_none(policy):
    dispatcher = dispatcher_of(policy, 2)
    load(dispatcher, 0, 9000)
    load(dispatcher, 1, 4000)
    dispatcher.ledger.set_offset(WorkerIndex(0), -8000)
    dispatcher.arrive(PendingRequest(100), 0.0)
    assert decide(dispatcher) == [0]


def test_room_is_what_neither_has_taken():
    dispatcher = dispatcher_of("br-0", 1, capacity=1000)
    dispatcher.ledger.set_offset(WorkerIndex(0), 700)
    dispatcher.arrive(PendingRequest(400), 0.0)
    assert decide(dispatcher) == []
    dispatcher.ledger.set_offset(WorkerIndex(0), 600)
    assert decide(dispatcher) == [0]
    assert dispatcher.ledger.kv_tokens == (400,)


def test_what_takes_no_slot_sees_it_too():
    dispatcher = dispatcher_of("br-0", 2)
    dispatcher.ledger.set_offset(WorkerIndex(0), 1)
    entries = [dispatcher.enter(PendingRequest(5, sequences=0), 0.0) for _ in range(3)]
    assert decide(dispatcher) == [1, 0, 1]
    assert [entry.worker for entry in entries] == [1, 0, 1]


@pytest.mark.parametrize("predictor", ["survival", "oracle"])
@given(workers=loads, horizon_steps=st.integers(1, 12))
def test_a_forecast_is_what_it_was_and_the_offset(predictor, workers, horizon_steps):
    plain, moved = (dispatcher_of("br-h", len(workers), predictor=predictor) for _ in range(2))
    for dispatcher in (plain, moved):
        for worker, (prompt_tokens, _) in enumerate(workers):
            load(dispatcher, worker, prompt_tokens)
    for worker, (_, offset) in enumerate(workers):
        moved.ledger.set_offset(WorkerIndex(worker), offset)
    mask = [True] * len(workers)
    states = [d.ledger.state(mask, late_binding=True) for d in (plain, moved)]
    before, after = (
        d._foresight.forecast(state, horizon_steps) for d, state in zip((plain, moved), states, strict=True)
    )
    offsets = np.array([offset for _, offset in workers], dtype=float)[:, None]
    np.testing.assert_array_equal(after, np.maximum(before + offsets, 0))
    np.testing.assert_array_equal(after[:, 0], states[1].kv_tokens)
    discounts = 0.9 ** np.arange(horizon_steps + 1)
    sums = [
        d._foresight.discounted_load(state, discounts)
        for d, state in zip((plain, moved), states, strict=True)
    ]
    expected = [max(kv + o * discounts.sum(), 0) for kv, (_, o) in zip(sums[0], workers, strict=True)]
    assert sums[1] == pytest.approx(expected)
    assert min(sums[1]) >= 0


@given(workers=loads)
def test_an_offset_that_has_gone_leaves_nothing_behind(workers):
    plain, moved = (dispatcher_of("br-h", len(workers)) for _ in range(2))
    for worker, (_, offset) in enumerate(workers):
        moved.ledger.set_offset(WorkerIndex(worker), offset)
        moved.ledger.set_offset(WorkerIndex(worker), 0)
    for dispatcher in (plain, moved):
        for worker, (prompt_tokens, _) in enumerate(workers):
            load(dispatcher, worker, prompt_tokens)
        for _ in range(3):
            dispatcher.arrive(PendingRequest(50), 0.0)
    mask = [True] * len(workers)
    for late_binding in (True, False):
        assert plain.ledger.state(mask, late_binding=late_binding) == moved.ledger.state(
            mask, late_binding=late_binding
        )
    assert decide(plain) == decide(moved)
