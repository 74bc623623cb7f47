"""An offset finds what did not come through here, whatever lag the engine has, and never more than that."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from brproxy.offsets import Offset, OffsetSettings
from tests.draws import draws

SETTINGS = OffsetSettings(lag_s=6.0, stale_s=5.0, half_life_s=10.0)
CAPACITY = 1_000_000
TOKENS = st.integers(0, 2_000_000)


class Engine:
    """An engine whose gauge is as old as ``lag_s``; ``booked`` and ``foreign`` change by whole seconds."""

    def __init__(self, lag_s):
        self.lag_s = lag_s
        self.held = []

    def holds(self, now_s, kv_tokens):
        self.held.append((now_s, kv_tokens))

    def gauge(self, now_s):
        return next((tokens for at_s, tokens in reversed(self.held) if at_s <= now_s - self.lag_s), 0)


def polled(offset, now_s, booked, used, waiting=0, begun=None):
    """Poll once; return the offset behind that."""
    offset.booked(now_s, booked, booked if begun is None else begun)
    offset.told(now_s, used, waiting)
    return offset.value(now_s, CAPACITY)


@given(
    st.integers(0, 6),
    st.integers(0, 400_000),
    st.lists(st.integers(0, 500_000), min_size=30, max_size=30),
)
@example(6, 5000, [100_000] * 30)
@example(0, 400_000, [0] * 30)
def test_it_is_never_more_than_what_did_not_come_through(lag_s, foreign, booked):
    engine, offset = Engine(lag_s), Offset(SETTINGS)
    for now_s, tokens in enumerate(booked):
        engine.holds(now_s, tokens + foreign)
        value = polled(offset, now_s, tokens, engine.gauge(now_s))
        assert -tokens <= value <= foreign
        if now_s >= lag_s + 6:
            # Once all that the gauge can be of was noted, it is not blamed for its lag.
            assert value >= 0


@given(st.integers(0, 6), st.integers(0, 400_000), st.integers(0, 500_000))
def test_two_polls_after_the_gauge_has_it_all_of_it_is_found(lag_s, foreign, booked):
    engine, offset = Engine(lag_s), Offset(SETTINGS)
    for now_s in range(20):
        engine.holds(now_s, booked)
        assert polled(offset, now_s, booked, engine.gauge(now_s)) <= 0
    values = []
    for now_s in range(20, 20 + lag_s + 2):
        engine.holds(now_s, booked + foreign)
        values.append(polled(offset, now_s, booked, engine.gauge(now_s)))
    assert values[-1] == foreign
    assert not any(values[:-1]), "one poll is none"


@given(st.integers(0, 6), st.integers(0, 400_000), st.integers(0, 400_000))
def test_prompts_that_share_a_prefix_are_less_load(lag_s, booked, shared):
    engine, offset = Engine(lag_s), Offset(SETTINGS)
    held = max(booked - shared, 0)
    for now_s in range(lag_s + 15):
        engine.holds(now_s, held)
        value = polled(offset, now_s, booked, engine.gauge(now_s))
    assert value == held - booked


@pytest.mark.parametrize("waiting", [1, 10, None])
def test_while_requests_wait_in_the_engine_less_than_booked_says_nothing(waiting):
    offset = Offset(SETTINGS)
    for now_s in range(20):
        assert polled(offset, now_s, 50_000, 10_000, waiting) == 0
    for now_s in range(20, 22):
        value = polled(offset, now_s, 50_000, 60_000, waiting)
    assert value == 10_000, "more does"


def test_what_the_engine_has_not_begun_need_not_be_there():
    offset = Offset(SETTINGS)
    for now_s in range(20):
        assert polled(offset, now_s, 50_000, 20_000, begun=20_000) == 0
        assert offset.was_busy is (now_s >= 6)
    for now_s in range(20, 30):
        value = polled(offset, now_s, 50_000, 15_000, begun=20_000)
    assert value == -5000


@given(st.lists(st.tuples(TOKENS, TOKENS, TOKENS, st.none() | st.integers(0, 2)), min_size=1, max_size=40))
def test_it_is_within_its_bounds_whatever_is_said(polls):
    offset = Offset(SETTINGS)
    for now_s, (booked, begun, used, waiting) in enumerate(polls):
        assert -booked <= polled(offset, now_s, booked, used, waiting, begun) <= CAPACITY
        offset.booked(now_s + 0.5, 3, 3)
        assert -3 <= offset.value(now_s + 0.5, 7) <= 7


@given(st.integers(1, 400_000), st.integers(0, 3))
def test_without_reports_it_fades_to_nothing(foreign, booked):
    offset = Offset(SETTINGS)
    for now_s in range(2):
        assert polled(offset, now_s, booked, booked + foreign) == (foreign if now_s else 0)
    values = [offset.value(1 + s, CAPACITY) for s in range(400)]
    assert values[:6] == [foreign] * 6, "good for a while"
    assert values[15] == foreign // 2
    assert all(later <= sooner for sooner, later in pairwise(values))
    assert values[-1] == 0
    # What is told then has nothing to agree with.
    assert polled(offset, 401, booked, booked + foreign) == 0
    assert offset.value(1e18, CAPACITY) == 0


def test_an_engine_that_started_anew_owes_nothing():
    offset = Offset(SETTINGS)
    for now_s in range(2):
        polled(offset, now_s, 0, 900)
    offset.forget()
    assert offset.value(2, CAPACITY) == 0


@draws(20)
@given(st.floats(0.01, 100))
def test_what_it_remembers_is_bounded(interval_s):
    offset = Offset(SETTINGS)
    for n in range(2000):
        offset.booked(n * interval_s, n, n)
    assert len(offset._booked) <= 6 / interval_s + 3
