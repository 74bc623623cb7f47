"""Worker states from consecutive results."""

import pytest

from brproxy.health import Health, HealthThresholds, HealthTracker


@pytest.mark.parametrize(
    ("results", "states"),
    [
        ("+", "H"),
        ("-", "?"),
        ("--+", "??H"),
        ("---", "??U"),
        ("+--+--+", "HHHHHHH"),
        ("+---", "HHHU"),
        ("+---+", "HHHUU"),
        ("+---++", "HHHUUH"),
        ("+---+-++", "HHHUUUUH"),
        ("---++", "??UUH"),
    ],
)
def test_thresholds(results, states):
    tracker = HealthTracker(HealthThresholds(unhealthy_after=3, healthy_after=2))
    letters = {Health.UNKNOWN: "?", Health.HEALTHY: "H", Health.UNHEALTHY: "U"}
    seen = ""
    for now_s, result in enumerate(results):
        tracker.record(ok=result == "+", reason=f"result {now_s}", now_s=now_s)
        seen += letters[tracker.state]
    assert seen == states


def test_a_change_is_reported_with_time_and_reason():
    tracker = HealthTracker(HealthThresholds(1, 1))
    assert tracker.record(ok=True, reason="answers", now_s=1.0)
    assert not tracker.record(ok=True, reason="answers again", now_s=2.0)
    assert (tracker.since_s, tracker.reason) == (1.0, "answers")
    assert tracker.record(ok=False, reason="refused", now_s=3.0)
    assert (tracker.since_s, tracker.reason) == (3.0, "refused")


def test_what_a_worker_says_of_itself_outweighs_checks_and_leaves_them_as_they_are():
    tracker = HealthTracker(HealthThresholds(2, 2))
    tracker.record(ok=True, reason="answers", now_s=1.0)
    assert tracker.accuse("waits", 2.0)
    assert (tracker.state, tracker.since_s, tracker.reason) == (Health.UNHEALTHY, 2.0, "waits")
    assert not tracker.record(ok=True, reason="answers", now_s=3.0)
    assert not tracker.accuse("is dead", 4.0)
    assert (tracker.state, tracker.since_s, tracker.reason) == (Health.UNHEALTHY, 2.0, "is dead")
    assert tracker.accuse("", 5.0)
    assert (tracker.state, tracker.since_s) == (Health.HEALTHY, 5.0)
    tracker.accuse("waits", 6.0)
    for now_s in (7.0, 8.0):
        tracker.record(ok=False, reason="refused", now_s=now_s)
    assert not tracker.accuse("", 9.0)
    assert (tracker.state, tracker.reason) == (Health.UNHEALTHY, "refused")


def test_one_that_was_never_checked_is_unknown_again():
    tracker = HealthTracker(HealthThresholds(2, 2))
    assert tracker.accuse("waits", 1.0)
    assert tracker.accuse("", 2.0)
    assert (tracker.state, tracker.reason) == (Health.UNKNOWN, "not checked yet")
