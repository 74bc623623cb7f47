"""Who the workers of a group are, and who is told what."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.health import Health, HealthThresholds
from brproxy.roster import Change, MemberState, Roster, RosterError, WorkerLimits
from brproxy.types import InvalidInputError

LIMITS = WorkerLimits(4, 100)


def roster_of(*keys, checked=False):
    roster = Roster(HealthThresholds(2, 1), checked=checked)
    told = []
    roster.observe(lambda member, change: told.append((member.key, change)))
    for key in keys:
        roster.add(key, LIMITS, f"http://{key}")
    return roster, told


def test_members_come_in_order_and_keep_their_index():
    roster, told = roster_of("a", "b")
    assert [(m.key, m.index, m.origin, m.limits) for m in roster.members] == [
        ("a", 0, "http://a", LIMITS),
        ("b", 1, "http://b", LIMITS),
    ]
    assert roster.routable() == (True, True)
    assert (len(roster), roster.present, roster.place) == (2, None, None)
    assert told == [("a", Change.ADDED), ("b", Change.ADDED)]


def test_names_are_unique_among_those_who_are_there():
    roster, _ = roster_of("a")
    with pytest.raises(InvalidInputError, match="a worker a already"):
        roster.add("a", LIMITS)
    roster.remove("a", bound=0)
    roster.add("a", LIMITS)


def test_limits_change_and_observers_are_told():
    roster, told = roster_of("a", "b")
    member, version = roster.member(0), roster.version
    roster.set_limits_of(member, LIMITS)
    assert (told[2:], roster.version) == ([], version), "nothing has changed"
    roster.set_limits_of(member, WorkerLimits(4, 900))
    assert told[2:] == [("a", Change.LIMITS)]
    assert member.limits == WorkerLimits(4, 900)
    assert roster.version > version, "what is kept by it is not as before"
    roster.remove("a", bound=0)
    roster.set_limits_of(member, LIMITS)
    assert told[3:] == [("a", Change.DRAINING), ("a", Change.GONE)]


def test_one_that_drains_takes_nothing_new_and_is_there():
    roster, told = roster_of("a", "b")
    member = roster.drain("a")
    roster.drain("a")
    assert told[2:] == [("a", Change.DRAINING)], "once"
    assert roster.routable() == (False, True)
    assert (member.state, len(roster), roster.present) == (MemberState.DRAINING, 2, None)
    roster.let_go(member.index)
    assert member.state is MemberState.DRAINING, "it was not asked to leave"


def test_one_with_bound_requests_goes_when_they_have_ended():
    roster, told = roster_of("a", "b", "c")
    member = roster.remove("b", bound=2)
    assert member.state is MemberState.DRAINING
    roster.let_go(0)
    assert member.state is MemberState.DRAINING
    roster.let_go(1)
    assert member.state is MemberState.GONE
    assert told[3:] == [("b", Change.DRAINING), ("b", Change.GONE)]
    assert (len(roster), roster.present, roster.place.tolist()) == (2, [0, 2], [0, 0, 1])
    assert [m.key for m in roster.members] == ["a", "c"]
    assert roster.routable() == (True, False, True)
    with pytest.raises(RosterError, match="no worker 1 among 2"):
        roster.member(1)
    with pytest.raises(RosterError, match="there is no worker b"):
        roster.find("b")
    assert not roster.record(member, ok=False, reason="late", now_s=9.0)


def test_one_that_drains_is_resumed_and_one_that_leaves_is_not():
    roster, told = roster_of("a", "b")
    roster.resume("a")
    assert told[2:] == [], "it took requests all the time"
    roster.drain("a")
    assert roster.routable() == (False, True)
    version = roster.version
    roster.resume("a")
    assert (roster.routable(), roster.version > version) == ((True, True), True)
    assert told[2:] == [("a", Change.DRAINING), ("a", Change.RESUMED)]
    roster.remove("a", bound=1)
    with pytest.raises(
        RosterError, match="worker a leaves with its last request: it cannot be resumed, only"
    ):
        roster.resume("a")
    with pytest.raises(RosterError, match="there is no worker c"):
        roster.resume("c")


def test_limits_change_in_place_and_are_told():
    roster, told = roster_of("a")
    member = roster.set_limits("a", WorkerLimits(9, None))
    roster.set_limits("a", WorkerLimits(9, None))
    assert (member.limits, member.index) == (WorkerLimits(9, None), 0)
    assert told[1:] == [("a", Change.LIMITS)], "once"
    with pytest.raises(RosterError, match="there is no worker c"):
        roster.set_limits("c", LIMITS)


def test_one_that_leaves_gives_its_name_to_another():
    roster, told = roster_of("a")
    old = roster.remove("a", bound=1)
    new = roster.add("a", LIMITS, "http://elsewhere")
    assert (old.key, new.key, new.index) == ("a (leaving)", "a", 1)
    assert roster.find("a") is new
    roster.add("a (leaving 2)", LIMITS)
    again = roster.remove("a", bound=1)
    roster.add("a", LIMITS, "http://third")
    assert again.key == "a (leaving 3)", "no name is given twice"
    roster.let_go(old.index)
    assert told[-1] == ("a (leaving)", Change.GONE)


def test_one_that_leaves_and_comes_again_at_its_place_stays():
    roster, told = roster_of("a")
    old = roster.remove("a", bound=1)
    assert roster.add("a", WorkerLimits(9), "http://a") is old
    assert (old.state, old.leaves, old.limits) == (MemberState.ACTIVE, False, WorkerLimits(9))
    roster.let_go(old.index)
    assert old.state is MemberState.ACTIVE
    assert [change for _, change in told[1:]] == [Change.DRAINING, Change.RESUMED, Change.LIMITS]
    roster.remove("a", bound=1)
    assert roster.add("a", LIMITS, "http://a", b"X-Rank: 1\r\n") is not old, "another rank there"


def test_a_gap_is_filled_by_the_next_that_comes():
    roster, _ = roster_of("a", "b")
    gone = roster.remove("a", bound=0)
    versions = {roster.version}
    member = roster.add("new", LIMITS)
    versions.add(roster.version)
    assert (member.index, roster.present, roster.columns) == (0, None, 2)
    assert gone.state is MemberState.GONE
    assert len(versions) == 2
    assert roster.add("more", LIMITS).index == 2


def test_health_is_told_when_it_changes():
    roster, told = roster_of("a", checked=True)
    member = roster.member(0)
    assert (member.health.state, roster.routable()) == (Health.UNKNOWN, (False,))
    assert roster.record(roster.member(0), ok=True, reason="answers", now_s=1.0)
    for _ in range(3):
        roster.record(roster.member(0), ok=False, reason="silent", now_s=2.0)
    assert roster.is_out(member)
    assert (roster.routable(), member.health.reason) == ((False,), "silent")
    roster.record(roster.member(0), ok=True, reason="back", now_s=3.0)
    changes = [Change.HEALTHY, Change.UNHEALTHY, Change.OUT, Change.HEALTHY]
    assert told[1:] == [("a", change) for change in changes]
    assert not roster.is_out(member)


def test_where_too_many_are_out_none_is_out_for_that(caplog):
    roster = Roster(HealthThresholds(1, 1), ejected_share_max=0.5)
    for key in "abcde":
        roster.add(key, LIMITS)
    for index in range(4):
        roster.record(roster.member(index), ok=True, reason="", now_s=0.0)
    roster.drain("d")
    masks = []
    for index, ok in ((0, False), (1, False), (2, False), (3, False), (1, True), (0, True)):
        roster.record(roster.member(index), ok=ok, reason="", now_s=1.0)
        masks.append("".join("01"[routable] for routable in roster.routable()))
    # Of four active ones, as d drains; e was never healthy.
    assert masks == ["01100", "00100", "11100", "11100", "01000", "11000"]
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 4 workers are unhealthy: all may be chosen",
        "2 of 4 workers are unhealthy: they may not be chosen",
    ]
    assert not roster.member(2).is_routable, "for who asks whether it is well"


def test_who_was_not_out_as_too_many_were_is_out_once_others_are_well_again():
    roster = Roster(HealthThresholds(1, 1), ejected_share_max=0.5)
    told = []
    roster.observe(lambda member, change: told.append((member.key, change)))
    for key in "abc":
        roster.record(roster.add(key, LIMITS), ok=True, reason="", now_s=0.0)
    told.clear()
    for key, ok in (("a", False), ("b", False), ("a", True)):
        roster.record(roster.find(key), ok=ok, reason="", now_s=1.0)
    assert told == [
        *(("a", Change.UNHEALTHY), ("a", Change.OUT)),
        ("b", Change.UNHEALTHY),
        *(("a", Change.HEALTHY), ("b", Change.OUT)),
    ]


def test_who_says_of_itself_that_it_cannot_serve_is_out_however_many_are():
    roster = Roster(HealthThresholds(1, 1), ejected_share_max=0.5)
    for key in "ab":
        roster.record(roster.add(key, LIMITS), ok=True, reason="", now_s=0.0)
        roster.record(roster.find(key), ok=False, reason="silent", now_s=1.0)
    assert roster.routable() == (True, True)
    told = []
    roster.observe(lambda member, change: told.append((member.key, change)))
    assert not roster.accuse(roster.find("a"), "waits after a fault", 2.0)
    assert (roster.routable(), told) == ((False, True), [("a", Change.OUT)])
    assert not roster.accuse(roster.find("a"), "", 3.0)
    assert roster.routable() == (True, True)


STEPS = st.tuples(
    st.sampled_from(["well", "ill", "accused", "cleared", "drain", "resume", "remove", "add"]),
    st.sampled_from("abcd"),
)


def step(roster, what, key):
    member = next((each for each in roster.members if each.key == key), None)
    if what == "add":
        if member is None or member.leaves:
            roster.add(key, LIMITS, key)
    elif member is None:
        return
    elif what in {"well", "ill"}:
        roster.record(member, ok=what == "well", reason=what, now_s=0.0)
    elif what in {"accused", "cleared"}:
        roster.accuse(member, what if what == "accused" else "", 0.0)
    elif what != "resume":
        roster.drain(key) if what == "drain" else roster.remove(key, bound=1)
    elif not member.leaves:
        roster.resume(key)


@given(share=st.sampled_from([0.0, 0.3, 0.5, 1.0]), steps=st.lists(STEPS, max_size=40))
def test_whoever_is_out_was_told_so_once_and_nobody_else_was(share, steps):
    roster = Roster(HealthThresholds(1, 1), ejected_share_max=share)
    told = []
    roster.observe(lambda member, change: told.append(member) if change is Change.OUT else None)
    for key in "abcd":
        roster.add(key, LIMITS, key)
    before = set()
    for what, key in steps:
        step(roster, what, key)
        active = [each for each in roster.members if each.state is MemberState.ACTIVE]
        ill = {each for each in roster.members if each.health.state is Health.UNHEALTHY}
        out = {each for each in roster.members if roster.is_out(each)}
        if len(ill.intersection(active)) > share * len(active):
            assert out == {each for each in ill if each.health.is_accused}
            assert all(roster.routable()[each.index] for each in ill.intersection(active) - out)
        else:
            assert out == ill
        assert len(told) == len(set(told))
        assert set(told) == out - before
        assert not any(roster.routable()[each.index] for each in out)
        before = out
        told.clear()


def test_an_observer_that_raises_keeps_nothing_from_the_others(caplog):
    told = []
    raising = Roster(checked=False)
    raising.observe(lambda member, change: 1 / 0)
    raising.observe(lambda member, change: told.append(change))
    with caplog.at_level(logging.ERROR):
        raising.add("a", LIMITS)
    assert told == [Change.ADDED]
    assert "told that worker a is ADDED" in caplog.text


def test_repr_is_the_state_in_a_line():
    roster, _ = roster_of("a", "b")
    roster.drain("b")
    assert repr(roster) == "<Roster a:ACTIVE:healthy b:DRAINING:healthy>"
