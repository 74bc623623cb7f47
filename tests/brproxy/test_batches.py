"""Closed batches: who goes first, beside plain loops, and that it is nobody else's business."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.batches import _BEYOND, Batches, BatchLimits, take_batches
from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.ledger import Ledger
from brproxy.lifecycle import NO_WORKER, Event
from brproxy.prediction.predictor import make_predictor
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policy import make_policy
from brproxy.step_costs import StepCosts
from brproxy.types import PendingRequest, WorkerIndex
from brproxy.waiting import WaitingRoom
from tests.draws import draws

MANY = 1 << 20


LIMITS, POOL = BatchLimits(), PoolLimits()


def a_group(policy="br-0", predictor="survival", slots=4, workers=2, limits=LIMITS, pool=POOL):
    dispatcher = Dispatcher(
        Ledger(Roster.of([WorkerLimits(slots, None)] * workers)),
        make_policy(policy),
        make_predictor(predictor),
        np.random.default_rng(0),
        pool,
    )
    return dispatcher, take_batches(dispatcher, limits)


def rollout(batch="b", key=None, **more):
    return PendingRequest(10, prompt_hash=key, batch=batch, **more)


def ids(entries):
    return [entry.id for entry in entries]


def in_turn(dispatcher, slots_free=MANY):
    return ids(dispatcher.waiting.in_turn(slots_free))


# What happens in a group, by the place of whom it happens to.
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.sampled_from(["", "a", "b"]), st.integers(0, 3)),
        st.tuples(st.just("go"), st.lists(st.integers(0, 9), max_size=4), st.integers(0, 1)),
        st.tuples(st.just("grow"), st.integers(0, 99), st.integers(1, 900)),
        st.tuples(st.just("end"), st.integers(0, 99), st.sampled_from([Event.FINISH, Event.CANCEL])),
        st.tuples(st.just("retry"), st.integers(0, 99), st.none()),
        st.tuples(st.just("leave"), st.integers(0, 9), st.none()),
    ),
    max_size=40,
)


def plainly_go(plain, admitted):
    """Take the places out of a list, and count for the others who overtakes them."""
    for place in reversed(admitted):
        for before in range(place):
            plain[before][1] += before not in admitted
        del plain[place]


def happens(dispatcher, bound, entry, kind, more):
    if kind == "grow":
        dispatcher.ledger.grow(entry.id, more)
        return
    bound.remove(entry)
    if kind == "end":
        dispatcher.end(entry.id, more)
    else:
        dispatcher.retry(entry.id, 100.0)


@draws(300)
@given(STEPS)
def test_nobody_outside_of_a_batch_has_another_place(steps):
    """A group with batches, and a list of which the same places go: others are at the same ones."""
    dispatcher, _ = a_group(slots=99)
    room, plain = dispatcher.waiting, []
    bound = []
    for now_s, (kind, what, more) in enumerate(steps):
        shown = list(room.in_turn())
        if kind == "arrive":
            entry = dispatcher.enter(rollout(what, more), float(now_s))
            plain.append([what or entry.id, 0])
        elif kind == "go":
            admitted = sorted({place for place in what if place < len(shown)})
            WaitingRoom.pass_over(shown, admitted)
            plainly_go(plain, admitted)
            for place in admitted:
                dispatcher.bind(shown[place].id, WorkerIndex(more), float(now_s))
                bound.append(shown[place])
        elif kind == "leave" and what < len(shown):
            dispatcher.end(shown[what].id, Event.CANCEL)
            del plain[what]
        elif kind in {"grow", "end", "retry"} and bound:
            happens(dispatcher, bound, bound[what % len(bound)], kind, more)
        seen = list(room.in_turn())
        assert [entry.request.batch or entry.id for entry in seen] == [label for label, _ in plain]
        assert [entry.passed_over for entry in seen] == [times for _, times in plain]
        assert sorted(ids(seen)) == sorted(ids(placed(room)))
        assert len(seen) + len(room.first()) == len(room)


def placed(room):
    return list(room._places.values())


def expected_plainly(prompt, entries, mean_before):
    """Return what is expected of a prompt, as the module says it."""
    everything = sum(tokens for _, tokens, _ in entries) + mean_before
    mean = everything / (sum(ended for *_, ended in entries) + 1)
    own = [(tokens, ended) for key, tokens, ended in entries if key == prompt]
    total = mean + sum(tokens if ended else max(0, tokens - mean) for tokens, ended in own)
    return total / (sum(ended for _, ended in own) + 1)


@draws(200)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3000), st.booleans()), max_size=20),
    st.lists(st.integers(0, 7), max_size=20),
)
def test_the_longest_expected_goes_first(begun, waiting):
    dispatcher, _ = a_group(slots=99)
    mean_before = dispatcher.predictor.mean_output_tokens
    for key, tokens, _ in begun:
        entry = dispatcher.enter(rollout(key=key), 0.0)
        dispatcher.bind(entry.id, WorkerIndex(0), 0.0)
        dispatcher.ledger.grow(entry.id, tokens)
    bound = ids(dispatcher.ledger._rows)
    # Told to the batch alone: what the predictor says of all traffic is another matter.
    dispatcher.happenings._ended = dispatcher.happenings._ended[-1:]
    for request_id, (_, _, ends) in zip(bound, begun, strict=True):
        if ends:
            dispatcher.end(request_id, Event.FINISH)
    left = {dispatcher.enter(rollout(key=key), 1.0).id: key for key in waiting}
    started = [key for key, _, _ in begun]
    shown = in_turn(dispatcher)
    assert sorted(shown) == sorted(left)
    for request_id in shown:
        key = left[request_id]
        expected = {each: expected_plainly(each, begun, mean_before) for each in left.values()}
        best = max(expected.values())
        assert expected[key] == pytest.approx(best, rel=1e-12)
        equals = [each for each in expected if math.isclose(expected[each], best, rel_tol=1e-12)]
        assert started.count(key) == min(map(started.count, equals))
        assert request_id == min(each for each in left if left[each] == key)
        started.append(key)
        del left[request_id]


def test_a_round_sees_few_more_of_a_batch_than_there_are_slots():
    dispatcher, batches = a_group()
    for number in range(100):
        dispatcher.enter(rollout(key=number), 0.0)
    # Nor does it go through the rest, where nobody is behind them.
    assert len(list(batches.in_turn(dispatcher.waiting._places.values(), 3))) == 3 + _BEYOND
    others = ids(dispatcher.enter(rollout("", 0), 0.0) for _ in range(5))
    assert in_turn(dispatcher, 3) == [*range(3 + _BEYOND), *others]


def test_what_an_earlier_epoch_taught_orders_the_next():
    dispatcher, _ = a_group(predictor="exact-match", slots=99)
    lengths = {0: 50, 1: 900, 2: 300, 3: 2000}
    for key, tokens in [*lengths.items()] * 4:
        entry = dispatcher.enter(rollout("epoch 1", key), 0.0)
        dispatcher.bind(entry.id, WorkerIndex(0), 0.0)
        dispatcher.ledger.grow(entry.id, tokens)
        dispatcher.end(entry.id, Event.FINISH)
    order = {dispatcher.enter(rollout("epoch 2", key), 1.0).id: key for key in lengths}
    assert [order[each] for each in in_turn(dispatcher)] == [3, 1, 2, 0]


def test_a_length_that_is_known_is_that_request_s_alone():
    dispatcher, _ = a_group(predictor="oracle")
    for tokens in (30, 500, 20, 100):
        dispatcher.enter(rollout(key=7, output_tokens_true=tokens), 0.0)
    assert in_turn(dispatcher) == [1, 3, 0, 2]
    told, _ = a_group()
    for tokens in (30, 500, 20):
        told.enter(rollout(key=tokens, output_tokens_max=tokens, runs_to_max=True), 0.0)
    assert in_turn(told) == [1, 0, 2]


@draws(100)
@given(
    st.lists(st.tuples(st.integers(1, 900), st.integers(1, 3000)), min_size=1, max_size=30),
    st.sampled_from(["br-0", "br-h"]),
    st.lists(st.sampled_from([1.0, 1.5]), min_size=2, max_size=2),
    st.booleans(),
)
def test_a_batch_is_dealt_so_that_workers_end_alike(asked, policy, slowness, has_gone):
    """Beside a loop: the longest first, each to the worker with the least load once all is decoded."""
    dispatcher, _ = a_group(policy, "oracle", slots=40)
    dispatcher.costs = lambda: StepCosts(0.03, 1e-7, 0.0, slowness=tuple(slowness))
    if has_gone:
        # Places and indices differ then.
        roster = dispatcher.roster
        roster.add("2", WorkerLimits(40, None))
        roster.remove("0", 0)
    workers = [member.index for member in dispatcher.roster.members]
    length = {}
    for prompt, tokens in asked:
        request = PendingRequest(prompt, batch="b", output_tokens_true=tokens)
        length[dispatcher.enter(request, 0.0).id] = tokens
    load = dict.fromkeys(workers, 0.0)
    slow = dict(zip(workers, slowness, strict=True))
    admitted = dispatcher.decide(0.0, dispatcher.roster.routable())
    if len(asked) > 1:
        assert [length[entry.id] for entry in admitted] == sorted(length.values(), reverse=True)
        for entry in admitted:
            assert load[entry.worker] == pytest.approx(min(load.values()), rel=1e-9)
            load[entry.worker] += (entry.prompt_tokens + length[entry.id]) * slow[entry.worker]
    assert len(admitted) == len(asked)


def test_what_runs_is_expected_to_go_on():
    dispatcher, batches = a_group("least-kv", "oracle")
    for worker, (tokens, streamed) in enumerate([(500, 100), (60, 60)]):
        entry = dispatcher.enter(rollout(output_tokens_true=tokens), 0.0)
        dispatcher.bind(entry.id, WorkerIndex(worker), 0.0)
        dispatcher.ledger.grow(entry.id, streamed)
    waiting = [dispatcher.enter(rollout(output_tokens_true=40, sequences=2), 0.0)]
    # What is as long as it was expected to get goes on for half as long again.
    assert batches.growth(waiting) == ([80.0], [400.0, 30.0])
    other = dispatcher.enter(rollout("other"), 0.0)
    assert batches.growth([*waiting, other]) is None
    assert batches.growth([dispatcher.enter(rollout(""), 0.0)]) is None


def test_where_prompts_go_in_step_they_are_not_dealt():
    dispatcher, batches = a_group()
    batches._costs = lambda: StepCosts(0.03, 1e-7, 2e-5)
    assert batches.growth([dispatcher.enter(rollout(), 0.0)]) is None


@draws(60)
@given(
    st.lists(st.tuples(st.sampled_from(["", "a"]), st.integers(0, 3), st.integers(1, 30)), max_size=40),
    st.sampled_from(["br-0", "br-h", "least-kv", "join-shortest-queue"]),
    st.sampled_from(["survival", "exact-match"]),
)
def test_every_request_is_served(asked, policy, predictor):
    dispatcher, _ = a_group(policy, predictor, slots=2)
    left, served = {}, []
    for step in range(60 * max(1, len(asked))):
        if step < len(asked):
            batch, key, tokens = asked[step]
            left[dispatcher.enter(rollout(batch, key), float(step)).id] = tokens
        dispatcher.decide(float(step), (True, True))
        for request_id in ids(dispatcher.ledger._rows):
            dispatcher.ledger.grow(request_id, 1)
            left[request_id] -= 1
            if not left[request_id]:
                dispatcher.end(request_id, Event.FINISH)
                served.append(request_id)
        if len(served) == len(asked) <= step:
            break
    assert sorted(served) == list(range(len(asked)))
    assert not dispatcher.faults.counts


def test_the_limit_in_time_is_of_each_request():
    dispatcher, _ = a_group(slots=1, workers=1, pool=PoolLimits(wait_s_max=10.0))
    for number in range(3):
        dispatcher.enter(rollout(key=number), float(number))
    assert dispatcher.expired(11.5) == [0, 1]
    for request_id in dispatcher.expired(11.5):
        dispatcher.end(request_id, Event.EXPIRE)
    assert in_turn(dispatcher) == [2]


def test_a_place_that_is_overdue_stays_so_whoever_has_it():
    dispatcher, _ = a_group(predictor="oracle")
    old = dispatcher.enter(rollout(output_tokens_true=5), 0.0)
    old.passed_over = 77
    new = dispatcher.enter(rollout(output_tokens_true=900), 1.0)
    assert in_turn(dispatcher) == [new.id, old.id]
    assert (new.passed_over, old.passed_over) == (77, 0)


def test_who_was_failed_goes_first_and_by_no_batch():
    dispatcher, _ = a_group(predictor="oracle", slots=1)
    for tokens in (10, 900, 800):
        dispatcher.enter(rollout(output_tokens_true=tokens), 0.0)
    dispatcher.bind(dispatcher.waiting.find(0).id, WorkerIndex(0), 0.0)
    dispatcher.retry(0, 1.0)
    assert ids(dispatcher.waiting.first()) == [0]
    assert in_turn(dispatcher) == [1, 2]
    dispatcher.decide(2.0, (True, True))
    # The worker that failed it is left to the next in turn.
    assert dispatcher.entry(0).worker == 1
    assert dispatcher.entry(1).worker == 0


def test_what_is_known_of_batches_is_bounded():
    dispatcher, batches = a_group(limits=BatchLimits(batches_max=2, prompts_max=3, kept_s=10.0))

    def done(name, now_s, key=0):
        entry = dispatcher.enter(rollout(name, key), now_s)
        dispatcher.end(entry.id, Event.CANCEL)

    for name in "abc":
        done(name, 0.0)
    assert list(batches._batches) == ["b", "c"]
    done("d", 20.0)
    assert list(batches._batches) == ["d"]
    for key in range(9):
        done("d", 20.0, key)
    assert len(batches) == 1
    assert batches._prompts == 3
    assert not batches._known


def test_a_batch_that_nobody_has_room_for_is_served_as_it_comes():
    dispatcher, batches = a_group(predictor="oracle", limits=BatchLimits(batches_max=1))
    for batch, tokens in (("a", 5), ("b", 5), ("a", 900), ("b", 900)):
        dispatcher.enter(rollout(batch, output_tokens_true=tokens), 0.0)
    assert len(batches) == 1
    assert in_turn(dispatcher) == [2, 1, 0, 3]


def test_prompts_beyond_the_limit_are_expected_to_be_as_long_as_all():
    dispatcher, _ = a_group(slots=99, limits=BatchLimits(prompts_max=2))
    for key, tokens in ((0, 100), (1, 3000), (2, 900)):
        entry = dispatcher.enter(rollout(key=key), 0.0)
        dispatcher.bind(entry.id, WorkerIndex(0), 0.0)
        dispatcher.ledger.grow(entry.id, tokens)
        dispatcher.end(entry.id, Event.FINISH)
    order = {dispatcher.enter(rollout(key=key), 1.0).id: key for key in (0, 1, 3)}
    assert [order[each] for each in in_turn(dispatcher)] == [1, 3, 0]


def test_one_that_generates_nothing_is_of_no_batch():
    dispatcher, batches = a_group()
    dispatcher.enter(rollout(sequences=0), 0.0)
    assert not batches._known


def test_several_sequences_count_by_what_each_has():
    dispatcher, _ = a_group(slots=99)
    for key, tokens, sequences in ((0, 400, 1), (1, 800, 8)):
        entry = dispatcher.enter(rollout(key=key, sequences=sequences), 0.0)
        dispatcher.bind(entry.id, WorkerIndex(0), 0.0)
        dispatcher.ledger.grow(entry.id, tokens)
        assert dispatcher.ledger.streamed([entry]).tolist() == [tokens // sequences]
        dispatcher.end(entry.id, Event.FINISH)
    order = {dispatcher.enter(rollout(key=key), 1.0).id: key for key in (1, 0)}
    assert [order[each] for each in in_turn(dispatcher)] == [0, 1]


def test_a_predictor_that_raises_costs_an_order_and_no_request(monkeypatch):
    dispatcher, batches = a_group()

    def broken(request):
        raise ZeroDivisionError

    monkeypatch.setattr(dispatcher.predictor, "expectation", broken)
    for number in range(4):
        dispatcher.enter(rollout(key=number), 0.0)
    assert dispatcher.faults.counts["observer"] == 4
    assert in_turn(dispatcher) == [0, 1, 2, 3]
    assert len(dispatcher.decide(0.0, (True, True))) == 4
    for number in range(4):
        assert dispatcher.entry(number).worker != NO_WORKER
        dispatcher.end(number, Event.FINISH)
    assert isinstance(batches, Batches)
