"""The ledger as a state machine: whatever happens, the books balance."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from brproxy.ledger import Ledger, WorkerLimits
from brproxy.lifecycle import Event, LifecycleError, State
from brproxy.prediction.predictor import LENGTH_UNLIMITED
from brproxy.routing.view import KV_UNLIMITED_TOKENS, SLOTS_UNLIMITED
from brproxy.types import TOKENS_MAX, InvalidInputError, PendingRequest, RequestId, WorkerIndex

WORKERS = 3
HUGE = 1 << 70

numbers = st.one_of(st.integers(-50, 6000), st.integers(-HUGE, HUGE))
"""What may come in wherever a number does."""

prospects = st.one_of(
    st.none(),
    st.tuples(numbers, numbers, st.booleans()),
    st.tuples(st.sampled_from([1.5, float("nan"), None, "7"]), numbers, st.booleans()),
    st.tuples(numbers, st.sampled_from([float("inf"), None, ""]), st.booleans()),
    st.just((1, 2)),
)
"""What a predictor may say of a request, absurd or not."""


def within(value, highest=TOKENS_MAX):
    return min(max(value, 0), highest)


class LedgerMachine(RuleBasedStateMachine):
    """Random lives of requests beside a model of plain dictionaries."""

    waiting = Bundle("waiting")
    running = Bundle("running")

    def __init__(self):
        super().__init__()
        self.ledger = Ledger([WorkerLimits(4, 10_000), WorkerLimits(2), WorkerLimits(1, 500)])
        self.model = {}
        self.now_s = 0.0

    @rule(target=waiting, prompt=numbers, output_tokens_max=numbers)
    def arrive(self, prompt, output_tokens_max):
        self.now_s += 1
        request = PendingRequest(prompt, output_tokens_max=output_tokens_max)
        if prompt < 0:
            with pytest.raises(InvalidInputError):
                self.ledger.arrive(request, self.now_s)
            return multiple()
        request_id = self.ledger.arrive(request, self.now_s)
        assert request_id not in self.model, "ids are never reused"
        self.model[request_id] = {"worker": None, "prompt": within(prompt), "output": 0}
        return request_id

    @rule(
        target=running,
        request_id=consumes(waiting),
        worker=st.integers(0, WORKERS - 1),
        prospect=prospects,
    )
    def bind(self, request_id, worker, prospect):
        try:
            self.ledger.bind(request_id, WorkerIndex(worker), self.now_s, prospect)
        except (TypeError, ValueError):
            assert self.ledger.entry(request_id).state is State.PENDING
            self.books_balance()
            self.rows_are_the_entries()
            self.ledger.bind(request_id, WorkerIndex(worker), self.now_s)
        self.model[request_id]["worker"] = worker
        return request_id

    @rule(request_id=running, tokens=numbers)
    def grow(self, request_id, tokens):
        self.ledger.grow(request_id, tokens)
        entry = self.model[request_id]
        entry["output"] = within(entry["output"] + tokens)

    @rule(request_id=running, prompt=numbers)
    def correct(self, request_id, prompt):
        self.ledger.correct_prompt(request_id, prompt)
        self.model[request_id]["prompt"] = within(prompt)

    @rule(request_id=running)
    def first_token(self, request_id):
        if self.ledger.entry(request_id).state is State.PREFILL:
            self.ledger.first_token(request_id, self.now_s)

    @rule(target=waiting, request_id=consumes(running))
    def retry_or_end(self, request_id):
        if self.ledger.entry(request_id).state is not State.PREFILL:
            with pytest.raises(LifecycleError):
                self.ledger.retry(request_id, self.now_s)
            # Once a token was seen there is no way back: the request ends, and another takes its place here.
            self.ledger.end(request_id, Event.FAIL)
            del self.model[request_id]
            return self.arrive(1, 1)
        self.ledger.retry(request_id, self.now_s)
        self.model[request_id] |= {"worker": None, "output": 0}
        return request_id

    @rule(request_id=consumes(running), event=st.sampled_from([Event.FINISH, Event.FAIL, Event.CANCEL]))
    def end_running(self, request_id, event):
        self.end(request_id, event)

    @rule(request_id=consumes(waiting), event=st.sampled_from([Event.FAIL, Event.CANCEL, Event.EXPIRE]))
    def end_waiting(self, request_id, event):
        self.end(request_id, event)

    def end(self, request_id, event):
        entry = self.ledger.end(request_id, event)
        model = self.model.pop(request_id)
        assert (entry.prompt_tokens, entry.output_tokens) == (model["prompt"], model["output"])
        with pytest.raises(LifecycleError):
            self.ledger.end(request_id, event)

    @invariant()
    def books_balance(self):
        bound = [entry for entry in self.model.values() if entry["worker"] is not None]
        kv = [sum(e["prompt"] + e["output"] for e in bound if e["worker"] == g) for g in range(WORKERS)]
        assert list(self.ledger.kv_tokens) == kv
        assert list(self.ledger.requests) == [sum(e["worker"] == g for e in bound) for g in range(WORKERS)]
        assert self.ledger.bound == len(bound)
        assert self.ledger.pending == len(self.model) - len(bound)

    @invariant()
    def rows_are_the_entries(self):
        active = self.ledger.active()
        rows = sorted(zip(active.worker, active.kv_tokens, active.output_tokens, strict=True))
        bound = [e for e in self.model.values() if e["worker"] is not None]
        assert rows == sorted((e["worker"], e["prompt"] + e["output"], e["output"]) for e in bound)
        for column in (active.curve, active.length_max, active.certain, self.ledger.row_ids()):
            assert len(column) == len(bound)
        assert all(0 <= length <= LENGTH_UNLIMITED for length in active.length_max.tolist())

    def teardown(self):
        for request_id in list(self.model):
            self.ledger.end(request_id, Event.CANCEL)
        assert self.ledger.kv_tokens == self.ledger.requests == (0,) * WORKERS


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestLedgerMachine = LedgerMachine.TestCase


def bound_ledger(limits, loads):
    ledger = Ledger(limits)
    for worker, prompt in loads:
        request_id = ledger.arrive(PendingRequest(prompt), 0.0)
        ledger.bind(request_id, WorkerIndex(worker), 0.0)
    return ledger


def test_state_shows_what_is_free():
    ledger = bound_ledger([WorkerLimits(2, 1000), WorkerLimits(1)], [(0, 300), (1, 50), (1, 60)])
    state = ledger.state([True, True], late_binding=True)
    assert state.kv_tokens == [300, 110]
    assert state.requests == [1, 2]
    assert state.slots_free == [1, 0], "never fewer than none"
    assert state.kv_free == [700, KV_UNLIMITED_TOKENS - 110]
    assert (state.slots, state.kv_capacity) == ([2, 1], [1000, KV_UNLIMITED_TOKENS])


def test_state_masks_workers_that_must_not_be_chosen_but_counts_their_load():
    ledger = bound_ledger([WorkerLimits(4), WorkerLimits(4)], [(1, 500)])
    state = ledger.state([True, False], late_binding=True)
    assert state.slots_free == [4, 0]
    assert state.kv_tokens == [0, 500]


def test_state_for_early_binding_has_no_limits():
    ledger = bound_ledger([WorkerLimits(1, 100), WorkerLimits(1)], [(0, 90)])
    state = ledger.state([True, False], late_binding=False)
    assert state.slots_free == [SLOTS_UNLIMITED, 0]
    assert state.kv_free == [KV_UNLIMITED_TOKENS] * 2


def test_a_round_that_changes_its_state_changes_no_books():
    ledger = bound_ledger([WorkerLimits(4)], [(0, 5)])
    ledger.state([True], late_binding=True).admit(0, 100)
    assert (ledger.kv_tokens, ledger.requests) == ((5,), (1,))


def test_impossible_calls_are_refused():
    ledger = Ledger([WorkerLimits(1)])
    request_id = ledger.arrive(PendingRequest(1), 0.0)
    with pytest.raises(LifecycleError, match="no worker 5 among 1"):
        ledger.bind(request_id, WorkerIndex(5), 0.0)
    with pytest.raises(LifecycleError, match="not bound"):
        ledger.grow(request_id, 1)
    with pytest.raises(LifecycleError, match="not bound"):
        ledger.correct_prompt(request_id, 1)
    with pytest.raises(LifecycleError, match="not in the ledger"):
        ledger.entry(RequestId(99))
    ledger.bind(request_id, WorkerIndex(0), 0.0)
    with pytest.raises(LifecycleError, match="does not end"):
        ledger.end(request_id, Event.FIRST_TOKEN)
    with pytest.raises(InvalidInputError, match="at least one worker"):
        Ledger([])
    with pytest.raises(InvalidInputError, match="at least 0, got -1"):
        ledger.arrive(PendingRequest(-1), 0.0)


def test_a_guess_is_capped_at_the_largest_worker_and_a_count_is_not():
    ledger = Ledger([WorkerLimits(1, 100), WorkerLimits(1, 300)])
    guessed = ledger.arrive(PendingRequest(400), 0.0)
    counted = ledger.arrive(PendingRequest(400, prompt_is_exact=True), 0.0)
    assert ledger.entry(guessed).prompt_tokens == 300
    assert ledger.entry(counted).prompt_tokens == 400


def test_it_tells_since_when_the_first_has_waited():
    ledger = Ledger([WorkerLimits(1)])
    assert ledger.waiting_since_s is None
    first = ledger.arrive(PendingRequest(1), 3.0)
    ledger.arrive(PendingRequest(1), 4.0)
    assert ledger.waiting_since_s == 3.0
    ledger.bind(first, WorkerIndex(0), 5.0)
    assert ledger.waiting_since_s == 4.0
    ledger.retry(first, 6.0)
    assert ledger.waiting_since_s == 4.0


def test_repr_is_the_state_in_a_line():
    ledger = bound_ledger([WorkerLimits(1), WorkerLimits(1)], [(1, 30)])
    assert repr(ledger) == "<Ledger pending=0 bound=1 kv_tokens=[0, 30] requests=[0, 1]>"
