"""The ledger and the waiting room as a state machine: whatever happens, the books balance."""

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.ledger import Ledger
from brproxy.lifecycle import Event, LifecycleError, State
from brproxy.prediction.predictor import LENGTH_UNLIMITED, make_predictor
from brproxy.roster import MemberState, Roster, RosterError, WorkerLimits
from brproxy.routing.policy import make_policy
from brproxy.routing.view import KV_UNLIMITED_TOKENS
from brproxy.types import SEQUENCES_MAX, TOKENS_MAX, InvalidInputError, PendingRequest, WorkerIndex
from tests.draws import draws

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


def dispatcher_of(limits):
    return Dispatcher(
        Ledger(Roster.of(limits)),
        make_policy("least-kv"),
        make_predictor("survival"),
        np.random.default_rng(0),
        PoolLimits(10_000, 10.0),
    )


def uncached(entry):
    """Return what is to be prefilled of a prompt where it is."""
    return max(entry["prompt"] - (entry["cached"] if entry["home"] == entry["worker"] else 0), 0)


class LedgerMachine(RuleBasedStateMachine):
    """Random lives of requests and of workers beside a model of plain dictionaries."""

    waiting = Bundle("waiting")
    running = Bundle("running")

    def __init__(self):
        super().__init__()
        self.dispatcher = dispatcher_of([WorkerLimits(4, 10_000), WorkerLimits(2), WorkerLimits(1, 500)])
        self.ledger = self.dispatcher.ledger
        self.roster = self.dispatcher.roster
        self.model = {}
        self.leaving = set()
        self.names = 0
        self.now_s = 0.0

    @rule(target=waiting, prompt=numbers, output_tokens_max=numbers, sequences=numbers)
    def arrive(self, prompt, output_tokens_max, sequences):
        self.now_s += 1
        request = PendingRequest(prompt, output_tokens_max=output_tokens_max, sequences=sequences)
        if prompt < 0:
            with pytest.raises(InvalidInputError):
                self.dispatcher.arrive(request, self.now_s)
            return multiple()
        longest = min(self.ledger.kv_capacity_tokens_max, TOKENS_MAX)
        request_id = self.dispatcher.arrive(request, self.now_s)
        assert request_id not in self.model, "ids are never reused"
        self.model[request_id] = {
            "worker": None,
            "prompt": within(prompt, longest),
            "cached": 0,
            "home": None,
            "output": 0,
            "sequences": within(sequences, SEQUENCES_MAX),
        }
        return request_id

    @rule(target=running, request_id=consumes(waiting), worker=st.integers(0, 5), prospect=prospects)
    def bind(self, request_id, worker, prospect):
        if worker >= self.roster.columns or self.roster._members[worker].state is MemberState.GONE:
            with pytest.raises(RosterError):
                self.dispatcher.bind(request_id, WorkerIndex(worker), self.now_s, prospect)
            worker = self.roster.members[0].index if self.roster.members else self.add()
        try:
            self.dispatcher.bind(request_id, WorkerIndex(worker), self.now_s, prospect)
        except (TypeError, ValueError):
            assert self.dispatcher.entry(request_id).state is State.PENDING
            self.books_balance()
            self.rows_are_the_entries()
            self.dispatcher.bind(request_id, WorkerIndex(worker), self.now_s)
        self.model[request_id]["worker"] = worker
        return request_id

    @rule(request_id=waiting, home=st.integers(0, 3), cached=st.integers(0, 3000))
    def is_at_home(self, request_id, home, cached):
        entry, model = self.dispatcher.entry(request_id), self.model[request_id]
        entry.home, entry.cached_tokens = WorkerIndex(home), min(cached, entry.prompt_tokens)
        model["home"], model["cached"] = home, entry.cached_tokens

    @rule(request_id=running, cached=numbers)
    def its_worker_says_what_was_cached(self, request_id, cached):
        self.ledger.correct_cached(request_id, cached)
        model = self.model[request_id]
        model["home"], model["cached"] = model["worker"], within(cached)

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

    @rule(request_id=running)
    def rest(self, request_id):
        if self.ledger.entry(request_id).state is not State.PREFILL:
            self.ledger.rest(request_id)
            self.model[request_id]["sequences"] = 0

    @rule(target=waiting, request_id=consumes(running))
    def retry_or_end(self, request_id):
        if self.ledger.entry(request_id).state is not State.PREFILL:
            with pytest.raises(LifecycleError):
                self.dispatcher.retry(request_id, self.now_s)
            # Once a token was seen there is no way back: the request ends, and another takes its place here.
            self.dispatcher.end(request_id, Event.FAIL)
            del self.model[request_id]
            return self.arrive(1, 1, 1)
        self.dispatcher.retry(request_id, self.now_s)
        self.model[request_id] |= {"worker": None, "output": 0}
        return request_id

    @rule(request_id=consumes(running), event=st.sampled_from([Event.FINISH, Event.FAIL, Event.CANCEL]))
    def end_running(self, request_id, event):
        with pytest.raises(LifecycleError):
            self.dispatcher.end(request_id, Event.EXPIRE)
        self.end(request_id, event)

    @rule(request_id=consumes(waiting), event=st.sampled_from([Event.FAIL, Event.CANCEL, Event.EXPIRE]))
    def end_waiting(self, request_id, event):
        with pytest.raises(LifecycleError):
            self.dispatcher.end(request_id, Event.FINISH)
        self.end(request_id, event)

    def end(self, request_id, event):
        entry = self.dispatcher.end(request_id, event)
        model = self.model.pop(request_id)
        assert (entry.prompt_tokens, entry.output_tokens) == (model["prompt"], model["output"])
        with pytest.raises(LifecycleError):
            self.dispatcher.end(request_id, event)

    @rule()
    def come(self):
        self.add()

    def add(self):
        self.names += 1
        index = self.roster.add(f"added-{self.names}", WorkerLimits(2, 700)).index
        self.measure_again()
        return index

    def measure_again(self):
        """Who waits counts as what the largest worker holds now, at most."""
        for entry in self.model.values():
            if entry["worker"] is None:
                entry["prompt"] = min(entry["prompt"], self.ledger.kv_capacity_tokens_max)

    @rule(position=st.integers(0, 5))
    def drain_or_resume(self, position):
        members = [m for m in self.roster.members if not m.leaves]
        if position < len(members):
            member = members[position]
            change = self.roster.drain if member.state is MemberState.ACTIVE else self.roster.resume
            change(member.key)
            self.measure_again()

    @rule(position=st.integers(0, 5), slots=st.integers(1, 9), capacity=st.sampled_from([None, 1, 900]))
    def change_limits(self, position, slots, capacity):
        members = self.roster.members
        if position < len(members):
            self.roster.set_limits(members[position].key, WorkerLimits(slots, capacity))
            self.measure_again()

    @rule(position=st.integers(0, 5))
    def remove(self, position):
        members = self.roster.members
        if position < len(members):
            member = members[position]
            self.roster.remove(member.key, self.ledger.requests[member.index])
            self.leaving.add(member)
            self.measure_again()

    @rule(position=st.integers(0, 5), kv_tokens=numbers)
    def offset(self, position, kv_tokens):
        members = self.roster.members
        if position < len(members):
            index = members[position].index
            self.ledger.set_offset(index, kv_tokens)
            assert self.ledger.offset[index] == min(max(kv_tokens, -TOKENS_MAX), TOKENS_MAX)

    def bound(self):
        return [entry for entry in self.model.values() if entry["worker"] is not None]

    @invariant()
    def books_balance(self):
        bound = self.bound()
        columns = range(self.roster.columns)
        kv = [sum(e["prompt"] + e["output"] for e in bound if e["worker"] == g) for g in columns]
        assert list(self.ledger.kv_tokens) == kv
        assert list(self.ledger.requests) == [sum(e["worker"] == g for e in bound) for g in columns]
        sequences = [sum(e["sequences"] for e in bound if e["worker"] == g) for g in columns]
        assert self.ledger._sequences == sequences
        awaited = [e for i, e in self.model.items() if self.dispatcher.entry(i).state is State.PREFILL]
        prefill = tuple(sum(map(uncached, (e for e in awaited if e["worker"] == g))) for g in columns)
        assert self.ledger.prefill_tokens == prefill
        assert self.ledger.bound == len(bound)
        assert len(self.dispatcher.waiting) == len(self.model) - len(bound)
        unusual = sum(e["sequences"] != 1 for e in bound)
        assert self.ledger._unusual_rows == unusual
        begun = [e for e in bound if e["output"]]
        of_begun = [sum(e["prompt"] + e["output"] for e in begun if e["worker"] == g) for g in columns]
        assert self.ledger.begun() == of_begun

    @invariant()
    def rows_are_the_entries(self):
        active = self.ledger.active()
        place = {member.index: place for place, member in enumerate(self.roster.members)}
        rows = sorted(zip(active.worker, active.kv_tokens, active.output_tokens, strict=True))
        assert rows == sorted(
            (place[e["worker"]], e["prompt"] + e["output"], e["output"] // max(e["sequences"], 1))
            for e in self.bound()
        )
        for column in (active.curve, active.length_max, active.certain, self.ledger.row_ids()):
            assert len(column) == len(rows)
        assert all(0 <= length <= LENGTH_UNLIMITED for length in active.length_max.tolist())

    @invariant()
    def who_leaves_is_gone_when_nothing_is_bound(self):
        for member in self.leaving:
            held = any(e["worker"] == member.index for e in self.bound())
            gone = member.state is MemberState.GONE
            assert gone or held
            assert gone or member in self.roster.members

    @invariant()
    def a_round_sees_who_is_there(self):
        members = self.roster.members
        if members:
            mask = [True] * self.roster.columns
            state = self.ledger.state(mask, late_binding=True)
            assert state.slots == [member.limits.slots for member in members]
            assert self.ledger.slots_total == sum(state.slots)
            booked, offset = self.ledger.kv_tokens, self.ledger.offset
            load = [max(booked[member.index] + offset[member.index], 0) for member in members]
            assert state.kv_tokens == load
            assert load == [self.ledger.load()[member.index] for member in members]
            room = zip(state.kv_capacity, load, strict=True)
            left = [max(capacity - kv_tokens, 0) for capacity, kv_tokens in room]
            # Where nobody's capacity is known there is no end of room, whatever is booked.
            is_limited = min(state.kv_capacity) < KV_UNLIMITED_TOKENS
            assert state.kv_free == (left if is_limited else state.kv_capacity)
            assert min(state.slots_free + state.kv_free) >= 0

    def teardown(self):
        for request_id in list(self.model):
            self.dispatcher.end(request_id, Event.CANCEL)
        assert not any(self.ledger.kv_tokens + self.ledger.requests)
        assert {m for m in self.leaving if m.state is not MemberState.GONE} == set()


LedgerMachine.TestCase.settings = draws(60, stateful_step_count=40, deadline=None)
TestLedgerMachine = LedgerMachine.TestCase
