"""Bodies that clients send, over real sockets: in chunks, large, slow, too large, answered early."""

import asyncio
import gc
import tracemalloc

import orjson
import pytest

from tests.brproxy.wire import WireError, as_chunk, post

BOTH_LOOPS = True
CHAT = "/v1/chat/completions"
FILES = "/v1/files"
AUDIO = "audio/wav"
MIB = 1 << 20
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def chunked_post(path, media_type="application/json"):
    lines = [f"POST {path} HTTP/1.1", "Host: h", "Transfer-Encoding: chunked", f"Content-Type: {media_type}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


@pytest.fixture
def noting():
    """Return a script that reads requests, notes their bodies and answers them."""

    def make(bodies, chunked=False):
        async def script(worker, reader, writer):
            while True:
                bodies.append(await (worker.read_chunks if chunked else worker.read_request)(reader))
                writer.write(OK)

        return script

    return make


async def test_a_chunked_upload_of_json_gets_a_length(raw_worker, start_proxy, raw, noting):
    worker = await raw_worker(noting(bodies := []))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    for _ in range(2):
        client.send(chunked_post(CHAT), as_chunk(b'{"model":"m"'))
        await asyncio.sleep(0.01)
        client.send(as_chunk(b"}"), b"0\r\nX-Trailer: t\r\n\r\n")
        assert (await client.answer()).status == 200
    assert bodies == [b'{"model":"m"}'] * 2
    await proxy.idle()


@pytest.mark.parametrize("size", [MIB - 1, MIB, MIB + 1, 3 * MIB])
async def test_large_uploads_with_a_length_pass_unchanged(size, raw_worker, start_proxy, raw, noting):
    worker = await raw_worker(noting(bodies := []))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    body = bytes(range(256)) * (size // 256 + 1)
    client.send(post(FILES, body[:size], media_type=AUDIO))
    assert (await client.answer()).status == 200
    assert bodies == [body[:size]]
    await proxy.idle()


async def test_large_chunked_uploads_pass_in_chunks(raw_worker, start_proxy, raw, noting):
    worker = await raw_worker(noting(bodies := [], chunked=True))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    piece = bytes(range(256)) * 1024
    for _ in range(2):
        client.send(chunked_post(FILES, AUDIO), *[as_chunk(piece)] * 9, b"0\r\n\r\n")
        assert (await client.answer()).status == 200
    assert bodies == [piece * 9] * 2
    await proxy.idle()


async def test_large_json_is_read_whole(raw_worker, start_proxy, raw, noting):
    worker = await raw_worker(noting(bodies := []))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    body = orjson.dumps({"model": "m", "prompt": "x" * 2 * MIB})
    client.send(post(CHAT, body))
    assert (await client.answer()).status == 200
    assert bodies == [body]


async def test_an_upload_waits_for_a_worker_that_reads_slowly(raw_worker, start_proxy, raw, transports):
    go_on = asyncio.Event()

    async def script(worker, reader, writer):
        length = await worker.read_head(reader)
        await go_on.wait()
        await reader.readexactly(length)
        writer.write(OK)

    worker = await raw_worker(script, limit=1 << 16)
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    size = 64 * MIB
    client.send(post(FILES, b"", media_type=AUDIO).replace(b"Length: 0", b"Length: %d" % size))
    passed = await client.fill(size)
    # What lies in between: two sockets' buffers each way, and no more than a few reads in the proxy.
    assert passed < 40 * MIB, "the client was made to wait"
    go_on.set()
    assert await client.fill(size - passed, wait_s=60) == size - passed
    assert (await client.answer()).status == 200
    await proxy.idle()


async def test_an_upload_over_the_limit_is_a_413(raw_worker, start_proxy, raw, noting, until):
    worker = await raw_worker(noting([], chunked=True))
    proxy = await start_proxy([worker.url], limits={"upload_bytes_max": 2 * MIB})
    client = await raw(proxy)
    client.send(post(FILES, bytes(3 * MIB), media_type=AUDIO))
    assert (await client.answer()).status == 413
    assert not worker.requests, "its length told before anything was sent"
    client = await raw(proxy)
    client.send(chunked_post(FILES, AUDIO), *[as_chunk(bytes(MIB))] * 3, b"0\r\n\r\n")
    assert (await client.answer()).status == 413
    await until(lambda: worker.ended == 1)  # what was passed on was broken off
    await proxy.idle()


async def test_a_limit_that_is_passed_when_the_answer_has_begun_breaks_it_off(raw_worker, start_proxy, raw):
    async def script(worker, reader, writer):
        await worker.read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + as_chunk(b"so far"))
        await reader.read()

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url], limits={"upload_bytes_max": 2 * MIB})
    client = await raw(proxy)
    client.send(chunked_post(FILES, AUDIO), as_chunk(bytes(MIB + 1)))
    while b"so far" not in client.received:
        client.received += await client.reader.read(100)
    client.send(*[as_chunk(bytes(MIB))] * 2, b"0\r\n\r\n")
    with pytest.raises((WireError, ConnectionResetError)):
        await client.answer()
    assert b"413" not in client.received
    await proxy.idle()


async def test_an_answer_before_the_upload_is_complete_frees_the_worker(raw_worker, start_proxy, raw, until):
    async def script(worker, reader, writer):
        await worker.read_head(reader)
        writer.write(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno")
        await reader.read()

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(chunked_post(FILES, AUDIO), as_chunk(bytes(MIB + 1)))
    answer = await client.answer()
    assert (answer.status, answer.body) == (401, b"no")
    # The client neither sends more nor leaves: that is no reason to keep anything booked.
    await proxy.idle()
    await until(lambda: worker.ended == 1)


async def test_a_worker_that_answers_early_and_hangs_up_is_no_failure(raw_worker, start_proxy, raw):
    async def script(worker, reader, writer):
        await worker.read_head(reader)
        writer.write(b"HTTP/1.1 401 Unauthorized\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno")
        await writer.drain()

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url])
    for end in (b"", b"0\r\n\r\n"):
        client = await raw(proxy)
        client.send(chunked_post(FILES, AUDIO), as_chunk(bytes(MIB + 1)), end)
        answer = await client.answer()
        assert answer.status in {401, 502}, "the reset may overtake the answer, that is TCP's way"
        client.send(as_chunk(bytes(100)), b"0\r\n\r\n")
        await proxy.idle()


async def test_a_refused_upload_is_not_sent_twice(raw_worker, start_proxy, raw):
    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(b"HTTP/1.1 503 Full\r\nContent-Length: 4\r\n\r\nbusy")
        await reader.read()

    workers = [await raw_worker(script) for _ in range(2)]
    proxy = await start_proxy([worker.url for worker in workers])
    client = await raw(proxy)
    client.send(post(FILES, bytes(2 * MIB), media_type=AUDIO))
    answer = await client.answer()
    assert (answer.status, answer.body) == (503, b"busy")
    assert sum(len(worker.requests) for worker in workers) == 1
    await proxy.idle()


async def test_a_large_upload_never_meets_a_closed_kept_connection(raw_worker, start_proxy, raw):
    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(OK)
        await worker.read_head(reader)
        writer.transport.abort()

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    for _ in range(3):
        client.send(post(FILES, bytes(2 * MIB), media_type=AUDIO))
        assert (await client.answer()).status == 200
    await proxy.idle()


async def test_a_slow_upload_is_no_silence(raw_worker, start_proxy, raw, noting, until):
    worker = await raw_worker(noting(bodies := [], chunked=True))
    proxy = await start_proxy([worker.url], timeouts={"first_byte_s": 0.001})
    watch = proxy.running.service.watch
    watch.close()  # looks only as below, one for each piece: a machine that is slow is no slow client
    client = await raw(proxy)
    client.send(chunked_post(FILES, AUDIO), as_chunk(bytes(MIB + 1)))
    for _ in range(12):
        await until(lambda: any(exchange.progressed for exchange in watch._watched))
        watch._look()
        watch.close()
        client.send(as_chunk(b"more"))
    client.send(b"0\r\n\r\n")
    assert (await client.answer()).status == 200
    assert len(bodies[0]) == MIB + 1 + 48


async def test_an_upload_that_stops_is_ended(raw_worker, start_proxy, raw, noting, until):
    worker = await raw_worker(noting([], chunked=True))
    proxy = await start_proxy([worker.url], timeouts={"first_byte_s": 0.1})
    client = await raw(proxy)
    client.send(chunked_post(FILES, AUDIO), as_chunk(bytes(MIB + 1)))
    assert (await client.answer()).status == 504
    await until(lambda: worker.ended == 1)
    await proxy.idle()


@pytest.mark.parametrize("more", [b"", b"no size\r\n"])
async def test_leaving_in_mid_upload(more, raw_worker, start_proxy, raw, noting, until):
    worker = await raw_worker(noting([], chunked=True))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(chunked_post(FILES, AUDIO), as_chunk(bytes(2 * MIB)), more)
    await until(lambda: worker.requests)
    client.writer.transport.abort()
    await until(lambda: worker.ended == 1)
    await proxy.idle()


@pytest.mark.parametrize("prompt_bytes", [60_000, MIB], ids=["looked at", "read"])
async def test_a_prompt_is_not_kept_while_its_stream_runs(prompt_bytes, raw_worker, start_proxy, raw, until):
    streams = 8
    event = b'data: {"choices":[{"index":0,"delta":{"content":" x"}}]}\n\n'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    may_end = asyncio.Event()

    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(head + as_chunk(event))
        await may_end.wait()
        writer.write(as_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    proxy = await start_proxy([(await raw_worker(script)).url])
    clients = [await raw(proxy) for _ in range(streams)]
    tracemalloc.start()
    try:
        for client in clients:
            client.send(post(CHAT, b'{"model":"m","stream":true,"prompt":"%b"}' % (b"x" * prompt_bytes)))
        for client in clients:
            await client.reader.readuntil(b'x"}}]}\n\n')
        gc.collect()
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept_bytes < streams * prompt_bytes / 2
    may_end.set()
    await proxy.idle()
