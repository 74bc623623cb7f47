"""Policies and predictors that raise or answer nonsense: rounds go on, books balance, everybody is served."""

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.faults import Faults
from brproxy.ledger import Ledger
from brproxy.lifecycle import Event
from brproxy.prediction.predictor import make_predictor
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policy import make_policy
from brproxy.types import PendingRequest, RequestId, WorkerIndex
from tests.draws import draws

WORKERS = 3
ALL = (True,) * WORKERS
POISON = 666

policy_answers = {
    "place": [7, -3, None, 0.5, float("nan"), "0"],
    "route": [np.array([99]), np.array([[0]]), np.array([0.5]), None, np.array([-7] * 4)],
    "discounts": [None, np.array([])],
}
predictor_answers = {
    "prospect": [None, (1 << 70, -1, True), (0, 1.5, False), 5, (0, 1 << 70, False)],
    "forecast": [None, np.zeros((1, 1)), np.full((WORKERS, 5), np.nan)],
    "discounted_load": [None, np.zeros(1), np.full(WORKERS, np.inf)],
    "survival": [None, np.zeros((0, 0))],
    "observe": [None],
}


class Flaky:
    """Stands before a policy or a predictor: each call may raise, or answer nonsense, as ``draw`` says."""

    def __init__(self, real, draw, answers):
        self._real, self._draw, self._answers = real, draw, answers

    def __getattr__(self, name):
        if name == "mean_output_tokens" and self._draw(3):
            return [float("nan"), 0.0, -1.0, None, 1e300][self._draw(5)]
        value = getattr(self._real, name)
        if name not in self._answers:
            return value

        def call(*args):
            fate = self._draw(4)
            if fate == 1:
                raise ValueError(name)
            if fate == 2:
                raise NotImplementedError
            if fate == 3:
                return self._answers[name][self._draw(len(self._answers[name]))]
            return value(*args)

        return call


def dispatcher_of(policy="br-h", predictor="survival", slots=2):
    return Dispatcher(
        Ledger(Roster.of([WorkerLimits(slots)] * WORKERS)),
        make_policy(policy),
        make_predictor(predictor),
        np.random.default_rng(0),
        PoolLimits(1000, 10.0),
    )


@draws(60)
@given(
    policy=st.sampled_from(["br-h", "br-0", "least-kv", "round-robin"]),
    predictor=st.sampled_from(["survival", "hierarchical", "oracle"]),
    requests=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 4000), st.integers(0, 1 << 70)),
            st.one_of(st.none(), st.integers(0, 1 << 70)),
            st.booleans(),
        ),
        max_size=25,
    ),
    seed=st.integers(0, 1 << 30),
)
def test_whatever_the_parts_do_each_request_ends_once_and_the_books_balance(
    policy, predictor, requests, seed
):
    draws = np.random.default_rng(seed)
    sane = False

    def draw(outcomes):
        return 0 if sane else int(draws.integers(outcomes))

    dispatcher = Dispatcher(
        Ledger(Roster.of([WorkerLimits(2)] * WORKERS)),
        Flaky(make_policy(policy), draw, policy_answers),
        Flaky(make_predictor(predictor), draw, predictor_answers),
        np.random.default_rng(0),
        PoolLimits(1000, 10.0),
    )
    ledger = dispatcher.ledger
    living, running, ended = set(), [], []
    for number, (prompt, limit, certain) in enumerate(requests):
        request = PendingRequest(prompt, output_tokens_max=limit, runs_to_max=certain)
        living.add(dispatcher.arrive(request, float(number)))
        # What was poisonous once may pass when the parts have come to their senses.
        sane = number > 20
        for _ in range(2):
            for assignment in dispatcher.decide(float(number), ALL):
                assert assignment.id in living
                running.append(assignment.id)
            for request_id in list(dispatcher.undecidable):
                dispatcher.end(request_id, Event.FAIL)
                ended.append(request_id)
            assert ledger.bound == len(running), "whatever is bound is told"
            for request_id in running:
                ledger.grow(request_id, int(draws.integers(1 << 62)))
            rows = ledger.active()
            kv_tokens = [sum(rows.kv_tokens[rows.worker == g].tolist()) for g in range(WORKERS)]
            assert tuple(kv_tokens) == ledger.kv_tokens
        while len(running) > 3:
            request_id = running.pop(draw(len(running)))
            dispatcher.end(request_id, Event.FINISH)
            ended.append(request_id)
    sane = True
    for _ in range(len(requests) + 1):
        running += [assignment.id for assignment in dispatcher.decide(100.0, ALL)]
        assert not dispatcher.undecidable
        while running:
            request_id = running.pop()
            dispatcher.end(request_id, Event.FINISH)
            ended.append(request_id)
    assert sorted(ended) == sorted(living), "each once"
    assert (len(dispatcher.waiting), ledger.bound, set(ledger.kv_tokens), set(ledger.requests)) == (
        0,
        0,
        {0},
        {0},
    )


def poisoned(policy):
    """Return a policy whose rounds and choices raise where a prompt has POISON tokens."""
    route, place = policy.route, policy.place

    def poisoned_route(view, rng):
        if POISON in view.prompt_tokens:
            raise ZeroDivisionError
        return route(view, rng)

    def poisoned_place(state, prompt_tokens, load, rng):
        if prompt_tokens == POISON:
            raise ZeroDivisionError
        return place(state, prompt_tokens, load, rng)

    policy.route, policy.place = poisoned_route, poisoned_place


@pytest.mark.parametrize("policy", ["br-0", "br-h", "join-shortest-queue"])
@pytest.mark.parametrize("others", [0, 1, 4])
def test_a_poisonous_request_fails_alone(policy, others):
    dispatcher = dispatcher_of(policy)
    poisoned(dispatcher.policy)
    poison = dispatcher.arrive(PendingRequest(POISON), 0.0)
    innocent = {dispatcher.arrive(PendingRequest(10 + i), 0.0) for i in range(others)}
    assert {a.id for a in dispatcher.decide(0.0, ALL)} == innocent
    assert dispatcher.undecidable == [poison]
    assert dispatcher.ledger.requests.count(2) <= 1, "load is spread all the same"
    assert dispatcher.faults.counts["policy"] >= 1


def test_a_poisonous_retry_fails_alone():
    dispatcher = dispatcher_of()
    poison = dispatcher.arrive(PendingRequest(POISON), 0.0)
    dispatcher.bind(poison, WorkerIndex(0), 0.0)
    poisoned(dispatcher.policy)
    dispatcher.retry(poison, 0.0)
    innocent = dispatcher.arrive(PendingRequest(10), 0.0)
    assert [a.id for a in dispatcher.decide(0.0, ALL)] == [innocent]
    assert dispatcher.undecidable == [poison]


@pytest.mark.parametrize("waiting", [1, 5])
def test_a_broken_policy_is_stood_in_for_by_the_least_load(waiting, caplog):
    def broken(*args):
        raise NotImplementedError

    dispatcher = dispatcher_of()
    heavy = dispatcher.arrive(PendingRequest(1000), 0.0)
    dispatcher.bind(heavy, WorkerIndex(1), 0.0)
    dispatcher.policy.route = dispatcher.policy.place = broken
    for _ in range(waiting):
        dispatcher.arrive(PendingRequest(100), 0.0)
    with caplog.at_level(logging.ERROR):
        assignments = dispatcher.decide(0.0, (True, True, False))
    assert [a.worker for a in assignments] == [0, 0, 1][:waiting]
    assert not dispatcher.undecidable
    assert "policy failed" in caplog.text


def test_without_a_forecast_the_load_as_it_is_is_balanced():
    def broken(*args):
        raise ValueError

    dispatcher = dispatcher_of()
    dispatcher.predictor.forecast = dispatcher.predictor.discounted_load = broken
    for worker in (0, 2):
        heavy = dispatcher.arrive(PendingRequest(1000), 0.0)
        dispatcher.bind(heavy, WorkerIndex(worker), 0.0)
    dispatcher.arrive(PendingRequest(10), 0.0)
    assert [a.worker for a in dispatcher.decide(0.0, ALL)] == [1]
    for _ in range(2):
        dispatcher.arrive(PendingRequest(10), 0.0)
    assert len(dispatcher.decide(0.0, ALL)) == 2
    assert dispatcher.faults.counts.keys() == {"predictor"}


@pytest.mark.parametrize("answer", [7, 2, -2, None, 0.5, float("nan"), "0"])
@pytest.mark.parametrize("waiting", [1, 3])
def test_a_worker_that_cannot_be_chosen_is_not(answer, waiting):
    dispatcher = dispatcher_of("br-0")
    for worker in (0, 0):
        heavy = dispatcher.arrive(PendingRequest(1000), 0.0)
        dispatcher.bind(heavy, WorkerIndex(worker), 0.0)
    dispatcher.policy.place = lambda *args: answer
    dispatcher.policy.route = lambda view, rng: np.array([answer] * view.waiting)
    for _ in range(waiting):
        dispatcher.arrive(PendingRequest(10), 0.0)
    # Worker 0 is full, 2 is down.
    assert [a.worker for a in dispatcher.decide(0.0, (True, True, False))] == [1, 1][:waiting]
    assert not dispatcher.undecidable
    assert dispatcher.faults.counts["policy"]


@pytest.mark.parametrize("what", ["forecast", "discounted_load"])
@pytest.mark.parametrize("answer", [None, np.zeros((1, 1)), np.full((WORKERS, 200), np.nan), np.zeros(2)])
def test_a_forecast_that_is_none_costs_the_forecast(what, answer):
    dispatcher = dispatcher_of("br-h", slots=8)
    setattr(dispatcher.predictor, what, lambda *args: answer)
    for worker in (0, 2):
        heavy = dispatcher.arrive(PendingRequest(1000), 0.0)
        dispatcher.bind(heavy, WorkerIndex(worker), 0.0)
    for _ in range(1 if what == "discounted_load" else 2):
        dispatcher.arrive(PendingRequest(10), 0.0)
    assert {a.worker for a in dispatcher.decide(0.0, ALL)} == {1}
    assert dispatcher.faults.counts == {"predictor": 1}


def test_what_is_learnt_takes_no_end_with_it():
    def broken(*args):
        raise KeyError

    dispatcher = dispatcher_of()
    dispatcher.predictor.observe = broken
    request_id = dispatcher.arrive(PendingRequest(10), 0.0)
    dispatcher.decide(0.0, ALL)
    dispatcher.ledger.grow(request_id, 5)
    assert dispatcher.end(request_id, Event.FINISH).output_tokens == 5
    assert dispatcher.ledger.kv_tokens == (0, 0, 0)
    assert dispatcher.faults.counts == {"observer": 1}


def test_the_log_of_a_broken_part_grows_slowly(caplog):
    faults = Faults("a")
    for _ in range(100):
        faults.note("policy", ValueError("no"))
    assert faults.counts == {"policy": 100}
    assert len(caplog.records) == 7
    assert "group a: policy failed (64 so far): ValueError('no')" in caplog.text


def test_unknown_ids_stay_unknown():
    dispatcher = dispatcher_of()
    with pytest.raises(Exception, match="is not here"):
        dispatcher.end(RequestId(5), Event.FAIL)
