"""When the next round is due, and when one is missing."""

from brproxy.rounds import Rounds


def test_a_round_is_due_while_anything_waits():
    rounds = Rounds(0.01)
    assert rounds.due_s is None
    assert rounds.next_after(5.0, 3) == 0.01
    assert rounds.due_s == 5.01
    assert rounds.next_after(6.0, 0) is None
    assert rounds.due_s is None


def test_stuck_is_who_waits_for_no_round():
    rounds = Rounds(0.01)
    assert not rounds.is_stuck(100.0, None), "nobody waits"
    assert not rounds.is_stuck(100.0, 99.5), "it has just come"
    assert rounds.is_stuck(100.0, 98.9)
    rounds.next_after(98.9, 1)
    assert not rounds.is_stuck(99.8, 1.0)
    assert rounds.is_stuck(100.0, 1.0), "a round that is due and does not come"
    rounds.next_after(100.0, 1)
    assert not rounds.is_stuck(100.5, 1.0)
    rounds.stopped()
    assert rounds.is_stuck(100.5, 1.0)


def test_slow_ticks_are_not_stuck():
    rounds = Rounds(2.0)
    rounds.next_after(0.0, 1)
    assert not rounds.is_stuck(21.0, 0.0)
    assert rounds.is_stuck(22.1, 0.0)
