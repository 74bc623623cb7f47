"""Clients that stop reading or leave, in every phase, and workers that do: over real sockets."""

import asyncio
import socket

import pytest

from brproxy.proxy.exchange.client_sink import ClientSink
from brproxy.relay.server import ClientProtocol
from tests.brproxy.wire import WireError, as_chunk, get, post

BOTH_LOOPS = True
CHAT = "/v1/chat/completions"
ASK = b'{"model":"m","stream":true,"messages":[]}'
CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":" x"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
MIB = 1 << 20


PHASES = {
    "before the head": b"",
    "in the head": b"HTTP/1.1 200 OK\r\n",
    "before the first event": STREAM,
    "in the first event": STREAM + as_chunk(CHUNK[:9]),
    "in mid-stream": STREAM + as_chunk(CHUNK),
    "in an event": STREAM + as_chunk(CHUNK + CHUNK[:9]),
    "in a chunk": STREAM + as_chunk(CHUNK)[:9],
    "in a reply": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
}


@pytest.fixture(params=PHASES.values(), ids=PHASES.keys())
def silent(request):
    """Return a script that begins to answer and then only waits for the end of the connection."""

    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(request.param)
        await reader.read()

    return script


@pytest.mark.parametrize("reset", [True, False])
async def test_leaving_ends_the_workers_connection(reset, silent, raw_worker, start_proxy, raw, until):
    worker = await raw_worker(silent)
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(post(CHAT, ASK))
    await until(lambda: worker.requests)
    await asyncio.sleep(0.01)
    client.writer.transport.abort() if reset else client.writer.close()
    await until(lambda: worker.ended == 1)
    await proxy.idle()


async def test_leaving_while_another_request_runs(raw_worker, start_proxy, raw, until):
    async def script(worker, reader, writer):
        await worker.read_request(reader)
        await reader.read()

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url], worker={"slots": 1})
    first, second = await raw(proxy), await raw(proxy)
    first.send(post(CHAT, ASK))
    await until(lambda: worker.requests)
    second.send(post(CHAT, ASK))
    await until(lambda: proxy.waiting == 1)
    second.writer.close()
    await until(lambda: proxy.waiting == 0)
    assert (len(worker.requests), worker.ended) == (1, 0)
    first.writer.close()
    await proxy.idle()


async def test_leaving_while_the_proxy_connects(start_proxy, raw, until, monkeypatch):
    async def never(*_, **__):
        await asyncio.Event().wait()

    proxy = await start_proxy(["http://127.0.0.1:9"])
    client = await raw(proxy)
    client.send(get("/health"))
    await client.answer()
    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", never, raising=False)
    client.send(post(CHAT, ASK))
    await until(lambda: sum(proxy.ledger.requests) == 1)
    client.writer.close()
    await proxy.idle()


async def test_leaving_a_flood(raw_worker, start_proxy, raw, until):
    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(STREAM)
        while True:
            writer.write(as_chunk(CHUNK * 20))
            await writer.drain()
            await asyncio.sleep(0)

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url])
    for number in range(1, 21):
        client = await raw(proxy)
        client.send(post(CHAT, ASK))
        await client.reader.readexactly(100)
        client.writer.transport.abort()
        await until(lambda number=number: worker.ended == number)
    await proxy.idle()


async def test_clients_that_do_not_read_stop_their_workers(
    raw_worker, start_proxy, raw, until, settled, transports
):
    sent = []

    async def script(worker, reader, writer):
        await worker.read_request(reader)
        mine = len(sent)
        sent.append(0)
        writer.write(STREAM)
        while sent[mine] < 64 * MIB:
            payload = CHUNK * 1000
            writer.write(as_chunk(payload))
            await writer.drain()
            await asyncio.sleep(0)
            sent[mine] += len(payload)

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url])
    clients = [await raw(proxy, receive_bytes=1 << 16) for _ in range(4)]
    for client in clients:
        client.send(post(CHAT, ASK))
        await client.reader.readexactly(10)
    before = await settled(lambda: list(sent))
    assert len(sent) == 4
    assert max(sent) < 40 * MIB, "only buffers of sockets were filled"
    held = [transport.get_write_buffer_size() for transport in transports[ClientProtocol]]
    assert max(held) < MIB, "the proxy holds one read of each"
    received = 0
    while sent[0] < before[0] + MIB:
        received += len(await clients[0].reader.read(MIB))
    assert sent[1:] == before[1:]
    for client in clients:
        client.writer.transport.abort()
    await until(lambda: worker.ended == 4)
    await proxy.idle()


async def test_a_reply_that_waits_for_its_client_keeps_no_worker(raw_worker, start_proxy, raw):
    body = bytes(range(256)) * (8 * MIB // 256)
    go_on = asyncio.Event()

    async def script(worker, reader, writer):
        while True:
            request = await worker.read_request(reader)
            answer = body if b"large" in request else b"small"
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)
            await writer.drain()
            go_on.set()

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url])
    slow, other = await raw(proxy), await raw(proxy)
    slow.writer.transport.pause_reading()
    slow.send(post("/x", b'"large"'))
    await asyncio.sleep(0.1)
    slow.writer.transport.resume_reading()
    assert (await slow.answer()).body == body
    for _ in range(3):
        other.send(post("/x", b'"small"'))
        assert (await asyncio.wait_for(other.answer(), 60)).body == b"small"
    await proxy.idle()


async def test_a_client_that_pauses_at_the_last_write_of_all_keeps_no_worker(
    raw_worker, start_proxy, raw, until, transports, monkeypatch
):
    piece = bytes(1 << 15)
    sent, passed = 0, 0
    pass_on = ClientSink.pass_on

    def counting(self, payload):
        nonlocal passed
        passed += len(payload)
        pass_on(self, payload)

    monkeypatch.setattr(ClientSink, "pass_on", counting)

    async def script(worker, reader, writer):
        nonlocal sent
        await worker.read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        to_client = transports[ClientProtocol][0]
        to_client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        # One piece at a time until the kernel takes no more: that much does not pause the client yet.
        while not to_client.get_write_buffer_size():
            sent += len(piece)
            writer.write(as_chunk(piece))
            await until(lambda total=sent: passed == total)
        # From now on any byte does, and what comes next is the end.
        to_client.set_write_buffer_limits(high=to_client.get_write_buffer_size())
        assert not to_client.get_protocol().writing_paused
        writer.write(as_chunk(piece) + b"0\r\n\r\n")
        await worker.read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecond")
        await reader.read()

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url])
    slow, other = await raw(proxy, receive_bytes=1 << 12), await raw(proxy)
    slow.writer.transport.pause_reading()
    slow.send(get("/x"))
    await until(lambda: sum(proxy.ledger.requests))
    await proxy.idle()
    assert transports[ClientProtocol][0].get_protocol().writing_paused
    other.send(get("/x"))
    assert (await asyncio.wait_for(other.answer(), 60)).body == b"second"
    assert len(worker.tasks) == 1, "the connection to the worker was used again"
    slow.writer.transport.resume_reading()
    assert (await slow.answer()).body == bytes(sent + len(piece))
    await proxy.idle()


async def test_pipelined_replies_wait_for_a_client_that_does_not_read(raw_worker, start_proxy, raw, settled):
    async def script(worker, reader, writer):
        while True:
            await worker.read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % MIB + bytes(MIB))
            await writer.drain()

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.writer.transport.pause_reading()
    client.send(get("/x") * 30)
    assert await settled(lambda: len(worker.requests)) < 20, "what is not read is not asked for"
    client.writer.transport.resume_reading()
    for _ in range(30):
        assert len((await client.answer()).body) == MIB
    await proxy.idle()


@pytest.mark.parametrize("reset", [True, False])
async def test_a_worker_that_dies_in_mid_stream(reset, raw_worker, start_proxy, raw):
    came = asyncio.Event()

    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(STREAM + as_chunk(CHUNK) + as_chunk(CHUNK[:9]))
        await came.wait()
        writer.transport.abort() if reset else writer.close()

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(post(CHAT, ASK))
    while as_chunk(CHUNK) not in client.received:
        client.received += await client.reader.read(1 << 16)
    came.set()
    with pytest.raises(WireError, match="chunked body"):
        await client.answer()
    assert as_chunk(CHUNK) in client.received
    assert b"broke off before it was complete" in client.received
    await proxy.idle()


async def test_a_kept_connection_that_was_closed_is_replaced(raw_worker, start_proxy, raw):
    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(STREAM + as_chunk(CHUNK + DONE) + b"0\r\n\r\n")
        await worker.read_head(reader)
        writer.transport.abort()

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url], limits={"retries_max": 0})
    client = await raw(proxy)
    for _ in range(4):
        client.send(post(CHAT, ASK))
        assert (await client.answer()).body == CHUNK + DONE
    assert len(worker.tasks) == 4
    await proxy.idle()
