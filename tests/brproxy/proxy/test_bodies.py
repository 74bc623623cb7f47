"""Requests' bodies: limits in time, in size for one and for all, and bodies that are no HTTP."""

import asyncio

import orjson
import pytest

from brproxy.proxy.body_room import BodyRoom
from brproxy.proxy.errors import ProxyError
from tests.brproxy.proxy.test_semantics import ASK, CHAT, fixed
from tests.brproxy.wire import as_chunk, post

BOTH_LOOPS = True
CHUNKED = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
UPLOAD = CHUNKED.replace(b"application/json", b"application/octet-stream")


@pytest.fixture
async def served(raw_worker, answering, start_proxy):
    """Return a function that starts a proxy in front of a worker that answers everything."""

    async def start(script=None, **tables):
        worker = await raw_worker(script or answering(*[fixed(b"{}")] * 9))
        return await start_proxy([worker.url], **tables), worker

    return start


async def test_bodies_that_never_come_take_no_place(served, raw):
    proxy, worker = await served(limits={"requests_max": 1}, timeouts={"client_stall_s": 60.0})
    idle = [await raw(proxy) for _ in range(4)]
    for client in idle:
        client.send(CHUNKED, as_chunk(ASK[:10]))
    client = await raw(proxy)
    for _ in range(3):
        client.send(post(CHAT, ASK))
        assert (await client.answer()).status == 200
    assert len(worker.requests) == 3
    # And when one does come it is served.
    idle[0].send(as_chunk(ASK[10:]), b"0\r\n\r\n")
    assert (await idle[0].answer()).status == 200


@pytest.mark.parametrize("start", [CHUNKED, UPLOAD])
@pytest.mark.parametrize("sent", [b"", b"x" * 10, b"x" * (3 << 20)])
async def test_a_client_that_stops_sending_is_told_so(start, sent, served, raw):
    async def read_for_ever(worker, reader, writer):
        while await reader.read(1 << 16):
            pass

    proxy, _ = await served(read_for_ever, timeouts={"client_stall_s": 0.2})
    client = await raw(proxy)
    client.send(start, as_chunk(sent) if sent else b"")
    answer = await client.answer()
    assert (answer.status, answer.one(b"Connection")) == (408, b"close")
    assert "Nothing of the request's body came for 0.2 s." in answer.body.decode()
    await proxy.idle()


@pytest.mark.parametrize("start", [CHUNKED, UPLOAD])
async def test_a_client_that_drips_is_told_so(start, served, raw):
    proxy, _ = await served(timeouts={"client_stall_s": 60.0, "client_body_s": 0.4})
    client = await raw(proxy)
    client.send(start)

    async def drip():
        while True:
            client.send(as_chunk(b"x"))
            await asyncio.sleep(0.01)

    dripping = asyncio.create_task(drip())
    answer = await client.answer()
    dripping.cancel()
    assert (answer.status, "did not come within 0.4 s" in answer.body.decode()) == (408, True)


@pytest.mark.parametrize("start", [CHUNKED, UPLOAD])
@pytest.mark.parametrize("damage", [b"zz\r\nabc\r\n", b"3\r\nabcd\r\n", b"-1\r\n", b"\0"])
async def test_a_chunk_that_is_none_is_a_400_at_once(start, damage, served, raw):
    proxy, worker = await served()
    client = await raw(proxy)
    client.send(start, as_chunk(b"abc"))
    await asyncio.sleep(0.05)
    client.send(damage)
    answer = await client.answer()
    assert (answer.status, answer.one(b"Connection")) == (400, b"close")
    assert worker.requests == []
    await proxy.idle()


async def test_all_bodies_together_have_a_limit(served, raw):
    proxy, _ = await served(
        limits={"bodies_bytes_max": 100_000, "retry_after_s": 7}, timeouts={"client_stall_s": 60.0}
    )
    room = proxy.running.service.body_room
    first = await raw(proxy)
    first.send(CHUNKED, as_chunk(b" " * 90_000))
    while room.taken_bytes < 90_000:
        await asyncio.sleep(0.001)
    second = await raw(proxy)
    body = ASK + b" " * 20_000
    second.send(post(CHAT, body))
    answer = await second.answer()
    assert (answer.status, answer.one(b"Retry-After")) == (429, b"7")
    assert orjson.loads(answer.body)["error"]["type"] == "rate_limit_error"
    first.send(as_chunk(ASK), b"0\r\n\r\n")
    assert (await first.answer()).status == 200
    while room.taken_bytes:
        await asyncio.sleep(0.001)
    second = await raw(proxy)
    second.send(post(CHAT, body))
    assert (await second.answer()).status == 200


async def test_a_client_that_leaves_gives_its_room_back(served, raw):
    proxy, _ = await served()
    client = await raw(proxy)
    client.send(CHUNKED, as_chunk(b"x" * 70_000))
    while not proxy.running.service.body_room.taken_bytes:
        await asyncio.sleep(0.001)
    client.writer.close()
    while proxy.running.service.body_room.taken_bytes:
        await asyncio.sleep(0.001)


def test_room_that_is_not_there_is_not_taken():
    room = BodyRoom(10, 1)
    room.take(7)
    with pytest.raises(ProxyError):
        room.take(4)
    assert room.taken_bytes == 7
    room.give_back(7)
    assert room.taken_bytes == 0
