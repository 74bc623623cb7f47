"""One decision round after another, in time that the test makes."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.ledger import Ledger
from brproxy.lifecycle import Event
from brproxy.prediction.predictor import make_predictor
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policy import POLICIES, make_policy
from brproxy.routing.view import NOT_ADMITTED, ClusterView, Outlook
from brproxy.step_costs import StepCosts
from brproxy.types import PendingRequest, WorkerIndex
from brproxy.waiting import PoolFullError, PromptTooLongError
from tests.draws import draws

POOL = PoolLimits(100, 10.0)


def dispatcher_of(policy="br-0", slots=(2, 2), capacity=None, pool=POOL):
    ledger = Ledger(Roster.of([WorkerLimits(n, capacity) for n in slots]))
    return Dispatcher(ledger, make_policy(policy), make_predictor("survival"), np.random.default_rng(0), pool)


def routable(dispatcher, *down):
    return [worker not in down for worker in range(len(dispatcher.roster))]


@pytest.mark.parametrize("policy", POLICIES.names())
def test_every_policy_serves_everything_in_the_end(policy):
    dispatcher = dispatcher_of(policy, slots=(2, 3), capacity=4000)
    rng = np.random.default_rng(5)
    running, served = [], 0
    for prompt in rng.integers(1, 2000, 60).tolist():
        dispatcher.arrive(PendingRequest(prompt), 0.0)
    for step in range(200):
        running += [a.id for a in dispatcher.decide(float(step), routable(dispatcher))]
        for request_id in running[:2]:
            dispatcher.ledger.grow(request_id, 10)
            dispatcher.end(request_id, Event.FINISH)
            served += 1
        running = running[2:]
    assert served == 60
    assert dispatcher.ledger.kv_tokens == (0, 0)


def test_late_binding_waits_for_a_slot():
    dispatcher = dispatcher_of(slots=(1, 1))
    for _ in range(3):
        dispatcher.arrive(PendingRequest(10), 0.0)
    first = dispatcher.decide(0.0, routable(dispatcher))
    assert sorted(a.worker for a in first) == [0, 1]
    assert dispatcher.decide(1.0, routable(dispatcher)) == []
    dispatcher.end(first[0].id, Event.FINISH)
    assert [a.worker for a in dispatcher.decide(2.0, routable(dispatcher))] == [first[0].worker]


@draws(50)
@given(st.integers(34, 700), st.integers(0, 66))
def test_who_fits_overtakes_few_of_those_that_wait(waiting, position):
    dispatcher = dispatcher_of(slots=(1, 1), pool=PoolLimits(1000, 10.0))
    # One worker has a large request, so that the other has a margin for one.
    dispatcher.bind(dispatcher.arrive(PendingRequest(1000), 0.0), WorkerIndex(0), 0.0)
    for i in range(waiting):
        dispatcher.arrive(PendingRequest(300 if i == position else 10), 0.0)
    (first,) = dispatcher.decide(0.0, routable(dispatcher))
    # The free slot is for one more.
    looked_at = min(64, 1 + min(64, max(32, waiting // 8)))
    assert (first.prompt_tokens == 300) == (position < min(waiting, looked_at))


def test_late_binding_waits_for_kv_room():
    dispatcher = dispatcher_of(slots=(8,), capacity=100)
    dispatcher.arrive(PendingRequest(80), 0.0)
    dispatcher.arrive(PendingRequest(30), 0.0)
    (only,) = dispatcher.decide(0.0, routable(dispatcher))
    dispatcher.end(only.id, Event.CANCEL)
    assert len(dispatcher.decide(1.0, routable(dispatcher))) == 1


def test_early_binding_queues_in_the_worker():
    dispatcher = dispatcher_of("join-shortest-queue", slots=(1, 1))
    for _ in range(6):
        dispatcher.arrive(PendingRequest(10), 0.0)
    assert len(dispatcher.decide(0.0, routable(dispatcher))) == 6
    assert dispatcher.ledger.requests == (3, 3)


def test_workers_that_are_down_get_nothing():
    dispatcher = dispatcher_of()
    dispatcher.arrive(PendingRequest(10), 0.0)
    assert dispatcher.decide(0.0, routable(dispatcher, 0, 1)) == []
    assert [a.worker for a in dispatcher.decide(0.0, routable(dispatcher, 0))] == [1]


def test_a_retry_goes_elsewhere_and_first():
    dispatcher = dispatcher_of(slots=(1, 1))
    failed = dispatcher.arrive(PendingRequest(10), 0.0)
    first = dispatcher.decide(0.0, routable(dispatcher))[0].worker
    dispatcher.retry(failed, 1.0)
    dispatcher.arrive(PendingRequest(10), 1.0)
    again = dispatcher.decide(1.0, routable(dispatcher))
    assert again[0].id == failed
    assert again[0].worker != first


def test_a_retry_returns_to_the_same_worker_only_when_that_has_come_back():
    dispatcher = dispatcher_of(slots=(1,))
    failed = dispatcher.arrive(PendingRequest(10), 0.0)
    dispatcher.decide(0.0, routable(dispatcher))
    dispatcher.retry(failed, 1.0)
    assert dispatcher.decide(1.0, routable(dispatcher)) == []
    for ok in (False, False, False, True):
        dispatcher.roster.record(dispatcher.roster.member(0), ok=ok, reason="", now_s=2.0)
    assert [a.worker for a in dispatcher.decide(3.0, routable(dispatcher))] == [0]


def test_expiry_counts_from_when_the_request_entered_the_pool():
    dispatcher = dispatcher_of(slots=(1,))
    failed = dispatcher.arrive(PendingRequest(10), 0.0)
    dispatcher.decide(0.0, routable(dispatcher))
    waiting = dispatcher.arrive(PendingRequest(10), 5.0)
    dispatcher.retry(failed, 100.0)
    assert dispatcher.expired(15.0) == []
    assert dispatcher.expired(100.0) == [waiting]
    assert sorted(dispatcher.expired(111.0)) == [failed, waiting]


def test_the_pool_is_bounded():
    dispatcher = dispatcher_of(pool=PoolLimits(2, 10.0))
    for _ in range(2):
        dispatcher.arrive(PendingRequest(10), 0.0)
    with pytest.raises(PoolFullError, match="2 requests are waiting already"):
        dispatcher.arrive(PendingRequest(10), 0.0)


def test_a_prompt_that_never_fits_is_refused_at_once():
    dispatcher = dispatcher_of(capacity=100)
    with pytest.raises(PromptTooLongError, match=r"has 101 tokens.*\(100 tokens\)"):
        dispatcher.arrive(PendingRequest(101, prompt_is_exact=True), 0.0)


def test_a_guess_that_never_fits_is_placed_all_the_same():
    dispatcher = dispatcher_of(capacity=100)
    dispatcher.arrive(PendingRequest(10**6), 0.0)
    assert len(dispatcher.decide(0.0, routable(dispatcher))) == 1
    assert sum(dispatcher.ledger.kv_tokens) == 100


@pytest.mark.parametrize(
    ("event", "output", "limit", "known"),
    [
        (Event.FINISH, 7, None, [7]),
        (Event.FINISH, 7, 8, [7]),
        (Event.FINISH, 8, 8, [-9]),
        (Event.CANCEL, 7, None, [-8]),
        (Event.FAIL, 7, 8, [-8]),
        (Event.CANCEL, 0, None, []),
        (Event.FINISH, 0, None, []),
    ],
)
def test_what_ended_by_itself_teaches_its_length_and_what_was_cut_that_it_is_longer(
    event, output, limit, known
):
    dispatcher = dispatcher_of()
    request_id = dispatcher.arrive(PendingRequest(10, output_tokens_max=limit), 0.0)
    dispatcher.decide(0.0, routable(dispatcher))
    dispatcher.ledger.grow(request_id, output)
    dispatcher.end(request_id, event)
    assert dispatcher.predictor.state()["lengths"] == known


def test_what_still_runs_teaches_that_it_is_longer():
    dispatcher = dispatcher_of(slots=(200,))
    requests = [dispatcher.arrive(PendingRequest(10), 0.0) for _ in range(100)]
    dispatcher.decide(0.0, routable(dispatcher))
    for request_id in requests:
        dispatcher.ledger.grow(request_id, 50)
    for request_id in requests[:5]:
        dispatcher.end(request_id, Event.FINISH)
    active = dispatcher.ledger.active().only(slice(0, 1))
    young = replace(active, output_tokens=np.zeros(1, dtype=np.int64))
    # Of a hundred that have come as far five have ended, and nobody knows of the others.
    assert dispatcher.predictor.survival(young, 49)[0, 49] > 0.9
    assert dispatcher.predictor.survival(young, 50)[0, 50] == pytest.approx(0.95, abs=0.01)
    # Few have ended, so what is assumed before any has stands for what is beyond.
    assumed = dispatcher.predictor.params.prior_output_tokens
    assert dispatcher.predictor.mean_output_tokens == pytest.approx(50 + 0.95 * assumed, rel=0.01)


def test_every_request_that_overtakes_is_counted():
    dispatcher = dispatcher_of(slots=(1, 3))
    heavy = dispatcher.arrive(PendingRequest(1000), 0.0)
    dispatcher.bind(heavy, WorkerIndex(0), 0.0)
    waiting = [dispatcher.arrive(PendingRequest(prompt), 0.0) for prompt in (3000, 500, 2000, 300, 200, 4000)]
    admitted = {assignment.id for assignment in dispatcher.decide(0.0, routable(dispatcher))}
    assert admitted == {waiting[1], waiting[3], waiting[4]}, "together they fill the margin"
    counts = [dispatcher.entry(request).passed_over for request in waiting]
    assert counts == [3, 0, 2, 0, 0, 0]


bound_requests = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from([5, 5, 60, 900]),
        st.sampled_from([0, 3, 40]),
        st.sampled_from([None, None, 10, 50, 900]),
        st.booleans(),
    ),
    max_size=14,
)
"""Worker, prompt, output so far, ``max_tokens`` and whether the output gets exactly that long."""


def decided_by_a_round(dispatcher, entry, mask, seed, costs):
    """What the policy says of a view with one waiting request, and each worker's discounted load."""
    ledger, policy, predictor = dispatcher.ledger, dispatcher.policy, dispatcher.predictor
    discounts, turnover = dispatcher._foresight.discounts()
    forecast = predictor.forecast(ledger.active(), len(ledger.roster), len(discounts) - 1)
    view = ClusterView.of(
        dispatcher._state([entry], mask, 0.0),
        [entry.prompt_tokens],
        [entry.passed_over],
        Outlook(forecast, turnover, predictor.LOOKAHEAD_TURNOVERS, predictor.GROWTH_FORESEEN, costs),
    )
    return int(policy.route(view, np.random.default_rng(seed))[0]), forecast @ discounts * (
        1.0 if costs is None else np.array(costs.slowness)
    )


@draws(250)
@given(
    policy=st.sampled_from(["br-0", "br-h", "br-h", "least-kv"]),
    predictor=st.sampled_from(["survival", "exact-match"]),
    bound=bound_requests,
    limits=st.lists(
        st.builds(WorkerLimits, st.integers(1, 5), st.sampled_from([None, 1000, 3000])),
        min_size=4,
        max_size=4,
    ),
    mask=st.lists(st.booleans(), min_size=4, max_size=4),
    prompt=st.sampled_from([0, 70, 800]),
    passed_over=st.sampled_from([0, 4096]),
    seed=st.integers(0, 3),
    slowness=st.sampled_from([None, None, (1.0, 1.0, 0.9, 1.1)]),
    order=st.sampled_from(["headroom", "headroom", "slots"]),
)
def test_a_request_that_arrives_alone_goes_where_a_round_would_put_it(
    *, policy, predictor, bound, limits, mask, prompt, passed_over, seed, slowness, order
):
    ledger = Ledger(Roster.of(limits))
    rng = np.random.default_rng(seed)
    costs = None if slowness is None else StepCosts(0.03, 1e-7, 0.0, None, slowness)
    params = None if policy == "least-kv" else POLICIES.get(policy).Params(order=order)
    dispatcher = Dispatcher(
        ledger, make_policy(policy, params), make_predictor(predictor), rng, POOL, costs=lambda: costs
    )
    for i in range(40):
        dispatcher.predictor.observe(PendingRequest(1, prompt_hash=i % 3), 1 + 3 * i)
    for i, (worker, prompt_tokens, output, limit, certain) in enumerate(bound):
        request = PendingRequest(
            prompt_tokens, output_tokens_max=limit, runs_to_max=certain, prompt_hash=i % 5
        )
        request_id = dispatcher.arrive(request, 0.0)
        dispatcher.bind(request_id, WorkerIndex(worker), 0.0, dispatcher.predictor.prospect(request))
        ledger.grow(request_id, output)
    entry = dispatcher.entry(dispatcher.arrive(PendingRequest(prompt), 0.0))
    entry.passed_over = passed_over
    expected, load = decided_by_a_round(dispatcher, entry, mask, seed, costs)
    assignments = dispatcher.decide(0.0, mask)
    worker = assignments[0].worker if assignments else NOT_ADMITTED
    # Forecasts are single precision: nearer than that, either of two workers is right.
    as_good = NOT_ADMITTED not in {worker, expected} and load[worker] == pytest.approx(
        load[expected], rel=1e-5
    )
    assert worker == expected or (policy == "br-h" and as_good)


def full_dispatcher(policy="br-h"):
    """All slots and the KV room of two workers are taken, the second has less."""
    dispatcher = dispatcher_of(policy, slots=(1, 1), capacity=100)
    for worker, prompt in ((0, 100), (1, 90)):
        request_id = dispatcher.arrive(PendingRequest(prompt), 0.0)
        dispatcher.bind(request_id, WorkerIndex(worker), 0.0)
    return dispatcher


@pytest.mark.parametrize("policy", POLICIES.names())
def test_what_takes_no_slot_is_bound_whatever_is_full(policy):
    dispatcher = full_dispatcher(policy)
    waiting = dispatcher.arrive(PendingRequest(50, prompt_is_exact=True), 0.0)
    free = [dispatcher.arrive(PendingRequest(20, sequences=0), 0.0) for _ in range(2)]
    decided = dispatcher.decide(0.0, routable(dispatcher))
    late = dispatcher.policy.params.late_binding
    assert [a.id for a in decided][:2] == free
    assert decided[0].worker == 1, "the one with the least load"
    assert len(decided) == 2 + (not late)
    assert [e.id for e in dispatcher.waiting.in_turn()] == ([waiting] if late else [])
    assert sum(dispatcher.ledger.requests) == 4 + (not late), "and counted all the same"
    for request_id in free:
        dispatcher.end(request_id, Event.FINISH)
    assert sum(dispatcher.ledger.kv_tokens) == 190 + 50 * (not late)


def test_what_takes_no_slot_waits_only_for_a_worker_that_may_be_chosen():
    dispatcher = full_dispatcher()
    free = dispatcher.arrive(PendingRequest(20, sequences=0), 0.0)
    assert dispatcher.decide(0.0, routable(dispatcher, 0, 1)) == []
    assert [a.worker for a in dispatcher.decide(0.0, routable(dispatcher, 1))] == [0]
    dispatcher.retry(free, 1.0)
    assert [a.worker for a in dispatcher.decide(1.0, routable(dispatcher))] == [1], "away from who failed it"


def test_what_takes_no_slot_is_refused_for_no_lack_of_room():
    dispatcher = dispatcher_of(capacity=100, pool=PoolLimits(0, 10.0))
    dispatcher.arrive(PendingRequest(1000, prompt_is_exact=True, sequences=0), 0.0)
    assert len(dispatcher.decide(0.0, routable(dispatcher))) == 1


def test_sequences_take_slots():
    dispatcher = dispatcher_of(slots=(4,))
    first = dispatcher.arrive(PendingRequest(10, sequences=3), 0.0)
    second = dispatcher.arrive(PendingRequest(10, sequences=8), 0.0)
    third = dispatcher.arrive(PendingRequest(10), 0.0)
    decided = [a.id for a in dispatcher.decide(0.0, routable(dispatcher))]
    assert decided[:1] == [first]
    # The last slot goes to one of them, and with the eight sequences there is none for a while.
    for request_id in decided:
        dispatcher.end(request_id, Event.CANCEL)
    for _ in range(2):
        for assignment in dispatcher.decide(1.0, routable(dispatcher)):
            decided.append(assignment.id)
            dispatcher.end(assignment.id, Event.CANCEL)
    assert sorted(decided) == [first, second, third]


@draws(100)
@given(
    bound=bound_requests,
    gone=st.sets(st.integers(0, 3), max_size=3),
    draining=st.sets(st.integers(0, 3), max_size=2),
    prompts=st.lists(st.sampled_from([10, 70, 800]), min_size=1, max_size=5),
    policy=st.sampled_from(["br-0", "br-h", "least-kv", "join-shortest-queue"]),
    seed=st.integers(0, 3),
)
def test_a_group_with_gaps_decides_as_one_that_never_had_who_is_gone(
    bound, gone, draining, prompts, policy, seed
):
    def decided(limits, absent):
        """Decide with the workers ``absent`` removed, or as if they had never been there."""
        index = {worker: place for place, worker in enumerate(w for w in range(4) if w in limits)}
        roster = Roster.of([WorkerLimits(3, 2000) for _ in limits])
        dispatcher = Dispatcher(
            Ledger(roster), make_policy(policy), make_predictor("survival"), np.random.default_rng(seed), POOL
        )
        for worker, prompt_tokens, output, limit, certain in bound:
            if worker in gone:
                continue
            request = PendingRequest(prompt_tokens, output_tokens_max=limit, runs_to_max=certain)
            request_id = dispatcher.arrive(request, 0.0)
            prospect = dispatcher.predictor.prospect(request)
            dispatcher.bind(request_id, WorkerIndex(index[worker]), 0.0, prospect)
            dispatcher.ledger.grow(request_id, output)
        for worker in draining - gone:
            roster.drain(str(index[worker]))
        for worker in absent:
            roster.remove(str(index[worker]), 0)
        for prompt_tokens in prompts:
            dispatcher.arrive(PendingRequest(prompt_tokens), 0.0)
        back = {place: worker for worker, place in index.items()}
        assignments = dispatcher.decide(0.0, roster.routable())
        assert not dispatcher.faults.counts
        return [(a.id, back[a.worker]) for a in assignments], dispatcher

    with_gaps, dispatcher = decided(range(4), gone)
    never_there, _ = decided([w for w in range(4) if w not in gone], ())
    assert with_gaps == never_there
    assert not {worker for _, worker in with_gaps} & (gone | draining)
    assert dispatcher.ledger.active().worker.max(initial=-1) < max(len(dispatcher.roster), 1)
