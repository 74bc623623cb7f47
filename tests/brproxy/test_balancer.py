"""The decision core as a library: the guide's example, and that it decides as the proxy does."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.balancer import Assigned, Balancer, PendingRequest, PoolLimits, WorkerLimits
from brproxy.batches import BatchLimits, take_batches
from brproxy.dispatcher import Dispatcher, PoolFullError
from brproxy.ledger import Ledger
from brproxy.lifecycle import Event, LifecycleError
from brproxy.prediction.predictor import make_predictor
from brproxy.registry import UnknownNameError
from brproxy.roster import Roster, RosterError
from brproxy.routing.policy import make_policy
from tests.draws import draws

GUIDE = Path(__file__).parents[2] / "brproxy" / "LIBRARY.md"


def two(slots=1, **more):
    return Balancer({name: WorkerLimits(slots, None) for name in ("a", "b")}, **more)


def test_the_guide_s_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    seen = {}
    exec(compile(code, str(GUIDE), "exec"), seen)
    prompts = [prompt for prompt, _ in seen["went"]]
    # A sample of each first; the second prompt turns out to be the long one.
    assert sorted(prompts[:4]) == [1, 1, 2, 2]
    assert prompts[4:] == [2, 2, 1, 1]
    assert capsys.readouterr().out.endswith("{'rank-0': 0, 'rank-1': 0}\n")


@draws(50)
@given(
    st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 5), st.sampled_from(["", "x"])), max_size=30),
    st.sampled_from(["br-0", "br-h", "least-kv"]),
)
def test_it_decides_as_the_dispatcher_does(asked, policy):
    balancer = two(2, policy=policy)
    dispatcher = Dispatcher(
        Ledger(Roster.of([WorkerLimits(2, None)] * 2)),
        make_policy(policy),
        make_predictor("exact-match"),
        np.random.default_rng(0),
        PoolLimits(),
    )
    take_batches(dispatcher, BatchLimits())
    for step, (tokens, key, batch) in enumerate(asked):
        request = PendingRequest(tokens, prompt_hash=key, batch=batch)
        assert balancer.enter(request, step) == dispatcher.enter(request, step).id
        decided = dispatcher.decide(step, (True, True))
        assert balancer.decide(step) == [Assigned(each.id, "ab"[each.worker]) for each in decided]
        for each in decided:
            dispatcher.ledger.first_token(each.id, step)
            dispatcher.ledger.grow(each.id, 3)
            balancer.grow(each.id, 3, step)
        if step % 3 == 2 and dispatcher.ledger.bound:
            oldest = min(each.id for each in dispatcher.ledger._rows)
            dispatcher.end(oldest, Event.FINISH)
            balancer.end(oldest, step)
        assert tuple(balancer.kv_tokens.values()) == dispatcher.ledger.kv_tokens
        assert tuple(balancer.requests.values()) == dispatcher.ledger.requests
        assert balancer.waiting == dispatcher.waiting.count


def test_who_waits_too_long_is_told():
    balancer = two(pool=PoolLimits(requests_max=4, wait_s_max=10.0))
    ids = [balancer.enter(PendingRequest(10), 0.0) for _ in range(3)]
    assert {each.worker for each in balancer.decide(0.0)} == {"a", "b"}
    assert balancer.decide(5.0) == []
    assert balancer.is_waiting(ids[2])
    assert balancer.decide(11.0) == [Assigned(ids[2], None)]
    assert not balancer.is_waiting(ids[2])
    with pytest.raises(LifecycleError):
        balancer.end(ids[2], 12.0)
    for _ in range(4):
        balancer.enter(PendingRequest(10), 12.0)
    with pytest.raises(PoolFullError):
        balancer.enter(PendingRequest(10), 12.0)


def test_a_worker_that_fails_one_gets_the_next():
    balancer = two()
    balancer.enter(PendingRequest(10), 0.0)
    ((request_id, worker),) = balancer.decide(0.0)
    balancer.retry(request_id, 1.0)
    ((again, other),) = balancer.decide(1.0)
    assert again == request_id
    assert {worker, other} == {"a", "b"}
    balancer.grow(request_id, 1, 2.0)
    with pytest.raises(LifecycleError):
        balancer.retry(request_id, 2.0)


def test_workers_come_and_go():
    balancer = two()
    first = balancer.enter(PendingRequest(10), 0.0)
    ((_, worker),) = balancer.decide(0.0)
    balancer.remove(worker)
    assert balancer.requests[worker] == 1
    balancer.enter(PendingRequest(10), 1.0)
    balancer.enter(PendingRequest(10), 1.0)
    assert {each.worker for each in balancer.decide(1.0)} == {"a", "b"} - {worker}
    balancer.end(first, 2.0)
    assert worker not in balancer.requests
    balancer.add("c", WorkerLimits(1, None))
    assert [each.worker for each in balancer.decide(3.0)] == ["c"]
    with pytest.raises(RosterError):
        balancer.remove(worker)


def test_names_are_checked():
    with pytest.raises(UnknownNameError, match="unknown policy"):
        two(policy="x")
