"""Room to grow: what a round admits fits, now and as far ahead as anybody expects."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.growth import _NEWCOMER, _STEPS
from brproxy.ledger import Ledger
from brproxy.lifecycle import Event
from brproxy.prediction.predictor import make_predictor
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policies.least_kv import LeastKvPolicy
from brproxy.routing.policy import POLICIES, make_policy
from brproxy.types import PendingRequest, WorkerIndex
from loadgen.arrivals import with_gamma_arrivals
from loadgen.capacity import perfect_capacity
from loadgen.cluster import ClusterSettings
from loadgen.simulator import SimulatedPolicy, simulate
from loadgen.traces.synthetic import synthetic_workload
from tests.draws import draws

SHARE = 0.02


def dispatcher_of(policy, limits, predictor="survival", share=SHARE):
    params = POLICIES.get(policy).Params(late_binding=True)
    ledger = Ledger(Roster.of(limits))
    rng = np.random.default_rng(0)
    pool = PoolLimits(10_000, 1e9, share)
    return Dispatcher(ledger, make_policy(policy, params), make_predictor(predictor), rng, pool)


def bind(dispatcher, worker, prompt, output=0, **known):
    request = PendingRequest(prompt, **known)
    request_id = dispatcher.arrive(request, 0.0)
    dispatcher.bind(request_id, WorkerIndex(worker), 0.0, dispatcher.predictor.prospect(request))
    dispatcher.ledger.grow(request_id, output)
    return request_id


bound_requests = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(0, 900),
        st.integers(0, 300),
        st.sampled_from([None, None, None, 10, 400]),
        st.booleans(),
    ),
    max_size=12,
)
lengths = st.lists(st.integers(1, 900), min_size=1, max_size=30)


@draws(150)
@given(
    policy=st.sampled_from(["br-0", "br-h", "least-kv", "join-shortest-queue"]),
    predictor=st.sampled_from(["survival", "exact-match"]),
    lengths=lengths,
    bound=bound_requests,
    waiting=st.lists(st.integers(1, 1500), min_size=1, max_size=20),
    capacity=st.sampled_from([2000, 5000, 20_000]),
    offset=st.sampled_from([0, 0, 700, -300]),
)
def test_what_is_admitted_fits_as_far_ahead_as_is_expected(
    policy, predictor, lengths, bound, waiting, capacity, offset
):
    dispatcher = dispatcher_of(policy, [WorkerLimits(64, capacity)] * 3, predictor)
    ledger, known = dispatcher.ledger, dispatcher.predictor
    for i, length in enumerate(lengths):
        known.observe(PendingRequest(1, prompt_hash=i % 3), length)
    for worker, prompt, output, limit, certain in bound:
        bind(dispatcher, worker, prompt, output, output_tokens_max=limit, runs_to_max=certain)
    ledger.set_offset(WorkerIndex(1), offset)
    before, load = ledger.requests, np.array(ledger.load())
    horizon = int(_STEPS[19])
    steps = _STEPS[:20]
    expected = known.forecast(ledger.active(), 3, horizon)[:, steps]
    expected += (load - np.array(ledger.kv_tokens))[:, None]
    runs = known.survival(_NEWCOMER, horizon)[0, steps]
    for prompt in waiting:
        dispatcher.arrive(PendingRequest(prompt), 0.0)
    admitted = dispatcher.decide(0.0, dispatcher.roster.routable())
    for worker in range(3):
        prompts = [entry.prompt_tokens for entry in admitted if entry.worker == worker]
        if not prompts:
            continue
        room = (1 - SHARE) * capacity - expected[worker] - runs * (sum(prompts) + len(prompts) * steps)
        # A worker that has nothing takes any one request. Forecasts are of single precision.
        assert (room > -1e-3 * capacity).all() or (before[worker] == 0 and len(prompts) == 1)
    # Whoever is left waits for room, and that is there once nothing runs.
    assert admitted or sum(before) > 0


@given(st.integers(1, 1000), st.sampled_from(["br-0", "br-h", "least-kv"]), st.booleans())
def test_a_request_alone_on_an_empty_worker_always_goes(prompt, policy, in_a_crowd):
    dispatcher = dispatcher_of(policy, [WorkerLimits(8, 1000)])
    for _ in range(100):
        dispatcher.predictor.observe(PendingRequest(1), 5000)
    for _ in range(5 if in_a_crowd else 1):
        dispatcher.arrive(PendingRequest(prompt), 0.0)
    assert len(dispatcher.decide(0.0, [True])) == 1


def test_a_group_that_is_filled_at_once_is_filled_to_what_it_grows_to():
    # A prompt of 100 tokens grows by 1000: 98,000 tokens hold some ninety of them at their end.
    dispatcher = dispatcher_of("br-0", [WorkerLimits(512, 100_000)])
    for _ in range(500):
        dispatcher.predictor.observe(PendingRequest(1), 1000)
    for _ in range(600):
        dispatcher.arrive(PendingRequest(100), 0.0)
    for step in range(20):
        dispatcher.decide(float(step), [True])
    assert 80 <= dispatcher.ledger.bound <= 105


def test_as_requests_end_there_is_room_again():
    dispatcher = dispatcher_of("br-0", [WorkerLimits(64, 10_000)])
    running = [bind(dispatcher, 0, 4000), bind(dispatcher, 0, 4000)]
    for _ in range(50):
        dispatcher.predictor.observe(PendingRequest(1), 800)
    dispatcher.arrive(PendingRequest(1500), 0.0)
    assert dispatcher.decide(0.0, [True]) == []
    dispatcher.end(running[0], Event.CANCEL)
    assert len(dispatcher.decide(1.0, [True])) == 1


@pytest.mark.parametrize(("capacity", "share"), [(None, SHARE), (3000, 0.0), (1_000_000, SHARE)])
def test_rounds_see_all_room_where_none_is_to_be_left(capacity, share):
    dispatcher = dispatcher_of("br-0", [WorkerLimits(8, capacity)], share=share)
    bind(dispatcher, 0, 900)
    entry = dispatcher.entry(dispatcher.arrive(PendingRequest(10), 0.0))
    state = dispatcher._state([entry], [True], 0.0)
    assert state == dispatcher.ledger.state([True], late_binding=True)


def test_who_binds_early_lets_the_worker_queue():
    dispatcher = dispatcher_of("least-kv", [WorkerLimits(8, 1000)])
    dispatcher.policy = LeastKvPolicy(LeastKvPolicy.Params(late_binding=False))
    for _ in range(4):
        dispatcher.arrive(PendingRequest(900), 0.0)
    assert len(dispatcher.decide(0.0, [True])) == 4


def test_without_a_predictor_the_share_is_what_is_left():
    dispatcher = dispatcher_of("br-0", [WorkerLimits(8, 1000)], share=0.1)
    bind(dispatcher, 0, 500)

    def broken(*_):
        raise ZeroDivisionError

    dispatcher.predictor.load_at = broken
    entry = dispatcher.entry(dispatcher.arrive(PendingRequest(401), 0.0))
    assert dispatcher._state([entry], [True], 0.0).kv_free == [400]
    assert dispatcher.decide(0.0, [True]) == []
    assert dispatcher.faults.counts["predictor"] == 2


@given(bound_requests, lengths)
def test_room_is_not_left_for_who_has_known_limits(bound, lengths):
    assume(bound)
    dispatcher = dispatcher_of("br-0", [WorkerLimits(64, 100_000)] * 3)
    for length in lengths:
        dispatcher.predictor.observe(PendingRequest(1), length)
    for worker, prompt, output, _, _ in bound:
        bind(dispatcher, worker, prompt, output, output_tokens_max=output)
    load = dispatcher.predictor.load_at(dispatcher.ledger.active(), 3, _STEPS)
    assert (load[:, 1:] == 0).all(), "they end in the next step"


@pytest.mark.parametrize("policy", ["br-0", "br-h"])
def test_workers_whose_kv_is_the_limit_hardly_preempt(policy):
    settings = ClusterSettings(workers=4, slots=256, kv_capacity_tokens=80_000)
    rng = np.random.default_rng(1)
    workload = synthetic_workload("short", 1200, rng)
    rate_per_s = 1.1 * perfect_capacity(workload, settings).requests_per_s
    workload = with_gamma_arrivals(workload, rate_per_s, 1.0, rng)
    baseline, balanced = (
        simulate(workload, settings, SimulatedPolicy(name), 1) for name in ("join-shortest-queue", policy)
    )
    assert baseline.preemptions > 20
    assert balanced.preemptions <= baseline.preemptions / 4
    busy_s, baseline_s = (run.record.stats(0.0, np.inf).busy_s for run in (balanced, baseline))
    assert busy_s <= 1.05 * baseline_s
