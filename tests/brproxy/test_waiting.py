"""Who waits, in which order, and who has waited too long: beside a list that is sorted anew each time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.lifecycle import Entry
from brproxy.types import PendingRequest, RequestId
from brproxy.waiting import WaitingRoom
from tests.draws import draws


def entry(number, since_s=0.0, sequences=1, avoid=()):
    return Entry(
        RequestId(number), PendingRequest(1), since_s, since_s, sequences=sequences, avoid=frozenset(avoid)
    )


def ids(entries):
    return [each.id for each in entries]


@draws(100)
@given(st.lists(st.tuples(st.sampled_from(["new", "new", "retry", "free", "leave"]), st.integers(0, 99))))
def test_it_agrees_with_a_list(steps):
    room, model = WaitingRoom(), []
    for now_s, (kind, pick) in enumerate(steps):
        if kind == "leave":
            if model:
                each = model.pop(pick % len(model))
                room.leave(each)
        else:
            sequences = 0 if kind == "free" else 1 + pick % 3
            each = entry(now_s, float(now_s), sequences, [0] if kind == "retry" else [])
            room.enter(each)
            model.append(each)
        first = [e for e in model if e.avoid or not e.sequences]
        others = [e for e in model if e not in first]
        assert ids(room.first()) == ids(first)
        assert ids(room.in_turn()) == ids(others)
        assert len(room) == len(model)
        assert room.since_s == (model[0].waiting_since_s if model else None)
        assert room.alone() is (others[0] if len(model) == 1 and others else None)
        assert room.plural == sum(e.sequences > 1 for e in model)
        assert ids(room.late(now_s, 3.0)) == [e.id for e in model if now_s - e.waiting_since_s > 3.0]
        waited = [(now_s - e.waiting_since_s) / 8.0 for e in others]
        matters = any((now_s - e.waiting_since_s) / 8.0 >= 0.5 for e in model)
        assert room.waited(others, now_s, 8.0, 0.5) == (waited if matters else None)
        assert all(room.find(e.id) is e for e in model)


def test_a_discipline_orders_turns_and_nothing_else():
    room = WaitingRoom(lambda entries, _: sorted(entries, key=lambda e: -e.id))
    for number in range(4):
        room.enter(entry(number, float(number), avoid=[1] if number == 2 else []))
    assert ids(room.in_turn()) == [3, 1, 0]
    assert ids(room.first()) == [2]
    assert ids(room.late(10.0, 8.5)) == [0, 1]
    assert repr(room) == "<WaitingRoom first=[2] in_turn=[3, 1, 0]>"


@draws(100)
@given(st.permutations(range(6)), st.integers(0, 7), st.sets(st.integers(0, 5)))
def test_who_changes_places_leaves_what_is_due_to_them(order, seen, hidden):
    """Whatever a discipline says, a round gets it, and places keep what they have been passed over by."""
    room = WaitingRoom()
    entries = [entry(number) for number in range(6)]
    for each in entries:
        room.enter(each)
        each.passed_over = 10 * each.id
    by_place = [None if place in hidden else entries[number] for place, number in enumerate(order)]
    room.order_by(lambda _, slots_free: by_place[:slots_free])
    shown = [(place, e) for place, e in enumerate(by_place[:seen]) if e is not None]
    got = list(room.in_turn(seen))
    assert got == [e for _, e in shown]
    assert [e.passed_over for e in got] == [10 * place for place, _ in shown]
    assert sorted(e.passed_over for e in entries) == [0, 10, 20, 30, 40, 50]
    for each in got:
        room.leave(each)
    room.order_by(lambda others, _: others)
    left = list(room.in_turn())
    assert {e.id for e in left} == set(range(6)) - {e.id for e in got}
    assert [e.passed_over for e in left] == sorted(e.passed_over for e in left)


def test_a_look_for_who_is_late_does_not_go_through_all():
    class Counted(dict):
        seen = 0

        def values(self):
            for value in super().values():
                Counted.seen += 1
                yield value

    room = WaitingRoom()
    room._by_age = Counted()
    for number in range(1000):
        room.enter(entry(number, float(number)))
    assert room.late(500.0, 600.0) == []
    assert Counted.seen == 1


def test_who_does_not_wait_cannot_leave():
    room = WaitingRoom()
    with pytest.raises(KeyError):
        room.leave(entry(1))


def test_those_that_stay_are_passed_over_by_the_younger_that_go():
    entries = [entry(number) for number in range(5)]
    WaitingRoom.pass_over(entries, [1, 3])
    assert [e.passed_over for e in entries] == [2, 0, 1, 0, 0]
