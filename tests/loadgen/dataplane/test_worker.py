"""The mock worker's wire format, over real sockets."""

import asyncio
import re
import time

import orjson
import pytest

from loadgen.dataplane.check import StreamCheck, Tally
from loadgen.dataplane.message import Message
from loadgen.dataplane.tokens import TOKEN, chunk


class Peer:
    """A client that sees bytes."""

    async def open(self, port):
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port)
        return self

    async def ask(self, method, path, document=None, framing="length"):
        body = b"" if document is None else orjson.dumps(document)
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\n".encode()
        if framing == "chunked":
            self.writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(body) + b"0\r\n\r\n")
        else:
            self.writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        return await self.answer()

    async def answer(self):
        message, body = Message(until_close=True), b""
        while not message.complete:
            body += message.feed(await self.reader.read(65536))
        return message.head.start_line.split()[1], body

    async def close(self):
        self.writer.close()
        await self.writer.wait_closed()


async def until(condition):
    """Wait for a condition; only what never comes fails."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
async def peer(worker, stack):
    peer = await Peer().open(worker[1])
    stack.push_async_callback(peer.close)
    return peer


def request(tokens, **more):
    messages = [{"role": "user", "content": "hi you"}]
    return {"model": "mock-model", "messages": messages, "max_tokens": tokens, **more}


CHAT = "/v1/chat/completions"


async def test_small_things(peer):
    assert await peer.ask("GET", "/health") == (b"200", b"")
    status, models = await peer.ask("GET", "/v1/models")
    assert (status, orjson.loads(models)["data"][0]["id"]) == (b"200", "mock-model")
    assert (await peer.ask("GET", "/nothing"))[0] == b"404"
    status, body = await peer.ask("POST", CHAT, {"messages": []})
    assert (status, orjson.loads(body)["error"]["param"]) == (b"400", "messages")


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_an_answer_that_does_not_stream(peer, framing):
    status, body = await peer.ask("POST", CHAT, request(3), framing)
    document = orjson.loads(body)
    assert (status, document["object"]) == (b"200", "chat.completion")
    assert document["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


async def test_a_stream(peer):
    before_us = time.monotonic() * 1e6
    status, body = await peer.ask(
        "POST", CHAT, request(4, stream=True, stream_options={"include_usage": True})
    )
    assert status == b"200"
    *events, done, end = body.split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    documents = [orjson.loads(event.removeprefix(b"data: ")) for event in events]
    role, *tokens, usage = documents
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 4)
    assert len({document["id"] for document in documents}) == 1
    assert [token["choices"][0]["finish_reason"] for token in tokens] == [None, None, None, "length"]
    words = [token["choices"][0]["delta"]["content"].split() for token in tokens]
    assert [number for number, _ in words] == ["w00000000", "w00000001", "w00000002", "w00000003"]
    assert before_us - 1 <= int(words[0][1]) <= int(words[-1][1]) <= time.monotonic() * 1e6
    assert 240 <= len(events[1]) + 2 <= 250


async def test_each_event_is_a_chunk_of_its_own(worker, peer):
    body = orjson.dumps(request(2, stream=True))
    peer.writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    raw = await peer.reader.readuntil(b"0\r\n\r\n")
    _, _, body = raw.partition(b"\r\n\r\n")
    chunks = re.findall(rb"([0-9a-f]+)\r\n(data: .*?\n\n)\r\n", body)
    assert all(int(size, 16) == len(event) for size, event in chunks)
    assert len(chunks) == len([b"the role", b"token 0", b"token 1", b"[DONE]"])


async def test_a_paced_stream(worker, peer):
    await peer.ask("POST", "/control", {"interval_ms": 10})
    started_s = time.monotonic()
    _, body = await peer.ask("POST", CHAT, request(5, stream=True))
    assert time.monotonic() - started_s >= 0.03
    stamps = [int(stamp) for _, stamp in TOKEN.findall(body)]
    assert len(stamps) == 5
    assert stamps[-1] - stamps[0] >= 30_000
    _, stats = await peer.ask("GET", "/stats")
    stats = orjson.loads(stats)
    assert stats["ticks"] >= 4
    assert stats["skipped"] >= 0


async def test_ticks_that_cannot_be_kept_are_skipped_and_counted(worker, peer):
    engine, _ = worker
    await peer.ask("POST", "/control", {"interval_ms": 5})
    answer = asyncio.create_task(peer.ask("POST", CHAT, request(8, stream=True)))
    await until(lambda: engine.ticks)
    time.sleep(0.03)  # noqa: ASYNC251 the loop has to be held up
    await answer
    assert engine.skipped >= 4


async def test_many_streams_advance_together(worker, stack):
    engine, port = worker
    engine.set_interval(0.2)
    peers = [await Peer().open(port) for _ in range(70)]
    bodies = await asyncio.gather(*(peer.ask("POST", CHAT, request(6, stream=True)) for peer in peers))
    await asyncio.gather(*(peer.close() for peer in peers))
    assert all([int(number) for number, _ in TOKEN.findall(body)] == [*range(6)] for _, body in bodies)
    assert engine.ticks < 70


async def test_a_client_that_leaves_is_forgotten(worker, stack):
    engine, port = worker
    engine.set_interval(0.002)
    leaver, stayer = await Peer().open(port), await Peer().open(port)
    stack.push_async_callback(stayer.close)
    leaving = asyncio.create_task(leaver.ask("POST", CHAT, request(1_000_000, stream=True)))
    await until(lambda: engine._streams)
    leaving.cancel()
    await leaver.close()
    assert len(TOKEN.findall((await stayer.ask("POST", CHAT, request(20, stream=True)))[1])) == 20
    await until(lambda: not engine._streams and not engine._running)


async def test_a_slow_reader_gets_everything(worker, peer):
    tokens = 40_000
    body = orjson.dumps(request(tokens, stream=True))
    peer.writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    engine, _ = worker
    await until(lambda: any(stream.held for stream in engine._streams))
    check = StreamCheck(tokens, Tally(), 0.0)
    while not check.feed(await peer.reader.read(1 << 16), time.monotonic()):
        pass


async def test_a_request_that_comes_early_waits_for_the_stream_before_it(peer):
    first, second = (orjson.dumps(request(n, stream=True)) for n in (3, 2))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n"
    peer.writer.write(head % len(first) + first + head % len(second) + second)
    raw = b""
    while raw.count(b"0\r\n\r\n") < 2:
        raw += await peer.reader.read(65536)
    assert [int(number) for number, _ in TOKEN.findall(raw)] == [0, 1, 2, 0, 1]


async def test_what_is_no_request_ends_the_connection(peer):
    peer.writer.write(b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n")
    assert await peer.reader.read() == b""
