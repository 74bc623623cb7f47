"""Whether an engine has a silent request: from counts that lag, with traffic that is not ours."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.silences import OTHERS_KEPT_S, Tally, put_off_s

LAG_S, FRESH_S = 6.0, 10.0


class Worker:
    """A worker that is asked once a second, whose engine may lose requests."""

    def __init__(self, ours, others=0):
        self.tally = Tally(LAG_S)
        self.ours, self.others, self.lost = ours, others, 0
        self.now_s = 0.0

    def poll(self, times=1, *, is_news=True, held=None):
        for _ in range(times):
            self.now_s += 1.0
            self.tally.bound(self.now_s, self.ours, self.ours)
            count = self.ours - self.lost + self.others if held is None else held
            self.tally.told(self.now_s, count, is_news=is_news)
        return self

    def has(self, bound_s=0.0):
        return self.tally.has(bound_s, self.now_s, FRESH_S)


@given(ours=st.integers(1, 300), others=st.integers(0, 50), lost=st.integers(1, 300))
def test_what_the_engine_has_is_kept_and_what_it_has_lost_is_not(ours, others, lost):
    worker = Worker(ours, others).poll(10)
    assert worker.has()
    worker.lost = min(lost, ours)
    worker.poll(2)
    assert not worker.has()


@given(
    changes=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6)), min_size=12, max_size=40),
    others=st.integers(0, 5),
)
def test_nothing_that_the_engine_has_is_missed_while_requests_come_and_go(changes, others):
    """The gauge is as old as the second of each pair says, up to the lag."""
    tally, bound = Tally(LAG_S), []
    for now_s, (more, age_s) in enumerate(changes):
        bound.append(1 + more)
        tally.bound(float(now_s), bound[-1], bound[-1])
        tally.told(float(now_s), bound[max(now_s - age_s, 0)] + others, is_news=True)
    # One of them was there from the start.
    assert tally.has(-1.0, float(len(changes) - 1), FRESH_S)


@given(
    counts=st.lists(st.integers(0, 400), max_size=20),
    news=st.booleans(),
    bound=st.integers(1, 400),
    now_s=st.floats(0, 100),
)
def test_an_engine_that_has_none_has_none_of_ours(counts, news, bound, now_s):
    worker = Worker(bound)
    for count in counts:
        worker.poll(held=count)
    worker.poll(20, held=0, is_news=news)
    assert not worker.tally.has(now_s, worker.now_s, FRESH_S)


def test_one_report_that_some_are_missing_is_not_believed():
    worker = Worker(5).poll(10)
    worker.poll(held=4)
    assert worker.has()
    worker.poll(held=5)
    assert worker.has()


def test_what_is_not_fresh_or_not_said_is_no_sign():
    worker = Worker(3)
    assert not worker.has()
    worker.poll(10)
    assert worker.tally.has(0.0, worker.now_s + FRESH_S, FRESH_S)
    assert not worker.tally.has(0.0, worker.now_s + FRESH_S + 0.1, FRESH_S)
    worker.tally.told(worker.now_s, None, is_news=True)
    assert not worker.has()


def test_an_engine_that_started_anew_has_nothing_of_before():
    worker = Worker(3).poll(10)
    worker.tally.started_anew(worker.now_s)
    worker.poll(10)
    assert not worker.has()
    assert worker.has(worker.now_s - 8)


def test_a_page_that_stands_still_says_nothing_of_who_came_later():
    worker = Worker(2).poll(10)
    came_s = worker.now_s
    worker.ours += 4
    worker.poll(30, is_news=False, held=2)
    assert worker.has(), "it is paused, and counts nothing new"
    assert not worker.has(came_s + 0.5)
    worker.ours = 1
    worker.poll(30, is_news=False, held=2)
    assert worker.has(), "nor does it count who left"


def test_an_idle_engine_that_never_saw_the_request_does_not_have_it():
    worker = Worker(0).poll(3)
    worker.poll(20, is_news=False)
    worker.ours, worker.lost = 1, 1
    worker.poll(30, is_news=False)
    assert not worker.has(23.5)


@given(steps=st.integers(0, 8), gap_s=st.floats(0, 1, exclude_max=True))
def test_one_that_is_lost_soon_is_not_there_although_the_page_stands_still_then(steps, gap_s):
    worker = Worker(0).poll(3)
    bound_s = worker.now_s + gap_s
    worker.ours = 1
    worker.poll(steps)
    worker.lost = 1
    worker.poll()
    worker.poll(30, is_news=False)
    assert not worker.has(bound_s), "the range at the last change may begin before it came"


def test_a_request_within_the_lag_counts_where_all_are_there():
    worker = Worker(0).poll(10)
    worker.ours = 1
    worker.poll(1)
    worker.poll(30, is_news=False)
    assert worker.has(10.5)


@pytest.mark.parametrize("others", [1, 5])
def test_traffic_that_is_not_ours_hides_nothing_and_is_forgotten(others):
    worker = Worker(4, others).poll(10)
    worker.others = 0
    worker.poll(10)
    assert not worker.has(), "it may be theirs that left, or ours"
    worker.poll(int(2 * OTHERS_KEPT_S) + 2)
    assert worker.has()


@given(again_s=st.floats(0.1, 1000), most_s=st.floats(0, 5000))
def test_a_silence_is_kept_in_steps_up_to_its_limit(again_s, most_s):
    kept_s, steps = 0.0, 0
    while more_s := put_off_s(kept_s, again_s, most_s):
        assert 0 < more_s <= again_s
        kept_s += more_s
        steps += 1
        if steps > 100:
            break
    assert kept_s <= most_s * (1 + 1e-9)
    assert steps > 100 or kept_s == pytest.approx(most_s)
