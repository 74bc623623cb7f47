"""Comments of the proxy's own to clients whose stream has not begun, over real sockets."""

import asyncio
import gc
import socket

import pytest

from brproxy.proxy.commented import COMMENT
from brproxy.relay.server import ClientProtocol
from tests.brproxy.proxy.test_garbage import what_only_the_collector_frees
from tests.brproxy.proxy.test_semantics import ASK, CHAT, CHUNK, CHUNKED_STREAM, DONE, chunks, fixed
from tests.brproxy.proxy.test_words import DEAD
from tests.brproxy.proxy.waiting_clients import (
    BY_HAND,
    JSON,
    OFTEN,
    REFUSED,
    SERVED,
    Script,
    comments,
)
from tests.brproxy.wire import as_chunk, post

BOTH_LOOPS = True


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_while_it_prefills_and_nothing_from_there_on(version, start_commented, raw):
    script = Script(SERVED)
    proxy, _ = await start_commented(script, **OFTEN)
    client = await raw(proxy)
    client.send(post(CHAT, ASK, version=version))
    await comments(client, 3)
    script.go_on.set()
    answer = await client.answer()
    assert (answer.status, answer.one(b"Content-Type")) == (200, b"text/event-stream; charset=utf-8")
    assert answer.body.replace(COMMENT, b"") == CHUNK + DONE
    assert answer.body.endswith(COMMENT + CHUNK + DONE)
    assert answer.framing == ("close" if version == "1.0" else "chunked")
    assert answer.one(b"X-Request-Id")
    await proxy.idle()


async def test_while_it_waits_in_the_pool(start_commented, raw):
    script = Script(SERVED, SERVED)
    proxy, _ = await start_commented(
        script, worker={"slots": 1}, routing={"policy": "br-0"}, timeouts=OFTEN["timeouts"]
    )
    first, second = await raw(proxy), await raw(proxy)
    first.send(post(CHAT, ASK))
    await script.asked.wait()
    second.send(post(CHAT, ASK))
    await comments(second, 2)
    assert proxy.waiting == 1
    script.go_on.set()
    for client in (first, second):
        assert (await client.answer()).body.replace(COMMENT, b"") == CHUNK + DONE
    await proxy.idle()


@pytest.mark.parametrize("length", [False, True])
async def test_a_worker_s_long_silence_between_tokens_gets_none(length, start_commented, raw, commented):
    """``length``: its stream has a Content-Length, which the client's, with comments ahead, cannot have."""
    stream = CHUNK * 2 + DONE
    go_on = asyncio.Event()

    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(stream)
            + CHUNK
            if length
            else CHUNKED_STREAM + as_chunk(CHUNK)
        )
        await go_on.wait()
        writer.write(CHUNK + DONE if length else chunks(CHUNK, DONE))
        await reader.read()

    proxy, _ = await start_commented(script, **BY_HAND)
    client = await raw(proxy)
    client.send(post(CHAT, ASK))
    while CHUNK not in client.received:
        client.received += await client.reader.read(1 << 16)
    commented[0]._comment()
    go_on.set()
    assert (await client.answer()).body == stream
    await proxy.idle()


TURNED_DOWN = {
    "503": fixed(b"full", status=b"503 Busy"),
    "event": CHUNKED_STREAM + chunks(REFUSED, DONE),
    "cut": None,
    "cut in its head": b"HTTP/1.1 200",
    "cut in its first event": CHUNKED_STREAM + as_chunk(CHUNK[:9]) + b"zz\r\n",
    "dead": fixed(DEAD, JSON, status=b"500 Internal Server Error"),
    "dead in its stream": CHUNKED_STREAM + chunks(b"data: " + DEAD + b"\n\n", DONE),
}


@pytest.mark.parametrize("when", ["before", "after", "both"])
@pytest.mark.parametrize("turned_down", TURNED_DOWN.values(), ids=TURNED_DOWN)
async def test_the_request_still_moves(turned_down, when, start_commented, raw, commented):
    first, second = Script(turned_down, None), Script(SERVED)
    if turned_down == b"HTTP/1.1 200":

        async def first_script(worker, reader, writer):
            await worker.read_request(reader)
            first.asked.set()
            await first.go_on.wait()
            writer.write(turned_down)

    else:
        first_script = first
    proxy, workers = await start_commented(first_script, second, **BY_HAND)
    client = await raw(proxy)
    client.send(post(CHAT, ASK))
    await first.asked.wait()
    said = 0
    if when in {"before", "both"}:
        commented[0]._comment()
        said += 1
    first.go_on.set()
    await second.asked.wait()
    if when in {"after", "both"}:
        commented[0]._comment()
        said += 1
    second.go_on.set()
    answer = await client.answer()
    assert (answer.status, answer.body) == (200, COMMENT * said + CHUNK + DONE)
    assert [len(worker.requests) for worker in workers] == [1, 1]
    await proxy.idle()


ANSWERS = {
    "reply": (b"200 OK", b"application/json"),
    "error": (b"400 Bad Request", b"application/json"),
    "may tell death": (b"500 Oops", b"application/json"),
}


@pytest.mark.parametrize(("status", "media_type"), ANSWERS.values(), ids=ANSWERS)
async def test_no_comment_comes_between_a_head_of_another_form_and_its_body(
    status, media_type, start_commented, raw, commented
):
    go_on = asyncio.Event()

    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(b"HTTP/1.1 %b\r\nContent-Type: %b\r\nContent-Length: 2\r\n\r\n" % (status, media_type))
        await go_on.wait()
        writer.write(b"{}")
        await reader.read()

    # Two of them: an error may be told by a dead engine only where another could take the request.
    proxy, _ = await start_commented(script, script, **BY_HAND)
    client = await raw(proxy)
    client.send(post(CHAT, ASK))
    while not commented or commented[0]._sink.client.followed_by is None:
        await asyncio.sleep(0)
    answer = commented[0]._sink.client.followed_by
    while answer._kind is None:
        await asyncio.sleep(0.001)
    commented[0]._comment()
    go_on.set()
    got = await client.answer()
    assert (b"%d %b" % (got.status, got.reason), got.body) == (status, b"{}")
    await proxy.idle()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, b'{"model":"m","messages":[]}'),
        (CHAT, b'{"model":"m","messages":[],"stream":false}'),
        ("/v1/embeddings", b'{"model":"m","input":"x","stream":true}'),
        ("/v1/audio/speech", b'{"model":"m","input":"x","stream":true}'),
        ("/v1/unknown", b'{"model":"m","stream":true}'),
    ],
)
async def test_only_who_waits_for_events_gets_them(path, body, start_commented, raw, commented, settled):
    script = Script(fixed(b"{}"))
    proxy, _ = await start_commented(script, **OFTEN)
    client = await raw(proxy)
    client.send(post(path, body))
    await script.asked.wait()
    await asyncio.sleep(0.1)
    assert not commented
    script.go_on.set()
    assert (await client.answer()).body == b"{}"


async def test_without_the_key_there_are_none(start_commented, raw, commented):
    script = Script(SERVED)
    proxy, _ = await start_commented(script)
    client = await raw(proxy)
    client.send(post(CHAT, ASK))
    await script.asked.wait()
    script.go_on.set()
    assert (await client.answer()).body == CHUNK + DONE
    assert not commented


async def test_a_client_that_does_not_read_is_told_no_more(start_commented, raw, commented, transports):
    script = Script(SERVED)
    proxy, _ = await start_commented(script, timeouts=BY_HAND["timeouts"] | {"drain_s": 0.1})
    client = await raw(proxy, receive_bytes=1 << 16)
    client.writer.transport.pause_reading()
    client.send(post(CHAT, ASK))
    await script.asked.wait()
    (transport,) = transports[ClientProtocol]
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    said = 0
    while not commented[0]._sink.client.is_paused:
        commented[0]._comment()
        said += 1
        assert said < 1_000_000, "it is never paused"
        if said % 64 == 0:
            # uvloop writes at the end of a turn.
            await asyncio.sleep(0)
    kept_bytes = transport.get_write_buffer_size()
    for _ in range(1000):
        commented[0]._comment()
    assert transport.get_write_buffer_size() == kept_bytes
    script.go_on.set()
    client.writer.transport.resume_reading()
    received = bytearray()
    while not received.endswith(DONE + b"\r\n0\r\n\r\n"):
        received += await client.reader.read(1 << 16)
    assert received.count(COMMENT) == said
    await proxy.idle()


async def test_who_leaves_while_it_waits_leaves_nothing(start_commented, raw, commented):
    script = Script(SERVED)
    proxy, _ = await start_commented(script, **OFTEN)
    client = await raw(proxy)
    client.send(post(CHAT, ASK))
    await comments(client)
    client.writer.transport.abort()
    await proxy.idle()
    assert commented[0]._timer is None


async def test_a_page_may_read_them_and_nothing_is_compressed(start_commented, raw):
    script = Script(SERVED)
    proxy, workers = await start_commented(
        script,
        listen={"port": 0, "cors_origins": ["https://a.example"]},
        estimate={"ask_usage": False},
        **OFTEN,
    )
    client = await raw(proxy)
    client.send(post(CHAT, ASK, "Origin: https://a.example", "Accept-Encoding: gzip"))
    await comments(client)
    script.go_on.set()
    answer = await client.answer()
    assert answer.one(b"Access-Control-Allow-Origin") == b"https://a.example"
    assert b"\r\nAccept-Encoding: identity\r\n" in workers[0].requests[0]


async def test_they_leave_nothing_to_collect(start_commented, raw):
    script = Script(*[SERVED] * 4)
    proxy, _ = await start_commented(script, **OFTEN)
    client = await raw(proxy)
    gc.disable()
    try:
        for request in range(4):
            if request == 1:
                gc.collect()
            script.go_on.clear()
            client.send(post(CHAT, ASK))
            await comments(client)
            script.go_on.set()
            await client.answer()
            await proxy.idle()
        assert what_only_the_collector_frees() == set()
    finally:
        gc.enable()
