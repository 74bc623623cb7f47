"""Counts that come late, in time that the test makes: what they change, and what they never do."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.ledger import Ledger
from brproxy.lifecycle import Event, State
from brproxy.prediction.predictor import make_predictor
from brproxy.prompt_counts import CountStats, Gate, Pauses, PromptCounts
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policy import make_policy
from brproxy.types import TOKENS_MAX, PendingRequest, WorkerIndex

CAPACITY = 10_000


def group(counts, workers=2, capacity=CAPACITY):
    ledger = Ledger(Roster.of([WorkerLimits(4, capacity)] * workers))
    policy, predictor = make_policy("br-0"), make_predictor("survival")
    dispatcher = Dispatcher(ledger, policy, predictor, np.random.default_rng(0), PoolLimits(1000, 60.0))
    counts.watch(dispatcher)
    return dispatcher


@pytest.fixture
def counts():
    return PromptCounts()


def test_who_waits_is_measured_anew(counts):
    dispatcher = group(counts)
    request = PendingRequest(100)
    number = counts.begin(request)
    entry = dispatcher.enter(request, 0.0)
    counts.told(number, 70)
    assert entry.prompt_tokens == 70
    dispatcher.decide(0.0, [True, True])
    assert dispatcher.ledger.kv_tokens[entry.worker] == 70


def test_one_that_turns_out_to_fit_no_worker_is_placed_all_the_same(counts):
    dispatcher = group(counts)
    request = PendingRequest(100)
    number = counts.begin(request)
    entry = dispatcher.enter(request, 0.0)
    counts.told(number, CAPACITY + 1)
    assert entry.prompt_tokens == CAPACITY
    assert dispatcher.decide(0.0, [True, True]) == [entry]


def test_who_is_bound_is_booked_anew_with_its_prefill(counts):
    dispatcher = group(counts, workers=1)
    request = PendingRequest(100)
    number = counts.begin(request)
    entry = dispatcher.enter(request, 0.0)
    dispatcher.decide(0.0, [True])
    counts.told(number, 250)
    assert (dispatcher.ledger.kv_tokens, dispatcher.ledger.prefill_tokens) == ((250,), (250,))
    dispatcher.ledger.first_token(entry.id, 1.0)
    dispatcher.ledger.grow(entry.id, 5)
    counts.told(number, 240)
    assert (dispatcher.ledger.kv_tokens, dispatcher.ledger.prefill_tokens) == ((245,), (0,))
    dispatcher.end(entry.id, Event.FINISH)
    counts.told(number, 1)
    assert dispatcher.ledger.kv_tokens == (0,)


def test_a_second_leg_that_comes_later_has_the_count_from_the_beginning(counts):
    prefill, decode = group(counts), group(counts)
    request = PendingRequest(100)
    number = counts.begin(request)
    first = prefill.enter(replace(request, output_tokens_max=1), 0.0)
    counts.told(number, 70)
    second = decode.enter(request, 1.0)
    assert (first.prompt_tokens, second.prompt_tokens) == (70, 70)


def test_what_the_worker_has_reported_stays(counts):
    dispatcher = group(counts, workers=1)
    request = PendingRequest(100)
    number = counts.begin(request)
    entry = dispatcher.enter(request, 0.0)
    dispatcher.decide(0.0, [True])
    dispatcher.ledger.correct_prompt(entry.id, 80)
    entry.request.count_number = 0
    counts.told(number, 90)
    assert dispatcher.ledger.kv_tokens == (80,)


def test_whose_request_is_over_is_nobody(counts):
    request = PendingRequest(100)
    number = counts.begin(request)
    counts.end(number)
    counts.told(number, 70)
    assert len(counts) == 0


def test_a_cached_beginning_is_no_longer_than_the_prompt(counts):
    dispatcher = group(counts)
    request = PendingRequest(100)
    number = counts.begin(request)
    entry = dispatcher.enter(request, 0.0)
    entry.cached_tokens = 96
    counts.told(number, 20)
    assert entry.cached_tokens == 20


def actions(most=60):
    kinds = st.sampled_from(["come", "decide", "token", "retry", "told", "reported", "leave"])
    sizes = st.integers(0, 3 * CAPACITY) | st.integers(0, 2 * TOKENS_MAX)
    return st.lists(st.tuples(kinds, st.integers(0, 7), sizes), max_size=most)


class Books:
    """A group whose requests are counted; what may happen to one that is in the wrong state does not."""

    def __init__(self):
        self.counts = PromptCounts()
        self.dispatcher = group(self.counts)
        self.ledger = self.dispatcher.ledger
        self.under_way = {}

    def come(self, tokens, now_s):
        request = PendingRequest(min(tokens, TOKENS_MAX))
        number = self.counts.begin(request)
        self.under_way[number] = self.dispatcher.enter(request, now_s)

    def told(self, number, entry, tokens, now_s):
        self.counts.told(number, tokens)
        if entry.request.count_number:
            most = CAPACITY if entry.state is State.PENDING else TOKENS_MAX
            assert entry.prompt_tokens == min(tokens, most)

    def reported(self, number, entry, tokens, now_s):
        if entry.state is not State.PENDING:
            self.ledger.correct_prompt(entry.id, tokens)
            entry.request.count_number = 0

    def token(self, number, entry, tokens, now_s):
        if entry.state is State.PREFILL:
            self.ledger.first_token(entry.id, now_s)
            self.ledger.grow(entry.id, tokens)

    def retry(self, number, entry, tokens, now_s):
        if entry.state is State.PREFILL:
            self.dispatcher.retry(entry.id, now_s)
            self.dispatcher.waiting.forgive(WorkerIndex(0))
            self.dispatcher.waiting.forgive(WorkerIndex(1))

    def leave(self, number, entry, tokens, now_s):
        self.dispatcher.end(entry.id, Event.CANCEL)
        self.counts.end(number)
        del self.under_way[number]

    def check(self):
        prefill = [each for each in self.under_way.values() if each.state is State.PREFILL]
        assert sum(self.ledger.prefill_tokens) == sum(each.prompt_tokens for each in prefill)
        assert sum(self.ledger.kv_tokens) == int(self.ledger.active().kv_tokens.sum())


@given(actions())
def test_whenever_a_count_comes_the_books_add_up(history):
    """A count may come in each state; the load is always that of the entries, and nothing when idle."""
    books = Books()
    for now_s, (kind, which, tokens) in enumerate(history):
        numbers = list(books.under_way)
        if kind == "come":
            books.come(tokens, float(now_s))
        elif kind == "decide":
            books.dispatcher.decide(float(now_s), [True, True])
        elif numbers:
            number = numbers[which % len(numbers)]
            getattr(books, kind)(number, books.under_way[number], tokens, float(now_s))
        books.check()
    for number, entry in list(books.under_way.items()):
        books.leave(number, entry, 0, 0.0)
    assert (books.ledger.kv_tokens, books.ledger.prefill_tokens) == ((0, 0), (0, 0))
    assert len(books.counts) == 0


@given(
    st.integers(1, 5),
    st.integers(1, 20),
    st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=80),
)
def test_no_more_go_than_may(in_flight_max, per_second_max, steps):
    gate, now_s, gone = Gate(in_flight_max, per_second_max), 0.0, []
    for pause_s, leaves in steps:
        now_s += pause_s
        if leaves and gate.in_flight:
            gate.leave()
        if gate.enter(now_s):
            gone.append(now_s)
        assert 0 <= gate.in_flight <= in_flight_max
    for first, start_s in enumerate(gone):
        for last, end_s in enumerate(gone[first:], first):
            assert last - first + 1 <= per_second_max * (1 + end_s - start_s) + 1e-6


def test_those_that_may_go_do():
    gate = Gate(2, 3)
    assert [gate.enter(0.0) for _ in range(3)] == [True, True, False]
    gate.leave()
    assert gate.enter(0.0)
    gate.leave()
    assert not gate.enter(0.1), "three have gone in this second"
    assert gate.enter(1.0)
    gate.leave()
    gate.leave()
    assert gate.enter(0.5), "a clock that is behind takes nothing back"


class Who:
    """Somebody to be asked."""


def test_who_fails_in_a_row_is_left_alone_for_a_while():
    pauses, one, other = Pauses(3, 10.0), Who(), Who()
    assert [pauses.failed(one, 0.0), pauses.failed(one, 0.0)] == [False, False]
    pauses.succeeded(one)
    assert [pauses.failed(one, 1.0) for _ in range(3)] == [False, False, True]
    assert (pauses.may_ask(one, 10.9), pauses.may_ask(one, 11.0)) == (False, True)
    assert pauses.may_ask(other, 1.0)
    assert not pauses.failed(one, 12.0), "told once"
    assert not pauses.may_ask(one, 21.0), "one more failure was enough"
    pauses.succeeded(one)
    assert pauses.may_ask(one, 21.0)
    assert [pauses.failed(one, 30.0) for _ in range(3)] == [False, False, True]


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), max_size=20))
def test_errors_of_either_side_do_not_make_up_for_each_other(pairs):
    stats = CountStats()
    for estimate, counted in pairs:
        stats.compare(estimate, counted)
    assert stats.error_tokens >= abs(stats.estimated_tokens - stats.counted_tokens)
    assert stats.counted_tokens == sum(counted for _, counted in pairs)
