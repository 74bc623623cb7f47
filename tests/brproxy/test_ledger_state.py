"""What the ledger shows of its books, and which numbers and calls it takes."""

import pytest

from brproxy.lifecycle import Event, LifecycleError
from brproxy.prediction.predictor import LENGTH_UNLIMITED
from brproxy.roster import MemberState, RosterError, WorkerLimits
from brproxy.routing.view import KV_UNLIMITED_TOKENS, SLOTS_UNLIMITED
from brproxy.types import SEQUENCES_MAX, TOKENS_MAX, InvalidInputError, PendingRequest, RequestId, WorkerIndex
from tests.brproxy.test_ledger import HUGE, dispatcher_of


def bound_ledger(limits, loads):
    dispatcher = dispatcher_of(limits)
    for worker, prompt in loads:
        request_id = dispatcher.arrive(PendingRequest(prompt), 0.0)
        dispatcher.bind(request_id, WorkerIndex(worker), 0.0)
    return dispatcher.ledger


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


def test_a_worker_that_drains_keeps_its_load_in_the_barrier_and_one_that_has_gone_is_not_seen():
    ledger = bound_ledger([WorkerLimits(4, 900), WorkerLimits(4), WorkerLimits(4)], [(0, 500), (2, 70)])
    roster = ledger.roster
    roster.drain("0")
    roster.remove("1", 0)
    state = ledger.state(roster.routable(), late_binding=True)
    assert (state.kv_tokens, state.slots_free) == ([500, 70], [0, 3])
    assert ledger.active().worker.tolist() == [0, 1], "by place"
    assert (ledger.slots_total, ledger.kv_tokens) == (8, (500, 0, 70))
    roster.add("new", WorkerLimits(1, 80))
    state = ledger.state(roster.routable(), late_binding=True)
    assert (state.kv_tokens, state.slots_free) == ([500, 0, 70], [0, 1, 3])
    assert (state.kv_free[1], ledger.active().worker.tolist()) == (80, [0, 2])


@pytest.mark.parametrize("ends", ["end", "retry"])
def test_one_that_leaves_goes_with_its_last_request(ends):
    dispatcher = dispatcher_of([WorkerLimits(4), WorkerLimits(4)])
    requests = [dispatcher.arrive(PendingRequest(5), 0.0) for _ in range(2)]
    for request_id in requests:
        dispatcher.bind(request_id, WorkerIndex(0), 0.0)
    member = dispatcher.roster.remove("0", dispatcher.ledger.requests[0])
    for request_id in requests:
        assert member.state is MemberState.DRAINING
        if ends == "end":
            dispatcher.end(request_id, Event.FINISH)
        else:
            dispatcher.retry(request_id, 1.0)
    assert member.state is MemberState.GONE
    assert dispatcher.ledger.kv_tokens == (0, 0)


def test_sequences_take_slots_and_requests_are_counted():
    dispatcher = dispatcher_of([WorkerLimits(6), WorkerLimits(6)])
    for worker, sequences in ((0, 4), (0, 0), (1, 1)):
        request_id = dispatcher.arrive(PendingRequest(10, sequences=sequences), 0.0)
        dispatcher.bind(request_id, WorkerIndex(worker), 0.0)
        dispatcher.ledger.grow(request_id, 40)
    state = dispatcher.ledger.state([True, True], late_binding=True)
    assert (state.slots_free, state.requests) == ([2, 5], [4, 1])
    assert dispatcher.ledger.requests == (2, 1)
    active = dispatcher.ledger.active()
    assert active.sequences.tolist() == [4, 0, 1]
    assert active.output_tokens.tolist() == [10, 40, 40], "the age of each sequence"
    assert active.kv_tokens.tolist() == [50, 50, 50]


def test_impossible_calls_are_refused():
    dispatcher = dispatcher_of([WorkerLimits(1)])
    ledger = dispatcher.ledger
    request_id = dispatcher.arrive(PendingRequest(1), 0.0)
    with pytest.raises(RosterError, match="no worker 5 among 1"):
        dispatcher.bind(request_id, WorkerIndex(5), 0.0)
    with pytest.raises(LifecycleError, match="not bound"):
        ledger.grow(request_id, 1)
    with pytest.raises(LifecycleError, match="not bound"):
        ledger.correct_prompt(request_id, 1)
    with pytest.raises(LifecycleError, match="is not here"):
        dispatcher.entry(RequestId(99))
    dispatcher.bind(request_id, WorkerIndex(0), 0.0)
    with pytest.raises(LifecycleError, match="cannot BIND"):
        dispatcher.bind(request_id, WorkerIndex(0), 0.0)
    with pytest.raises(LifecycleError, match="does not end"):
        dispatcher.end(request_id, Event.FIRST_TOKEN)
    with pytest.raises(InvalidInputError, match="at least 0, got -1"):
        dispatcher.arrive(PendingRequest(-1), 0.0)
    assert dispatcher.ledger.requests == (1,)


def test_repr_is_the_state_in_a_line():
    ledger = bound_ledger([WorkerLimits(1), WorkerLimits(1)], [(1, 30)])
    assert repr(ledger) == "<Ledger bound=1 kv_tokens=[0, 30] requests=[0, 1]>"


def test_no_number_leaves_its_bounds():
    dispatcher = dispatcher_of([WorkerLimits(1)])
    ledger = dispatcher.ledger
    request_id = dispatcher.arrive(PendingRequest(HUGE, sequences=HUGE), 0.0)
    dispatcher.bind(request_id, WorkerIndex(0), 0.0, (HUGE, HUGE, True))
    assert ledger.kv_tokens == (TOKENS_MAX,)
    assert ledger.active().length_max.tolist() == [LENGTH_UNLIMITED]
    for tokens, booked in ((HUGE, TOKENS_MAX), (HUGE, TOKENS_MAX), (-HUGE, 0), (7, 7)):
        ledger.grow(request_id, tokens)
        assert ledger.kv_tokens == (TOKENS_MAX + booked,)
    for prompt_tokens, booked in ((-HUGE, 0), (HUGE, TOKENS_MAX), (3, 3)):
        ledger.correct_prompt(request_id, prompt_tokens)
        assert ledger.kv_tokens == (booked + 7,)
    assert dispatcher.end(request_id, Event.FINISH).sequences == SEQUENCES_MAX
    assert (ledger.kv_tokens, ledger.requests, ledger.bound) == ((0,), (0,), 0)


def test_other_limits_are_those_that_rounds_see():
    ledger = bound_ledger([WorkerLimits(2), WorkerLimits(2, 50)], [(0, 300)])
    ledger.set_offset(WorkerIndex(0), 100)
    ledger.roster.set_limits_of(ledger.roster.member(0), WorkerLimits(3, 1000))
    assert ledger.kv_capacity_tokens_max == 1000
    assert ledger.slots_total == 5
    state = ledger.state([True, True], late_binding=True)
    assert (state.kv_free, state.slots_free) == ([600, 50], [2, 2])
    ledger.roster.remove("1", bound=0)
    assert ledger.offset_by_place() == [100]
    # Whoever gets its index begins without one.
    ledger.set_offset(WorkerIndex(0), 0)
    assert not ledger.has_offset
