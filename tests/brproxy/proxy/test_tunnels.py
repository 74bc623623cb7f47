"""WebSockets and other upgrades over real sockets: bytes both ways, and every way to end."""

import asyncio

import pytest

from tests.brproxy.wire import get, post

BOTH_LOOPS = True
UPGRADE = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: k")
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nX-W: 1\r\n\r\n"
MIB = 1 << 20


def fixed(body, status=b"200 OK"):
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


async def echo(worker, reader, writer):
    """Accept the upgrade and say everything twice."""
    await worker.read_head(reader)
    writer.write(SWITCHING + b"hello ")
    while data := await reader.read(1 << 16):
        writer.write(data + data)
        await writer.drain()


@pytest.fixture
def upgraded(raw_worker, start_proxy, raw):
    """Return a function that opens a tunnel: the proxy, the worker and the client."""

    async def open_tunnel(script=echo, early=b"", **tables):
        worker = await raw_worker(script)
        proxy = await start_proxy([worker.url], **tables)
        client = await raw(proxy)
        client.send(get("/v1/realtime?model=m", *UPGRADE), early)
        answer = await client.answer()
        assert (answer.status, answer.one(b"Upgrade")) == (101, b"websocket")
        assert (answer.one(b"Connection"), answer.one(b"X-W")) == (b"Upgrade", b"1")
        return proxy, worker, client

    return open_tunnel


async def read_exactly(client, length):
    while len(client.received) < length:
        data = await client.reader.read(1 << 16)
        assert data
        client.received += data
    found, client.received = client.received[:length], client.received[length:]
    return found


async def test_bytes_pass_both_ways(upgraded):
    proxy, worker, client = await upgraded()
    head = worker.requests[0]
    assert b"\r\nUpgrade: websocket\r\n" in head
    assert b"\r\nConnection: Upgrade\r\n" in head
    assert b"\r\nSec-WebSocket-Key: k\r\n" in head
    assert await read_exactly(client, 6) == b"hello "
    for message in (b"a", b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 1000):
        client.send(message)
        assert await read_exactly(client, 2 * len(message)) == message * 2
    assert sum(proxy.ledger.requests) == 1, "a tunnel is booked for as long as it is open"
    client.writer.close()
    await proxy.idle()


async def test_what_the_client_says_before_the_upgrade_is_not_lost(upgraded):
    proxy, _, client = await upgraded(early=b"early")
    assert await read_exactly(client, 16) == b"hello earlyearly"
    client.writer.close()
    await proxy.idle()


async def test_the_client_closes(upgraded, until):
    proxy, worker, client = await upgraded()
    client.send(b"bye")
    client.writer.close()
    await until(lambda: worker.ended == 1)
    await proxy.idle()


async def test_the_worker_closes(upgraded):
    async def script(worker, reader, writer):
        await worker.read_head(reader)
        writer.write(SWITCHING)
        writer.write(b"bye" * 100_000)
        await writer.drain()

    proxy, _, client = await upgraded(script)
    assert await read_exactly(client, 300_000) == b"bye" * 100_000
    assert await client.ended()
    await proxy.idle()


async def test_a_refused_upgrade_leaves_http_behind(raw_worker, start_proxy, raw):
    async def script(worker, reader, writer):
        await worker.read_head(reader)
        writer.write(fixed(b"no", b"403 Forbidden"))
        body = await worker.read_request(reader)
        writer.write(fixed(body))
        await reader.read()

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(get("/v1/realtime", *UPGRADE))
    answer = await client.answer()
    assert (answer.status, answer.body) == (403, b"no")
    client.send(post("/x", b"[1]"))
    assert (await client.answer()).body == b"[1]"
    await proxy.idle()


async def test_nobody_is_upgraded_who_has_not_asked(raw_worker, start_proxy, raw, until):
    worker = await raw_worker(echo)
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(get("/x"))
    assert (await client.answer()).status == 502
    await until(lambda: worker.ended == len(worker.tasks) > 0)
    client.send(get("/health"))
    assert (await client.answer()).body == b"ok\n"
    await proxy.idle()


async def test_an_upgrade_to_anything_else_is_an_ordinary_request(raw_worker, start_proxy, raw):
    async def script(worker, reader, writer):
        while True:
            writer.write(fixed(await worker.read_request(reader)))

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    h2c = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: s")
    for request, body in ((post("/x", b"[1]", *h2c), b"[1]"), (get("/y", *h2c), b""), (get("/z"), b"")):
        client.send(request)
        assert (await client.answer()).body == body
    assert b"pgrade" not in worker.requests[0]
    assert b"HTTP2" not in worker.requests[0]


async def test_both_sides_are_made_to_wait_for_each_other(upgraded):
    go_on = asyncio.Event()

    async def script(worker, reader, writer):
        await worker.read_head(reader)
        writer.write(SWITCHING)
        await go_on.wait()
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()

    proxy, _, client = await upgraded(script)
    sent = await client.fill(64 * MIB)
    assert sent < 64 * MIB
    go_on.set()
    received = 0
    while received < sent:
        received += len(await client.reader.read(1 << 20))
    assert received == sent
    client.writer.close()
    await proxy.idle()


async def test_a_silent_tunnel_is_closed(upgraded, until):
    async def script(worker, reader, writer):
        await worker.read_head(reader)
        await asyncio.sleep(0.05)  # so that the time-out for a first byte counts already
        writer.write(SWITCHING + b"hello ")
        await reader.read()

    proxy, worker, client = await upgraded(script, timeouts={"stall_s": 0.1})
    assert await read_exactly(client, 6) == b"hello "
    assert await client.ended()
    await until(lambda: worker.ended == 1)
    await proxy.idle()
