"""Streams that are silent while their engine has them still, over real sockets with a scripted engine."""

import asyncio

import aiohttp
import orjson
import pytest

from tests.brproxy.conftest import HANG_S
from tests.brproxy.wire import as_chunk

CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}\n\n'
DONE = b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
FAST = {"enabled": True, "interval_s": 0.02, "timeout_s": 60, "lag_s": 0.05, "stale_s": 3600}


class Engine:
    """An engine that streams until its page has been read a few times, and is silent until it goes on."""

    def __init__(self):
        self.running = self.waiting = 0
        self.others = 0
        self.ranks = ("0",)
        self.begins = self.has_page = True
        self.loses = False
        self.pages = 0
        self.silent = asyncio.Event()
        self.goes_on = asyncio.Event()

    def page(self):
        figures = {
            "num_requests_running": self.running + self.others,
            "num_requests_waiting": self.waiting,
            "kv_cache_usage_perc": 0,
        }
        lines = [
            f'vllm:{name}{{engine="{r}"}} {value}' for name, value in figures.items() for r in self.ranks
        ]
        return "\n".join(lines).encode()

    async def script(self, worker, reader, writer):
        while True:
            await worker.read_request(reader)
            if not self.tells(worker.requests[-1], writer):
                break
        self.running += 1
        try:
            await self.stream(writer)
        finally:
            self.running = 0

    def tells(self, head, writer):
        """Answer what the proxy itself asks; return whether it does."""
        if not head.startswith(b"GET "):
            return False
        page, status = b"", b"404 Not Found"
        if head.startswith(b"GET /metrics"):
            self.pages += 1
            if self.has_page:
                page, status = self.page(), b"200 OK"
        writer.write(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(page), page))
        return True

    async def stream(self, writer):
        until = self.pages + 6
        if self.begins:
            writer.write(HEAD + as_chunk(CHUNK))
            while self.has_page and self.pages < until:
                writer.write(as_chunk(CHUNK))
                await asyncio.sleep(0.01)
        if self.loses:
            self.running = 0
        self.silent.set()
        await self.goes_on.wait()
        writer.write((b"" if self.begins else HEAD) + as_chunk(CHUNK) + as_chunk(DONE) + as_chunk(b""))
        await writer.drain()


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def start(engine, raw_worker, start_proxy):
    async def start(**timeouts):
        worker = await raw_worker(engine.script)
        return await start_proxy([worker.url], timeouts={"stall_s": 0.2} | timeouts, telemetry=FAST)

    return start


async def stream(client, proxy):
    """Return what came of a stream, and whether it ended well."""
    async with client.post(proxy.url + "/v1/chat/completions", json=ASK) as response:
        received = b""
        try:
            async for piece in response.content.iter_any():
                received += piece
        except aiohttp.ClientPayloadError:
            return received, False
        return received, True


def kept(proxy):
    return proxy.running.service.groups["default"].signals.silences_kept


def beyond_s(proxy):
    return sum(answer._beyond_s for answer in proxy.running.service.watch.watched())


@pytest.mark.parametrize("waits", [False, True])
async def test_a_stream_that_its_engine_has_is_kept_until_it_goes_on(waits, engine, start, client, until):
    proxy = await start()
    asked = asyncio.create_task(stream(client, proxy))
    await engine.silent.wait()
    if waits:
        # Preempted: it waits, and holds no KV.
        engine.running, engine.waiting = 0, 1
    await until(lambda: beyond_s(proxy) > 0)
    count = kept(proxy)
    await until(lambda: beyond_s(proxy) > 0.5)
    assert kept(proxy) == count >= 1, "once for each silence, however often it is looked at"
    assert not asked.done()
    engine.waiting = 0
    engine.goes_on.set()
    received, is_whole = await asked
    assert is_whole
    assert received.endswith(CHUNK + DONE)
    async with client.get(proxy.url + "/metrics") as response:
        text = await response.text()
    assert f'brproxy_silences_kept_total{{group="default"}} {kept(proxy):.1f}' in text
    await proxy.idle()


async def test_one_that_waits_for_its_first_byte_is_kept(engine, start, client, until):
    engine.begins = False
    proxy = await start(first_byte_s=0.5)
    asked = asyncio.create_task(stream(client, proxy))
    await until(lambda: beyond_s(proxy) > 0.3)
    engine.goes_on.set()
    assert await asked == (CHUNK + DONE, True)


async def test_it_is_kept_for_so_long_and_no_longer(engine, start, client):
    proxy = await start(paused_s_max=0.3)
    received, is_whole = await stream(client, proxy)
    assert not is_whole
    assert b"The worker sent nothing for 0.5 s." in received
    await proxy.idle()


async def is_cut(proxy, client):
    # Before it would have been kept for as long as it may.
    async with asyncio.timeout(HANG_S):
        received, is_whole = await stream(client, proxy)
    await proxy.idle()
    return not is_whole and b"The worker sent nothing for" in received


async def test_one_that_its_engine_has_lost_is_cut(engine, start, client):
    engine.loses = True
    assert await is_cut(await start(), client)


async def test_one_of_an_engine_that_says_nothing_is_cut(engine, start, client):
    engine.has_page = False
    assert await is_cut(await start(), client)


async def test_with_no_time_to_keep_it_is_cut(start, client):
    assert await is_cut(await start(paused_s_max=0), client)


async def test_traffic_that_is_not_ours_does_not_stand_for_it(engine, start, client, until):
    engine.others = 3
    proxy = await start()
    await until(lambda: engine.pages >= 10)
    engine.loses = True
    assert await is_cut(proxy, client)


async def test_ranks_behind_one_url_have_each_their_own(engine, raw_worker, start_proxy, client):
    engine.ranks, engine.loses = ("0", "1"), True
    worker = await raw_worker(engine.script)
    proxy = await start_proxy(
        [], workers=[{"url": worker.url, "ranks": "0-1"}], timeouts={"stall_s": 0.2}, telemetry=FAST
    )
    # The page says the same of both: the other rank has none of ours, so its request is no sign.
    assert await is_cut(proxy, client)


async def test_a_client_that_does_not_read_is_not_kept(engine, raw_worker, start_proxy, client, stack):
    async def flood(worker, reader, writer):
        while True:
            await worker.read_request(reader)
            if not engine.tells(worker.requests[-1], writer):
                break
        engine.running = 1
        writer.write(HEAD)
        while True:
            writer.write(as_chunk(CHUNK * 1000))
            await writer.drain()

    worker = await raw_worker(flood)
    proxy = await start_proxy([worker.url], timeouts={"stall_s": 0.2}, telemetry=FAST)
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.running.port, limit=1024)
    stack.callback(writer.close)
    body = orjson.dumps(ASK)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    await reader.readexactly(10)
    await proxy.idle()
    assert not kept(proxy)
