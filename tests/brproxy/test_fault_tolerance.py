"""The recovery of a group: who is told to retry, when, and how often at most."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines.fault_pages import Report, Standing
from brproxy.fault_tolerance import (
    AFTER,
    SILENT_LOOKS_MAX,
    TRANSITIONS,
    Event,
    Recovery,
    RecoveryError,
    RecoverySettings,
    State,
)
from tests.draws import draws

RECOVERY_S = 60.0
RETRIES_MAX = 2
WAIT_S = 5.0
LETTERS = {
    "H": Standing.HEALTHY,
    "U": Standing.UNHEALTHY,
    "D": Standing.DEAD,
    "S": Standing.SILENT,
    "A": Standing.ABSENT,
}


def recovery():
    return Recovery(RecoverySettings(RECOVERY_S, RETRIES_MAX, WAIT_S))


def reports(letters, failed=""):
    return {str(rank): Report(LETTERS[letter], failed=failed) for rank, letter in enumerate(letters)}


def looked(machine, letters, now_s, failed=""):
    action = machine.look(reports(letters, failed), now_s)
    if action.event is Event.TELL:
        machine.heard(dict.fromkeys(action.tell, f"id-{machine.counts[Event.TELL]}"), now_s)
    return action


def test_all_that_wait_are_told_once_when_nobody_is_healthy_and_recover():
    machine = recovery()
    assert looked(machine, "HHH", 0.0) == (None, ())
    assert looked(machine, "HUH", 1.0) == (Event.FAULT, ())
    assert looked(machine, "HUU", 2.0) == (None, ()), "one has not noticed, and would refuse"
    assert looked(machine, "UUU", 3.0) == (Event.TELL, ("0", "1", "2"))
    assert looked(machine, "UUU", 4.0) == (None, ()), "they are at it"
    assert looked(machine, "HUU", 5.0) == (None, ())
    assert looked(machine, "HHH", 6.0) == (Event.RECOVERED, ())
    assert machine.state is State.WELL
    assert machine.counts == {Event.FAULT: 1, Event.TELL: 1, Event.HEARD: 1, Event.RECOVERED: 1}


@pytest.mark.parametrize("gone", ["D", "A"])
def test_who_is_gone_is_not_told_and_not_waited_for(gone):
    machine = recovery()
    assert looked(machine, f"H{gone}H", 0.0) == (None, ()), "nobody waits"
    looked(machine, f"U{gone}H", 1.0)
    assert looked(machine, f"U{gone}U", 2.0) == (Event.TELL, ("0", "2"))
    assert looked(machine, f"H{gone}H", 3.0) == (Event.RECOVERED, ())


def test_one_that_does_not_answer_is_waited_for_some_looks():
    machine = recovery()
    looked(machine, "UUS", 0.0)
    for look in range(1, SILENT_LOOKS_MAX - 1):
        assert looked(machine, "UUS", look) == (None, ())
    assert looked(machine, "UUS", 9.0) == (Event.TELL, ("0", "1"))


def test_silence_of_those_that_waited_is_no_recovery():
    machine = recovery()
    looked(machine, "UH", 0.0)
    assert looked(machine, "SH", 1.0) == (None, ())
    assert looked(machine, "UH", 2.0) == (None, ()), "the count begins anew"
    assert looked(machine, "SH", 3.0) == (None, ())
    assert looked(machine, "AH", 4.0) == (Event.RECOVERED, ())


def test_a_failed_retry_is_followed_by_another_after_a_wait_and_not_more_than_allowed():
    machine = recovery()
    looked(machine, "UU", 0.0)
    assert looked(machine, "UU", 1.0).event is Event.TELL
    assert looked(machine, "UU", 2.0, failed="of another time") == (None, ())
    assert looked(machine, "HU", 3.0, failed="id-1") == (Event.FAILED, ())
    assert looked(machine, "UU", 3.0 + WAIT_S - 0.1) == (None, ())
    assert looked(machine, "UU", 3.0 + WAIT_S) == (Event.TELL, ("0", "1"))
    assert looked(machine, "UU", 10.0, failed="id-2").event is Event.FAILED
    assert looked(machine, "UU", 30.0).event is Event.GIVEN_UP
    assert looked(machine, "UU", 31.0) == (None, ()), "told nothing more"
    assert looked(machine, "AA", 32.0) == (Event.GONE, ())
    assert machine.state is State.WELL


def test_who_did_not_take_the_retry_has_failed_but_the_others_are_at_it():
    machine = recovery()
    machine.look(reports("UU"), 0.0)
    machine.look(reports("UU"), 1.0)
    machine.heard({"0": "", "1": "id"}, 1.0)
    assert machine.look(reports("UU"), 2.0) == (None, ())
    assert machine.look(reports("UU", failed="id"), 3.0).event is Event.FAILED


def test_who_was_removed_is_not_waited_for():
    machine = recovery()
    looked(machine, "UU", 0.0)
    looked(machine, "UU", 1.0)
    assert machine.look({"0": Report(Standing.UNHEALTHY, failed="id-1")}, 2.0).event is Event.FAILED


def test_a_fault_is_given_up_in_time_also_where_it_cannot_be_told():
    machine = recovery()
    looked(machine, "UH", 0.0)
    assert looked(machine, "UH", RECOVERY_S - 0.1) == (None, ())
    assert looked(machine, "UH", RECOVERY_S) == (Event.GIVEN_UP, ())


def test_retries_count_on_until_the_group_has_been_well_for_long():
    machine = recovery()
    now_s = 0.0
    for _ in range(RETRIES_MAX):
        for letters, event in (("UU", Event.FAULT), ("UU", Event.TELL), ("HH", Event.RECOVERED)):
            assert looked(machine, letters, now_s).event is event
            now_s += WAIT_S
    looked(machine, "UU", now_s)
    assert looked(machine, "UU", now_s + WAIT_S).event is Event.GIVEN_UP
    assert looked(machine, "HH", now_s).event is Event.RECOVERED
    looked(machine, "UU", now_s + RECOVERY_S)
    assert looked(machine, "UU", now_s + RECOVERY_S + 1).event is Event.TELL


def test_it_does_not_look_while_it_tells_and_hears_nothing_else():
    machine = recovery()
    with pytest.raises(RecoveryError, match="in state WELL cannot HEARD"):
        machine.heard({}, 0.0)
    machine.look(reports("U"), 0.0)
    machine.look(reports("U"), 1.0)
    with pytest.raises(RecoveryError, match="say first what they answered"):
        machine.look(reports("U"), 2.0)


def test_the_table_has_a_way_back_from_everywhere():
    assert set(TRANSITIONS) == set(State)
    for state in State:
        reached = {state}
        while len(grown := reached.union(*(AFTER[each].values() for each in reached))) > len(reached):
            reached = grown
        assert State.WELL in reached


class Rank:
    """A rank as vLLM has it: it takes a retry only while it waits, and says of one whether it failed."""

    def __init__(self):
        self.standing = Standing.HEALTHY
        self.at_work = ""
        self.failed = ""

    def become(self, standing):
        self.standing, self.at_work = standing, ""

    def told(self, retry):
        assert self.standing is Standing.UNHEALTHY, "it would refuse"
        assert not self.at_work, "two retries at once"
        self.at_work = retry

    def end(self, *, well):
        if self.at_work and well:
            self.become(Standing.HEALTHY)
        elif self.at_work:
            self.failed, self.at_work = self.at_work, ""


WORLD = st.sampled_from(["fault", "die", "vanish", "return", "succeed", "fail", "hide", "nothing"])
TICKS = st.lists(
    st.tuples(st.sampled_from([0.1, 1.0, WAIT_S, 20.0]), st.lists(st.tuples(st.integers(0, 2), WORLD))),
    max_size=60,
)


def happen(rank, what):
    match what:
        case "fault" if rank.standing is Standing.HEALTHY:
            rank.become(Standing.UNHEALTHY)
        case "die" if rank.standing in {Standing.HEALTHY, Standing.UNHEALTHY}:
            rank.become(Standing.DEAD)
        case "vanish":
            rank.become(Standing.ABSENT)
        case "return" if rank.standing is Standing.ABSENT:
            rank.become(Standing.HEALTHY)
        case "succeed" | "fail":
            rank.end(well=what == "succeed")


@draws(100)
@given(TICKS)
def test_whatever_happens_there_is_one_retry_at_a_time_a_bound_and_an_end(ticks):
    machine, ranks, now_s = recovery(), [Rank() for _ in range(3)], 0.0
    since_s = well_since_s = float("-inf")
    retries = 0
    # At last everybody is well: then the fault must be over.
    end = [(1.0, [(rank, what) for rank in range(3) for what in ("vanish", "return")])]
    for pause_s, happenings in ticks + end:
        now_s += pause_s
        for rank, what in happenings:
            happen(ranks[rank], what)
        hidden = {rank for rank, what in happenings if what == "hide"}
        seen = {
            str(number): Report(Standing.SILENT if number in hidden else rank.standing, failed=rank.failed)
            for number, rank in enumerate(ranks)
        }
        before = machine.state
        action = machine.look(seen, now_s)
        if action.event is Event.FAULT:
            since_s = now_s
            retries = retries if now_s - well_since_s < RECOVERY_S else 0
        elif action.event is Event.TELL:
            retries += 1
            assert retries <= RETRIES_MAX
            assert not any(each.standing is Standing.HEALTHY for each in seen.values())
            for name in action.tell:
                ranks[int(name)].told(f"retry {machine.counts[Event.TELL]}")
            machine.heard({name: ranks[int(name)].at_work for name in action.tell}, now_s)
        if machine.state is State.WELL and before is not State.WELL:
            well_since_s = now_s
        if now_s - since_s >= RECOVERY_S:
            assert machine.state in {State.WELL, State.LOST}
    assert machine.state is State.WELL
