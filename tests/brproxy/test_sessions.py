"""Who last served a session, and how much of it is probably cached there."""

from itertools import count

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.ledger import Ledger
from brproxy.lifecycle import NO_WORKER, Event
from brproxy.prediction.predictor import make_predictor
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policy import make_policy
from brproxy.sessions import SessionLimits
from brproxy.types import PendingRequest
from tests.brproxy.chats import CLUSTER, Chats, run

EVERY_TOKEN = SessionLimits(block_tokens=1)


def dispatcher_of(limits=EVERY_TOKEN, workers=3, capacity=None, policy="br-0", slots=8):
    roster = Roster(checked=False)
    for name in range(workers):
        roster.add(str(name), WorkerLimits(slots, capacity))
    rng = np.random.default_rng(0)
    pool = PoolLimits(100, 10.0, kv_growth_share=0.0)
    return Dispatcher(
        Ledger(roster), make_policy(policy), make_predictor("survival"), rng, pool, sessions=limits
    )


def bound(dispatcher, prompt_tokens, *keys, now_s=0.0, **said):
    """Have a request come and be bound; return its entry."""
    request = PendingRequest(prompt_tokens, session_keys=keys, **said)
    entry = dispatcher.enter(request, now_s)
    dispatcher.decide(now_s, dispatcher.roster.routable())
    assert entry.worker != NO_WORKER
    return entry


def served(dispatcher, prompt_tokens, *keys, output=0, now_s=0.0, event=Event.FINISH, **said):
    entry = bound(dispatcher, prompt_tokens, *keys, now_s=now_s, **said)
    dispatcher.ledger.grow(entry.id, output)
    dispatcher.end(entry.id, event)
    return entry


def counts(dispatcher):
    sessions = dispatcher.sessions
    return sessions.new, sessions.hits, sessions.moved


@pytest.mark.parametrize("policy", ["br-0", "br-h", "least-kv"])
def test_a_session_goes_to_where_it_was_while_that_is_within_what_is_cached(policy):
    dispatcher = dispatcher_of(policy=policy)
    first = served(dispatcher, 80, 7, output=20)
    for prompt_tokens, cached_tokens in ((150, 100), (200, 150), (200, 199)):
        again = served(dispatcher, prompt_tokens, 7)
        assert (again.worker, again.home, again.cached_tokens) == (first.worker, first.worker, cached_tokens)
    # What others put there makes it heavier than the others by more than the cache is worth.
    dispatcher.bind(dispatcher.arrive(PendingRequest(2000), 0.0), first.worker, 0.0)
    assert bound(dispatcher, 151, 7).worker != first.worker
    assert counts(dispatcher) == (1, 3, 1)


def test_baselines_go_their_own_way():
    dispatcher = dispatcher_of(policy="round-robin")
    assert [served(dispatcher, 80, 7).worker for _ in range(4)] == [0, 1, 2, 0]


def test_whole_blocks_are_cached_and_never_the_last_token():
    dispatcher = dispatcher_of(SessionLimits(block_tokens=16))
    served(dispatcher, 90, 7, output=10)
    assert served(dispatcher, 500, 7).cached_tokens == 96
    assert served(dispatcher, 96, 7).cached_tokens == 80
    assert served(dispatcher, 16, 7).cached_tokens == 0


def test_each_of_several_sequences_has_its_own_output():
    dispatcher = dispatcher_of()
    served(dispatcher, 80, 7, output=40, sequences=4)
    assert served(dispatcher, 500, 7).cached_tokens == 90


def test_the_first_key_that_is_known_counts_and_the_first_is_remembered():
    dispatcher = dispatcher_of()
    first = served(dispatcher, 100, 1)
    second = bound(dispatcher, 200, 3, 2, 1)
    assert (second.home, second.cached_tokens) == (first.worker, 100)
    dispatcher.end(second.id, Event.FINISH)
    assert served(dispatcher, 300, 3, 1).cached_tokens == 200


def test_what_a_session_had_before_is_part_of_a_prompt_that_goes_on():
    dispatcher = dispatcher_of()
    served(dispatcher, 100, 1, output=50)
    entry = bound(dispatcher, 30, 1, goes_on=True)
    assert (entry.prompt_tokens, entry.cached_tokens) == (180, 150)
    assert sum(dispatcher.ledger.kv_tokens) == 180
    assert bound(dispatcher, 30, 2, goes_on=True).prompt_tokens == 30


def test_a_prompt_that_goes_on_is_no_longer_than_a_worker_holds():
    dispatcher = dispatcher_of(capacity=1000)
    served(dispatcher, 700, 1, output=200)
    assert bound(dispatcher, 300, 1, goes_on=True).prompt_tokens == 1000


@pytest.mark.parametrize(
    ("event", "has_begun", "is_known"),
    [
        (Event.FINISH, False, True),
        (Event.CANCEL, True, True),
        (Event.CANCEL, False, False),
        (Event.FAIL, True, False),
    ],
)
def test_what_was_not_computed_is_not_remembered(event, has_begun, is_known):
    dispatcher = dispatcher_of()
    entry = bound(dispatcher, 100, 1)
    if has_begun:
        dispatcher.ledger.first_token(entry.id, 0.0)
    dispatcher.end(entry.id, event)
    assert len(dispatcher.sessions) == is_known


def test_who_never_had_a_worker_teaches_nothing():
    dispatcher = dispatcher_of()
    entry = dispatcher.enter(PendingRequest(100, session_keys=(1,)), 0.0)
    dispatcher.end(entry.id, Event.CANCEL)
    assert len(dispatcher.sessions) == 0
    assert counts(dispatcher) == (0, 0, 0)


def test_sessions_are_few_and_the_least_recently_used_go_first():
    dispatcher = dispatcher_of(SessionLimits(sessions_max=2, block_tokens=1))
    for key in (1, 2, 1, 3):
        served(dispatcher, 100, key)
    assert len(dispatcher.sessions) == 2
    assert [served(dispatcher, 100, key).home != NO_WORKER for key in (1, 3, 2)] == [True, True, False]


def test_sessions_are_forgotten_in_time():
    dispatcher = dispatcher_of(SessionLimits(kept_s=60.0))
    served(dispatcher, 100, 1, now_s=0.0)
    assert served(dispatcher, 100, 1, now_s=60.0).home != NO_WORKER
    assert served(dispatcher, 100, 1, now_s=120.1).home == NO_WORKER


def test_a_cache_holds_no_more_than_a_worker():
    dispatcher = dispatcher_of(workers=1, capacity=1000)
    served(dispatcher, 400, 1)
    bound(dispatcher, 500)
    # 500 are left beside what runs: so much may go through before the session's blocks go.
    served(dispatcher, 500)
    assert bound(dispatcher, 10, 1).home == 0
    served(dispatcher, 50)
    assert bound(dispatcher, 10, 1).home == NO_WORKER


def test_a_worker_that_went_out_has_lost_its_cache():
    dispatcher = dispatcher_of(workers=1)
    (member,) = dispatcher.roster.members
    served(dispatcher, 400, 1)
    for ok in (False, False, False, True):
        dispatcher.roster.record(member, ok=ok, reason="", now_s=0.0)
    assert bound(dispatcher, 400, 1).home == NO_WORKER


def test_another_worker_in_its_place_has_nothing_of_it():
    dispatcher = dispatcher_of(workers=2, policy="least-kv")
    first = served(dispatcher, 400, 1)
    waiting = dispatcher.enter(PendingRequest(400, session_keys=(1,)), 0.0)
    dispatcher.roster.remove(str(first.worker), 0)
    assert dispatcher.sessions.home(waiting) is None
    dispatcher.decide(0.0, dispatcher.roster.routable())
    assert waiting.worker == 1 - first.worker
    dispatcher.roster.add("new", WorkerLimits(8))
    assert bound(dispatcher, 400, 1).home == NO_WORKER


def test_a_home_is_a_place_where_members_have_gone():
    dispatcher = dispatcher_of(workers=3)
    key = next(key for key in count() if served(dispatcher, 400, key).worker == 2)
    dispatcher.roster.remove("0", 0)
    entry = bound(dispatcher, 400, key)
    assert entry.worker == 2
    assert dispatcher.sessions.home(entry).place == 1


def test_a_worker_that_failed_a_request_is_no_home_for_it():
    dispatcher = dispatcher_of()
    first = served(dispatcher, 400, 1)
    again = bound(dispatcher, 400, 1)
    assert again.worker == first.worker
    dispatcher.retry(again.id, 0.0)
    dispatcher.decide(0.0, dispatcher.roster.routable())
    assert again.worker not in (first.worker, NO_WORKER)


def test_without_sessions_keys_change_nothing():
    dispatcher = dispatcher_of(None)
    assert bound(dispatcher, 400, 1).home == NO_WORKER
    assert dispatcher.sessions is None


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(0, 5), st.booleans()), max_size=40))
def test_in_a_burst_each_goes_home_within_its_discount_or_to_the_lightest(requests):
    dispatcher = dispatcher_of(workers=4, slots=100)
    for prompt_tokens, key, ends in requests:
        load = dispatcher.ledger.load()
        entry = bound(dispatcher, prompt_tokens, key)
        if entry.cached_tokens and load[entry.home] <= min(load) + entry.cached_tokens:
            assert entry.worker == entry.home
        else:
            assert load[entry.worker] == min(load)
        if ends:
            dispatcher.end(entry.id, Event.FINISH)


def test_conversations_find_their_caches_for_no_more_imbalance_than_those_are_worth():
    chats = Chats(conversations=120, answered=50.0, thinks_s=5.0)
    without, near = (
        run("br-0", limits, 60.0, chats=chats, cluster=CLUSTER) for limits in (None, SessionLimits())
    )
    assert near.cached_share > 1.5 * without.cached_share
    assert near.imbalance_kv_tokens < without.imbalance_kv_tokens + near.discount_tokens
    assert near.ttft_s < without.ttft_s
