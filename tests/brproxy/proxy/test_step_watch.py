"""Looks at a group's steps: when a request has ended, once it is time, and with all that has streamed."""

import asyncio

import pytest

from brproxy.clock import MonotonicClock
from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.fleet import Group
from brproxy.ledger import Ledger
from brproxy.lifecycle import Event
from brproxy.prediction.predictor import make_predictor
from brproxy.proxy.driver import GroupDriver
from brproxy.proxy.step_watch import StepWatch
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policy import make_policy
from brproxy.types import PendingRequest
from loadgen.commands.calibration import calibrated_from


class Model:
    """A model of the step that notes when it is asked to look, and what is booked then."""

    step_s = 0.01

    def __init__(self, ledger):
        self.ledger = ledger
        self.due = True
        self.raises = False
        self.looks = []
        self.looked = asyncio.Event()

    def is_due(self, now_s):
        return self.due

    def look(self, at_s, read_s):
        self.looked.set()
        self.looks.append((at_s, read_s, sum(self.ledger.kv_tokens)))
        if self.raises:
            raise ZeroDivisionError


class Service:
    """What a watch knows of a group at work."""

    def __init__(self, group, driver):
        self.group, self.driver = group, driver


class Watched:
    def __init__(self):
        ledger = Ledger(Roster.of([WorkerLimits(8)]))
        limits = PoolLimits(100, 60.0)
        self.dispatcher = Dispatcher(ledger, make_policy("br-0"), make_predictor("survival"), None, limits)
        self.model = Model(ledger)
        group = Group("a", frozenset(), self.dispatcher, steps=self.model)
        self.clock = MonotonicClock()
        self.service = Service(group, GroupDriver(group, self.clock, 0.005))
        self.watch = StepWatch(self.clock)
        self.watch.group_came(self.service)

    def serve(self, event=Event.FINISH, begins=True):
        """Have a request end."""
        with self.service.driver.admit(PendingRequest(10)) as lease:
            lease.worker_now()
            if begins:
                lease.first_token()
            lease.finish(event)


@pytest.fixture
async def watched():
    watched = Watched()
    yield watched
    watched.watch.group_gone(watched.service)
    watched.service.driver.close()


async def test_the_end_of_a_request_is_looked_at_a_little_later(watched):
    driver = watched.service.driver
    other = driver.admit(PendingRequest(100))
    assert other.worker_now() == 0
    watched.watch.look(0.0)
    before_s = watched.clock.now_s()
    watched.serve()
    after_s = watched.clock.now_s()
    # A token of the same step that comes a little later is booked when the ledger is read.
    driver.book_later(lambda: other.tokens(7))
    await watched.model.looked.wait()
    ((at_s, read_s, kv_tokens),) = watched.model.looks
    assert before_s <= at_s <= after_s
    assert read_s - at_s >= 0.25 * watched.model.step_s - 0.001
    assert kv_tokens == 107


@pytest.mark.parametrize(
    ("event", "begins"), [(Event.CANCEL, True), (Event.FAIL, True), (Event.FINISH, False)]
)
async def test_other_ends_are_no_ends_of_steps(watched, event, begins, settled):
    watched.watch.look(0.0)
    watched.serve(event, begins)
    await settled(lambda: len(watched.model.looks))
    assert watched.model.looks == []
    watched.serve()
    await watched.model.looked.wait()


async def test_it_is_looked_at_once_for_each_time_that_is_due(watched, settled):
    watched.serve()
    watched.model.due = False
    watched.watch.look(0.0)
    watched.serve()
    assert await settled(lambda: len(watched.model.looks)) == 0
    watched.model.due = True
    watched.watch.look(0.0)
    for _ in range(5):
        watched.serve()
        watched.watch.look(0.0)
    assert await settled(lambda: len(watched.model.looks)) == 1


async def test_a_look_that_raises_is_a_fault_and_the_next_one_comes(watched):
    watched.model.raises = True
    for number in (1, 2):
        watched.model.looked.clear()
        watched.watch.look(0.0)
        watched.serve()
        await watched.model.looked.wait()
        assert watched.dispatcher.faults.counts["observer"] == number


async def test_a_group_that_has_gone_is_looked_at_no_more(watched, settled):
    watched.watch.look(0.0)
    watched.serve()
    watched.watch.group_gone(watched.service)
    watched.watch.look(0.0)
    watched.serve()
    assert await settled(lambda: len(watched.model.looks)) == 0


async def test_what_is_given_is_shown_and_decided_by(start_emulator, start_proxy, client):
    emulator = await start_emulator(workers=2)
    costs = {"step_base_ms": 20, "step_ns_per_kv_token": 80, "prefill_us_per_token": 15}
    proxy = await start_proxy(emulator.urls, costs=costs | {"prefill_tokens_max": 4096})
    group = proxy.groups[0]
    assert group.dispatcher.costs() == (0.02, pytest.approx(80e-9), pytest.approx(15e-6), 4096, None)
    async with client.get(proxy.url + "/metrics") as response:
        page = await response.text()
    assert 'brproxy_step_base_seconds{group="default"} 0.02\n' in page
    assert 'brproxy_step_base_seconds_error{group="default"} 0.0\n' in page
    assert 'brproxy_step_prefill_tokens_max{group="default"} 4096.0\n' in page
    assert 'brproxy_step_windows{group="default"} 0.0\n' in page


async def test_a_simulation_is_calibrated_by_what_is_shown(start_emulator, start_proxy, client):
    emulator = await start_emulator(workers=3)
    costs = {"step_base_ms": 20, "step_ns_per_kv_token": 80, "prefill_us_per_token": 15}
    worker = {"slots": 5, "kv_capacity_tokens": 7000}
    proxy = await start_proxy(emulator.urls, costs=costs, worker=worker)
    loop = asyncio.get_running_loop()

    async def serve():
        body = {"model": "emulated", "prompt": [7], "max_tokens": 2}
        async with client.post(proxy.url + "/v1/completions", json=body) as response:
            assert response.status == 200

    def pause(_):
        asyncio.run_coroutine_threadsafe(serve(), loop).result()

    found = await asyncio.to_thread(calibrated_from, proxy.url, None, pause)
    assert found.requests_per_s > 0
    cluster = found.cluster
    assert (cluster.workers, cluster.slots, cluster.kv_capacity_tokens) == (3, 5, 7000)
    assert (cluster.step_base_s, cluster.step_s_per_kv_token) == (0.02, pytest.approx(80e-9))
    assert (cluster.prefill_s_per_token, cluster.prefill_tokens_max) == (pytest.approx(15e-6), None)


async def test_what_is_not_known_has_no_series(start_emulator, start_proxy, client):
    emulator = await start_emulator(workers=2)
    proxy = await start_proxy(emulator.urls)
    assert proxy.groups[0].dispatcher.costs() is None
    async with client.get(proxy.url + "/metrics") as response:
        page = await response.text()
    assert 'brproxy_step_windows{group="default"} 0.0\n' in page
    assert "brproxy_step_base_seconds{" not in page


async def test_streams_make_windows(start_emulator, start_proxy, client, until):
    # Fast steps, so that the first windows come soon; how long they are is the machine's.
    emulator = await start_emulator(workers=2, speed=20.0)
    proxy = await start_proxy(emulator.urls)
    steps = proxy.groups[0].steps
    stop = asyncio.Event()

    async def talk(tokens):
        while not stop.is_set():
            body = {"model": "emulated", "prompt": [7] * 50, "max_tokens": tokens, "stream": True}
            async with client.post(proxy.url + "/v1/completions", json=body) as response:
                await response.read()

    tasks = [asyncio.create_task(talk(tokens)) for tokens in (40, 60, 2000, 2000)]
    try:
        await until(lambda: steps.count >= 2)
    finally:
        stop.set()
        await asyncio.gather(*tasks)
    assert steps.step_s > 0
