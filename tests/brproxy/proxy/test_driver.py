"""The driver of a group's rounds: whoever raises, a round comes while anything waits, and all are told."""

import asyncio

import numpy as np
import pytest

from brproxy.clock import MonotonicClock
from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.fleet import Group
from brproxy.happenings import Observer
from brproxy.ledger import Ledger
from brproxy.lifecycle import State
from brproxy.prediction.predictor import make_predictor
from brproxy.proxy.driver import DecisionFailedError, GroupDriver, NoWorkerError, WaitExpiredError
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policy import make_policy
from brproxy.types import PendingRequest

TICK_S = 0.005


def broken(*args):
    raise NotImplementedError


class Clock(MonotonicClock):
    """A clock that can be set ahead."""

    ahead_s = 0.0

    def now_s(self):
        return super().now_s() + self.ahead_s


class Driven(Observer):
    """A driver whose group has workers of ``slots`` slots each, and what it reported."""

    def __init__(self, slots=1, wait_s_max=30.0, workers=1):
        self.dispatcher = Dispatcher(
            Ledger(Roster.of([WorkerLimits(slots)] * workers)),
            make_policy("br-h"),
            make_predictor("survival"),
            np.random.default_rng(0),
            PoolLimits(100, wait_s_max),
        )
        group = Group("a", frozenset(), self.dispatcher)
        self.endings = []
        self.clock = Clock()
        self.driver = GroupDriver(group, self.clock, TICK_S)
        self.dispatcher.happenings.tell(self)

    def ended(self, entry, event, waited_s):
        self.endings.append(entry.state)

    async def serve(self, prompt_tokens=10, hold_s=0.01):
        with self.driver.admit(PendingRequest(prompt_tokens)) as lease:
            if lease.worker_now() is None:
                await lease.worker()
            await asyncio.sleep(hold_s)


class Raising(Observer):
    arrived = bound = retried = ended = decided = broken


@pytest.fixture
def driven():
    made = []

    def make(**settings):
        made.append(Driven(**settings))
        return made[-1]

    yield make
    for each in made:
        each.driver.close()
        ledger = each.dispatcher.ledger
        assert (ledger.bound, len(each.dispatcher.waiting), set(ledger.kv_tokens)) == (0, 0, {0})


@pytest.mark.parametrize("where", ["state", "late", "decide", "alone"])
async def test_a_round_that_raises_is_not_the_last(driven, until, where):
    group = driven()
    dispatcher = group.dispatcher
    owner = {"state": dispatcher.ledger, "decide": dispatcher}.get(where, dispatcher.waiting)
    with group.driver.admit(PendingRequest(1)) as first:
        first.worker_now()
        second = asyncio.create_task(group.serve())
        await asyncio.sleep(0)
        setattr(owner, where, broken)
        await until(lambda: dispatcher.faults.counts["round"] > 2)
        assert len(dispatcher.waiting) == 1
        delattr(owner, where)
    async with asyncio.timeout(5):
        await second
    assert group.endings == [State.FINISHED] * 2


async def test_a_request_is_served_though_every_observer_raises(driven):
    group = driven()
    group.dispatcher.happenings.tell(Raising())
    async with asyncio.timeout(5):
        await asyncio.gather(group.serve(), group.serve(), group.serve())
    assert group.endings == [State.FINISHED] * 3
    assert group.dispatcher.faults.counts == {"observer": 4 * 3}


async def test_a_round_that_fails_half_way_tells_those_that_it_has_bound(driven):
    group = driven(slots=2)
    decide = group.dispatcher.decide

    def decide_and_raise(*args):
        decide(*args)
        raise ValueError

    keep = group.driver.admit(PendingRequest(1))
    with keep:
        keep.worker_now()
        other = group.driver.admit(PendingRequest(1))
        with other:
            other.worker_now()
            tasks = [asyncio.create_task(group.serve()) for _ in range(2)]
            await asyncio.sleep(2 * TICK_S)
            group.dispatcher.decide = decide_and_raise
        async with asyncio.timeout(5):
            await asyncio.gather(*tasks)


async def test_a_poisonous_request_is_told_and_the_others_are_served(driven):
    group = driven(slots=1)
    policy = group.dispatcher.policy
    place, route = policy.place, policy.route
    policy.place = lambda state, prompt, *a: broken() if prompt == 666 else place(state, prompt, *a)
    policy.route = lambda view, rng: broken() if 666 in view.prompt_tokens else route(view, rng)
    async with asyncio.timeout(5):
        results = await asyncio.gather(
            *(group.serve(prompt) for prompt in (5, 666, 7, 666, 9)), return_exceptions=True
        )
        with pytest.raises(DecisionFailedError, match="no worker could be chosen"):
            await group.serve(666)
    assert [type(result) for result in results] == [
        *(type(None), DecisionFailedError, type(None), DecisionFailedError, type(None))
    ]
    assert sorted(state.name for state in group.endings) == ["FAILED"] * 3 + ["FINISHED"] * 3


async def test_who_waits_too_long_is_told(driven):
    group = driven(wait_s_max=0.02)
    async with asyncio.timeout(5):
        first = asyncio.create_task(group.serve(hold_s=0.2))
        await asyncio.sleep(0)
        with pytest.raises(WaitExpiredError, match=r"within 0.02 s"):
            await group.serve()
        await first
    assert group.endings == [State.EXPIRED, State.FINISHED]


async def test_a_wait_of_no_time_ends_all_the_same(driven):
    group = driven(wait_s_max=0.0)
    with group.driver.admit(PendingRequest(1)) as lease:
        lease.worker_now()
        group.clock.ahead_s = 1.0
        with pytest.raises(WaitExpiredError):
            async with asyncio.timeout(5):
                await group.serve()


async def test_a_lost_round_is_noticed_and_revived(driven):
    group = driven()
    first = asyncio.create_task(group.serve(hold_s=0.01))
    await asyncio.sleep(0)
    second = asyncio.create_task(group.serve())
    await asyncio.sleep(0)
    assert not group.driver.is_stuck()
    group.driver._timer.cancel()
    await first
    await asyncio.sleep(3 * TICK_S)
    group.driver.look_after()
    assert not second.done(), "it may yet come"
    group.clock.ahead_s = 2.0
    assert group.driver.is_stuck()
    group.driver.look_after()
    assert not group.driver.is_stuck()
    async with asyncio.timeout(5):
        await second
    assert group.dispatcher.faults.counts == {"round": 1}


async def test_a_request_taken_back_gets_a_round_though_nobody_asks(driven, until):
    group = driven(workers=2)
    with group.driver.admit(PendingRequest(1)) as lease:
        first = lease.worker_now()
        lease.retry()
        assert lease.entry.state is State.PENDING
        await until(lambda: lease.entry.state is State.PREFILL)
        assert lease.worker_now() == 1 - first


async def test_a_booking_that_raises_is_not_the_others_fault(driven):
    group = driven()
    booked = []
    with group.driver.admit(PendingRequest(1)) as lease:
        lease.worker_now()
        for book in (broken, lambda: booked.append(1), broken, lambda: booked.append(2)):
            lease.book_later(book)
        group.driver.catch_up()
    assert booked == [1, 2]
    assert group.dispatcher.faults.counts == {"booking": 2}


async def test_a_client_that_leaves_while_it_waits_is_no_waiter(driven, until):
    group = driven()
    with group.driver.admit(PendingRequest(1)) as lease:
        lease.worker_now()
        waiting = asyncio.create_task(group.serve())
        await until(lambda: group.driver._waiters)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert group.endings == [State.CANCELLED]
        assert not group.driver._waiters
        lease.fail()
    assert group.endings == [State.CANCELLED, State.FAILED]


async def ask(client, proxy, prompt):
    body = {"model": "emulated", "prompt": prompt, "max_tokens": 3}
    async with client.post(proxy.url + "/v1/completions", json=body) as response:
        return response.status, await response.read()


async def test_over_sockets_the_poisonous_get_500_and_the_others_their_answer(
    start_proxy, start_emulator, client
):
    emulator = await start_emulator()
    proxy = await start_proxy(emulator.urls, routing={"policy": "br-h"})
    dispatcher = proxy.groups[0].dispatcher
    place, route = dispatcher.policy.place, dispatcher.policy.route
    dispatcher.policy.place = lambda state, prompt, *a: broken() if prompt == 6 else place(state, prompt, *a)
    dispatcher.policy.route = lambda view, rng: broken() if 6 in view.prompt_tokens else route(view, rng)
    dispatcher.predictor.prospect = dispatcher.predictor.observe = broken
    for length, expected in ((5, 200), (6, 500), (7, 200)):
        status, body = await ask(client, proxy, [1] * length)
        assert status == expected, body
    dispatcher.policy.place = dispatcher.policy.route = broken
    assert (await ask(client, proxy, [1, 2, 3]))[0] == 200, "the least load stands in for it"
    await proxy.idle()
    async with client.get(proxy.url + "/metrics") as response:
        text = await response.text()
    assert 'brproxy_decision_errors_total{group="default",part="policy"}' in text


async def test_readiness_tells_of_a_group_that_waits_for_no_round(
    start_proxy, start_worker, client, silence, until
):
    worker = await start_worker(silence())
    proxy = await start_proxy([worker.url], worker={"slots": 1})
    tasks = [asyncio.create_task(ask(client, proxy, [1])) for _ in range(2)]
    await until(lambda: proxy.waiting == 1)
    driver = next(iter(proxy.running.service.groups.values())).driver
    driver._timer.cancel()
    driver.clock = Clock()
    driver.clock.ahead_s = 60.0
    proxy.running.service.watch.close()
    async with client.get(proxy.url + "/ready") as response:
        assert (response.status, await response.text()) == (
            503,
            "requests wait and no round is due: default\n",
        )
    driver.look_after()
    async with client.get(proxy.url + "/ready") as response:
        assert response.status == 200
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_without_a_healthy_worker_the_wait_ends_with_that_reason(driven):
    group = driven(wait_s_max=0.02)
    group.driver.group.roster.drain("0")
    with pytest.raises(NoWorkerError, match=r"^no worker was healthy within 0.02 s$") as caught:
        async with asyncio.timeout(5):
            await group.serve()
    assert caught.value.reason == "no worker was healthy"


async def test_what_takes_no_slot_waits_for_no_round(driven):
    group = driven()
    with group.driver.admit(PendingRequest(5)) as lease:
        lease.worker_now()
        others = [asyncio.create_task(group.serve()) for _ in range(3)]
        await asyncio.sleep(0)
        with group.driver.admit(PendingRequest(5, sequences=0)) as free:
            assert free.worker_now() == 0
            assert len(group.dispatcher.waiting) == 3
    async with asyncio.timeout(5):
        await asyncio.gather(*others)
    assert group.endings == [State.FINISHED] * 5


async def test_over_sockets_what_generates_nothing_goes_before_those_that_wait_for_a_slot(
    start_proxy, start_worker, client, until, fixed
):
    async def script(writer):
        if worker.requests[-1][0].startswith("GET"):
            writer.write(fixed(b"{}"))
            return True
        return await asyncio.Event().wait()

    worker = await start_worker(script)
    proxy = await start_proxy([worker.url], worker={"slots": 1, "kv_capacity_tokens": 4})
    tasks = [asyncio.create_task(ask(client, proxy, [1, 2, 3])) for _ in range(2)]
    await until(lambda: (proxy.ledger.bound, proxy.waiting) == (1, 1))
    async with asyncio.timeout(5), client.get(proxy.url + "/version") as response:
        assert (response.status, await response.read()) == (200, b"{}")
    assert (proxy.ledger.requests, proxy.waiting) == ((1,), 1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await proxy.idle()
