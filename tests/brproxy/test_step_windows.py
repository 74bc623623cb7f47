"""Windows of steps: what is counted of requests that grow, end, stall and are corrected."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.ledger import Ledger
from brproxy.lifecycle import Event
from brproxy.prediction.predictor import make_predictor
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policy import make_policy
from brproxy.step_windows import HELD_S, Pace, StepWindows
from brproxy.types import PendingRequest, WorkerIndex


class Group:
    """Workers whose windows are looked at, at times that the test says."""

    def __init__(self, workers=2, slots=8):
        self.ledger = Ledger(Roster.of([WorkerLimits(slots)] * workers))
        limits = PoolLimits(1 << 20, 1e9)
        predictor = make_predictor("survival")
        self.dispatcher = Dispatcher(self.ledger, make_policy("least-kv"), predictor, None, limits)
        self.windows = StepWindows(self.ledger)
        self.dispatcher.happenings.tell(self.windows)

    def bind(self, worker, prompt_tokens=100, at_s=0.0, **more):
        """Return the id of a request that is bound and has not begun."""
        request_id = self.dispatcher.arrive(PendingRequest(prompt_tokens, **more), at_s)
        self.dispatcher.bind(request_id, WorkerIndex(worker), at_s)
        return request_id

    def begin(self, worker, prompt_tokens=100, at_s=0.0, **more):
        """Return the id of one whose first token has come."""
        request_id = self.bind(worker, prompt_tokens, at_s, **more)
        self.first(request_id, at_s)
        return request_id

    def first(self, request_id, at_s):
        self.ledger.first_token(request_id, at_s)
        self.ledger.grow(request_id, 1)

    def grow(self, request_ids, tokens):
        for request_id in request_ids:
            self.ledger.grow(request_id, tokens)

    def told(self, at_s):
        """Return the windows until ``at_s``, when the last look is taken."""
        told = self.windows.look(at_s, at_s)
        # What was held, by a look that sees nothing new.
        return told + self.windows.look(at_s, at_s + HELD_S)


def window_of(group, at_s):
    (window,) = group.told(at_s)
    return window


def test_growth_counts_steps():
    group = Group()
    ids = [group.begin(worker, 1000 * (1 + worker)) for worker in (0, 1)]
    group.windows.look(1.0, 1.0)
    group.grow(ids, 20)
    window = window_of(group, 2.0)
    assert (window.duration_s, window.steps) == (1.0, 20)
    assert window.before.tolist() == [1001, 2001]
    assert window.after.tolist() == [1021, 2021]


def test_those_that_come_and_go_between_count_no_steps():
    group = Group()
    stays, goes = group.begin(0), group.begin(1)
    group.windows.look(1.0, 1.0)
    group.grow([stays], 20)
    group.grow([goes], 3)
    group.dispatcher.end(goes, Event.FINISH)
    comes = group.begin(1, at_s=1.5)
    group.grow([comes], 9)
    assert window_of(group, 2.0).steps == 20


@given(st.lists(st.sampled_from([0, 3, 100, -5]), max_size=4))
def test_who_stalls_or_is_corrected_counts_no_steps(odd):
    group = Group(slots=64)
    ids = [group.begin(0) for _ in range(2 * len(odd) + 1)]
    others = [group.begin(1) for _ in odd]
    group.grow(others, 10)
    group.windows.look(1.0, 1.0)
    group.grow(ids, 20)
    for request_id, tokens in zip(others, odd, strict=True):
        group.ledger.grow(request_id, tokens)
    assert window_of(group, 2.0).steps == 20


def test_sequences_side_by_side_count_no_steps():
    group = Group()
    one, several = group.begin(0), group.begin(1, sequences=4)
    group.windows.look(1.0, 1.0)
    group.grow([one], 20)
    group.grow([several], 60)
    assert window_of(group, 2.0).steps == 20


def test_a_window_goes_on_until_it_has_steps():
    group = Group()
    request_id = group.begin(0)
    group.windows.look(1.0, 1.0)
    group.grow([request_id], 1)
    assert group.windows.look(1.5, 1.5) == []
    group.grow([request_id], 1)
    window = window_of(group, 2.0)
    assert (window.duration_s, window.steps) == (1.0, 2)


def test_an_idle_group_has_no_windows():
    group = Group()
    for at_s in range(1, 20):
        assert group.windows.look(float(at_s), float(at_s)) == []
    request_id = group.begin(0, at_s=30.0)
    assert group.windows.look(30.0, 30.0) == []
    group.grow([request_id], 20)
    assert window_of(group, 31.0).duration_s == 1.0


def test_a_window_across_a_change_of_members_is_none():
    group = Group()
    request_id = group.begin(0)
    group.windows.look(1.0, 1.0)
    group.ledger.roster.add("new", WorkerLimits(8))
    group.grow([request_id], 20)
    assert group.told(2.0) == []
    group.grow([request_id], 20)
    window = window_of(group, 3.0)
    assert len(window.members) == len(window.after) == 3


def test_what_waits_in_an_engine_is_no_load_of_a_step():
    group = Group(workers=1, slots=1)
    request_id = group.begin(0, 1000)
    group.bind(0, 500)
    group.windows.look(1.0, 1.0)
    group.grow([request_id], 20)
    assert window_of(group, 2.0).after.tolist() == [1021]


def test_what_is_prefilled_in_chunks_is_no_load_before_it_decodes():
    group = Group(workers=1)
    request_id = group.begin(0, 1000)
    group.bind(0, 5000)
    group.bind(0, 700)
    group.windows.pace = Pace(0.03, 1e-7, (0.0,) * 7, chunk=2048)
    group.windows.look(1.0, 1.0)
    group.grow([request_id], 20)
    assert window_of(group, 2.0).after.tolist() == [1721]


def test_an_offset_is_load():
    group = Group(workers=1)
    request_id = group.begin(0, 1000)
    group.ledger.set_offset(WorkerIndex(0), 300)
    group.windows.look(1.0, 1.0)
    group.grow([request_id], 20)
    assert window_of(group, 2.0).after.tolist() == [1321]


def test_prefills_come_to_the_window_of_their_first_token():
    group = Group()
    stays = group.begin(0, 1000, at_s=0.5)
    group.windows.look(1.0, 1.0)
    group.begin(1, 700, at_s=1.25)
    short = group.begin(0, 300, at_s=1.25)
    group.grow([short], 2)
    group.dispatcher.end(short, Event.FINISH)
    also = group.begin(0, 200, at_s=1.75)
    group.grow([stays], 20)
    (first,) = group.windows.look(2.0, 2.0)
    group.begin(1, 5000, at_s=2.5)
    group.grow([stays, also], 20)
    second = window_of(group, 3.0)
    assert first.prefill_tokens[0] == 900
    assert second.prefill_tokens[0] == 5000


@given(st.lists(st.sampled_from(["begins", "cancelled", "failed over"]), min_size=1, max_size=4))
def test_a_window_is_told_once_nothing_is_left_that_was_bound_and_had_not_begun(becomes):
    group = Group()
    stays = group.begin(0)
    group.windows.look(1.0, 1.0)
    group.grow([stays], 20)
    unbegun = [group.bind(1, 5000, at_s=1.5) for _ in becomes]
    at_s = 2.0
    for request_id, what in zip(unbegun, becomes, strict=True):
        assert group.windows.look(at_s, at_s) == []
        # Who comes later tells nothing of it.
        group.bind(0, 5000, at_s=at_s)
        if what == "begins":
            group.first(request_id, at_s)
        elif what == "cancelled":
            group.dispatcher.end(request_id, Event.CANCEL)
        else:
            group.dispatcher.retry(request_id, at_s)
        at_s += 0.5
    assert group.windows.look(at_s, at_s)[0].between_s == (1.0, 2.0)


def test_a_window_is_held_no_longer_than_that():
    group = Group()
    stays = group.begin(0)
    group.windows.look(1.0, 1.0)
    group.grow([stays], 20)
    group.bind(1, 5000, at_s=1.5)
    assert group.windows.look(2.0, 2.0) == []
    assert group.windows.look(3.0, 1.9 + HELD_S) == []
    assert len(group.windows.look(3.0, 2.0 + HELD_S)) == 1


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(1, 9000), st.floats(1.01, 3.99)), max_size=6),
    st.sampled_from([0.0, 5e-6, 40e-6]),
)
def test_a_window_is_summed_up_again_as_if_the_pace_had_been_known(prefills, s_per_prefill_token):
    pace = Pace(0.03, 1e-7, (s_per_prefill_token,) * 7, chunk=None)
    told = []
    for known in (None, pace):
        group = Group()
        group.windows.pace = known
        stays = group.begin(0)
        group.windows.look(1.0, 1.0)
        for worker, prompt_tokens, at_s in sorted(prefills, key=lambda prefill: prefill[2]):
            group.dispatcher.end(group.begin(worker, prompt_tokens, at_s), Event.FINISH)
        group.grow([stays], 20)
        told.append(window_of(group, 2.0))
    unknown, known = told
    assert unknown.at_pace(pace).prefill_tokens == known.prefill_tokens


def test_what_a_cache_had_is_not_prefilled():
    group = Group(workers=1)
    stays = group.begin(0)
    group.windows.look(1.0, 1.0)
    request_id = group.bind(0, 1000, at_s=1.2)
    entry = group.ledger.entry(request_id)
    entry.home, entry.cached_tokens = entry.worker, 600
    group.first(request_id, 1.5)
    group.grow([stays], 20)
    assert window_of(group, 2.0).prefill_tokens[0] == 400


def test_what_was_cached_may_be_said_until_the_window_is_told():
    group = Group(workers=1)
    stays = group.begin(0)
    group.windows.look(1.0, 1.0)
    request_id = group.begin(0, 1000, at_s=1.5)
    waits = group.bind(0, 500, at_s=1.9)
    group.grow([stays], 20)
    assert group.windows.look(2.0, 2.0) == []
    group.ledger.correct_cached(request_id, 600)
    group.dispatcher.end(request_id, Event.FINISH)
    group.grow([stays], 20)
    group.first(waits, 2.5)
    first = group.windows.look(3.0, 3.0)[0]
    assert first.prefill_tokens[0] == 400


def test_what_is_kept_is_bounded():
    group = Group(workers=1, slots=1)
    for number in range(6000):
        request_id = group.begin(0, at_s=float(number))
        group.dispatcher.end(request_id, Event.FINISH)
        if not number % 100:
            group.windows.look(float(number), float(number))
    assert len(group.windows._prefills) <= 4096


@pytest.mark.parametrize("event", [Event.CANCEL, Event.FAIL])
def test_what_ends_without_a_token_was_not_prefilled(event):
    group = Group()
    stays = group.begin(0)
    group.windows.look(1.0, 1.0)
    group.dispatcher.end(group.bind(1, 9000), event)
    group.grow([stays], 20)
    assert window_of(group, 2.0).prefill_tokens[0] == 0
