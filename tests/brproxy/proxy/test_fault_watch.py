"""The proxy as the controller that vLLM's fault tolerance waits for, over real sockets."""

import asyncio
import json
import logging

import pytest
from aiohttp import web

ON = {"enabled": True, "interval_s": 0.02, "timeout_s": 60, "recovery_s": 600, "retry_wait_s": 0.0}
GROUP = 'group="default"'


class Rank:
    """A vLLM server with one engine, which recovers when all that wait are told, unless it works long."""

    def __init__(self, ranks):
        self.ranks = ranks
        self.status = {"id": len(ranks), "status": "healthy"}
        self.told = []
        self.looks = 0
        self.served = 0
        self.refuses = False
        self.is_plain = False
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.works_long = False
        ranks.append(self)

    async def handle(self, request):
        if request.path == "/fault_tolerance/status" and not self.is_plain:
            self.looks += 1
            return web.json_response({"schema_version": 1, "total_engines": 1, "engines": [self.status]})
        if request.path == "/fault_tolerance/apply" and not self.is_plain:
            return self.apply(await request.read(), request.content_type)
        if request.path == "/health":
            return web.Response()
        if request.path != "/v1/completions":
            return web.Response(status=404)
        await self.goes_on.wait()
        self.served += 1
        return web.json_response({"usage": {"prompt_tokens": 1, "completion_tokens": 1}})

    def apply(self, body, media_type):
        assert media_type == "application/json"
        assert self.status["status"] == "unhealthy", "it would refuse"
        if self.refuses:
            self.refuses = False
            return web.Response(status=500)
        self.told.append(json.loads(body))
        number = f"{self.status['id']}-{len(self.told)}"
        waiting = [rank for rank in self.ranks if rank.status["status"] == "unhealthy"]
        if len({len(rank.told) for rank in waiting}) == 1 and not self.works_long:
            for rank in waiting:
                rank.is_now("healthy")
        return web.json_response({"message": "accepted", "request_id": number}, status=202)

    def is_now(self, status, **more):
        self.status = {"id": self.status["id"], "status": status} | more


@pytest.fixture
def start_ranks(stack):
    async def start(count):
        ranks = []
        for _ in range(count):
            rank = Rank(ranks)
            runner = web.ServerRunner(web.Server(rank.handle), shutdown_timeout=0)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            rank.close = runner.cleanup
            rank.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        return ranks

    return start


@pytest.fixture
def start(start_ranks, start_proxy):
    async def start(count, **tables):
        ranks = await start_ranks(count)
        proxy = await start_proxy([rank.url for rank in ranks], **{"fault_tolerance": ON} | tables)
        return ranks, proxy

    return start


async def ask(client, proxy):
    async with client.post(proxy.url + "/v1/completions", json={"prompt": [1], "max_tokens": 1}) as response:
        await response.read()
        return response.status


async def metric(client, proxy, name):
    async with client.get(proxy.url + "/metrics") as response:
        text = await response.text()
    return [
        float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"brproxy_fault_{name}{{")
    ]


def looked_at(until, ranks, looks=3):
    """Wait until each of ``ranks`` has been looked at some times more."""
    seen = [rank.looks for rank in ranks]
    return until(lambda: all(rank.looks >= before + looks for rank, before in zip(ranks, seen, strict=True)))


def routable(proxy):
    return proxy.groups[0].roster.routable()


async def test_ranks_that_wait_are_told_once_together_and_waiting_requests_are_served(
    start, client, until, caplog
):
    caplog.set_level(logging.INFO)
    ranks, proxy = await start(3)
    await looked_at(until, ranks)
    for rank in ranks:
        rank.works_long = True
        rank.goes_on.clear()
    asked = asyncio.create_task(ask(client, proxy))
    await until(lambda: proxy.ledger.bound == 1)
    ranks[0].is_now("unhealthy", fault_info="RuntimeError")
    # Who has not noticed is as good as hung.
    await until(lambda: routable(proxy) == (False, False, False))
    await looked_at(until, ranks)
    assert not any(rank.told for rank in ranks), "they would refuse"
    assert await metric(client, proxy, "active") == [1]
    for rank in ranks:
        rank.is_now("unhealthy", fault_info="RuntimeError")
    await until(lambda: all(rank.told for rank in ranks))
    await looked_at(until, ranks)
    assert [rank.told for rank in ranks] == [[{"instruction": "retry", "params": {}}]] * 3
    # What hung in a rank waits in the proxy, and nobody is told off.
    assert (proxy.waiting, proxy.ledger.bound, asked.done()) == (1, 0, False)
    for rank in ranks:
        rank.goes_on.set()
        rank.is_now("healthy")
    assert await asked == 200
    await until(lambda: routable(proxy) == (True, True, True))
    await looked_at(until, ranks)
    counted = [
        await metric(client, proxy, f"{name}_total") for name in ("incidents", "retries", "recoveries")
    ]
    assert (counted, await metric(client, proxy, "active")) == ([[1], [1], [1]], [0])
    said = [record.getMessage() for record in caplog.records if "group default: " in record.getMessage()]
    assert said == [
        "group default: a rank has failed; of its servers 2 healthy, 1 unhealthy: RuntimeError",
        "group default: nobody is healthy: all that wait retry; of its servers 3 unhealthy: RuntimeError",
        "group default: the fault is over; of its servers 3 healthy",
    ]


async def test_a_dead_rank_is_out_whatever_its_check_answers_and_comes_back(start, client, until):
    ranks, proxy = await start(2, health=True)
    ranks[0].is_now("dead")
    await until(lambda: routable(proxy) == (False, True))
    reason = proxy.groups[0].roster.member(0).health.reason
    assert reason == "says that it is dead"
    await looked_at(until, ranks, 10)
    assert routable(proxy) == (False, True)
    assert [await ask(client, proxy) for _ in range(3)] == [200] * 3
    assert [rank.served for rank in ranks] == [0, 3]
    ranks[0].is_now("healthy")
    await until(lambda: routable(proxy) == (True, True))
    assert not any(rank.told for rank in ranks)


async def test_beside_a_dead_rank_the_living_are_told(start, until):
    ranks, proxy = await start(3)
    ranks[0].is_now("dead")
    for rank in ranks[1:]:
        rank.is_now("unhealthy")
    await until(lambda: routable(proxy) == (False, True, True))
    assert [len(rank.told) for rank in ranks] == [0, 1, 1]


async def test_beside_a_server_that_is_gone_the_others_are_told(start, until):
    ranks, _ = await start(3)
    await ranks[0].close()
    for rank in ranks[1:]:
        rank.is_now("unhealthy")
    await until(lambda: all(rank.told for rank in ranks[1:]))


async def test_a_retry_that_one_rank_did_not_take_is_made_again(start, client, until, caplog):
    ranks, proxy = await start(2)
    ranks[1].refuses = True
    for rank in ranks:
        rank.is_now("unhealthy")
    await until(lambda: ranks[0].told)
    await looked_at(until, ranks)
    assert (len(ranks[0].told), ranks[1].told) == (1, []), "it is at work still"
    ranks[0].is_now("unhealthy", last_ft_request_id="0-1", ft_error="timed out")
    # What it was told before counts no more: both are told anew.
    ranks[0].told.clear()
    await until(lambda: routable(proxy) == (True, True))
    assert [len(rank.told) for rank in ranks] == [1, 1]
    assert await metric(client, proxy, "retries_total") == [2]
    assert await metric(client, proxy, "retries_failed_total") == [1]
    assert f"worker {ranks[1].url} did not take the retry: /fault_tolerance/apply answers 500" in caplog.text


async def test_what_cannot_be_helped_is_given_up_and_told_nothing_more(start, client, until, caplog):
    ranks, proxy = await start(2, fault_tolerance=ON | {"recovery_s": 0.01})
    ranks[0].is_now("unhealthy")
    await until(lambda: "the fault is given up, its workers have to be started anew" in caplog.text)
    ranks[1].is_now("unhealthy")
    await looked_at(until, ranks)
    assert not any(rank.told for rank in ranks)
    assert await metric(client, proxy, "given_up_total") == [1]


async def test_a_worker_without_fault_tolerance_serves_and_is_named_once(start, client, until, caplog):
    ranks, proxy = await start(2)
    ranks[0].is_plain = True
    await looked_at(until, ranks[1:], 10)
    assert await ask(client, proxy) == 200
    assert caplog.text.count(f"worker {ranks[0].url} does not tell of faults") == 1
    assert routable(proxy) == (True, True)
    assert "/fault_tolerance/status answers 404" in caplog.text


async def test_a_look_that_fails_is_not_the_last(start, until, caplog, monkeypatch):
    ranks, proxy = await start(2)
    service = proxy.running.service.groups["default"]
    with monkeypatch.context() as patch:
        patch.setattr(type(service), "accuse", lambda *_: 1 / 0)
        await until(lambda: "looking for faults of group default failed" in caplog.text)
    ranks[0].is_now("dead")
    await until(lambda: routable(proxy) == (False, True))


@pytest.mark.parametrize("tables", [{"fault_tolerance": {}}, {"worker": {"engine": "sglang"}}])
async def test_nobody_is_asked_unless_that_is_on_and_the_engine_has_it(tables, start, client, settled):
    ranks, proxy = await start(1, **tables)
    await settled(lambda: ranks[0].looks)
    assert ranks[0].looks == 0
    assert await metric(client, proxy, "active") == []
