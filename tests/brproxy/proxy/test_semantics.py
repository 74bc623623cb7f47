"""HTTP's awkward corners over real sockets: versions, framing, interim responses, connections."""

import asyncio
import socket

import orjson
import pytest

from brproxy.relay.connection import WorkerConnection
from tests.brproxy.wire import as_chunk, get, post

BOTH_LOOPS = True
CHAT = "/v1/chat/completions"
ASK = b'{"model":"m","stream":true,"messages":[]}'
CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":" x"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED_STREAM = STREAM + b"Transfer-Encoding: chunked\r\n\r\n"


def chunks(*payloads, end=b"0\r\n\r\n"):
    return b"".join(map(as_chunk, payloads)) + end


def fixed(body, *fields, status=b"200 OK"):
    lines = b"".join(field + b"\r\n" for field in fields)
    return b"HTTP/1.1 %b\r\n%bContent-Length: %d\r\n\r\n%b" % (status, lines, len(body), body)


async def test_a_1_0_client_gets_no_chunks_and_the_end_of_the_connection(
    raw_worker, answering, start_proxy, raw
):
    worker = await raw_worker(answering(CHUNKED_STREAM + chunks(CHUNK, DONE)))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(post(CHAT, ASK, version="1.0"))
    answer = await client.answer()
    assert (answer.framing, answer.body, answer.one(b"Connection")) == ("close", CHUNK + DONE, b"close")
    assert b"HTTP/1.1\r\n" in worker.requests[0], "workers are always spoken to in 1.1"
    await proxy.idle()


async def test_a_1_0_client_that_keeps_its_connection_is_told_a_length(
    raw_worker, answering, start_proxy, raw
):
    worker = await raw_worker(answering(fixed(b"{}"), fixed(b"[]")))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    for body in (b"{}", b"[]"):
        client.send(get("/version", "Connection: keep-alive", version="1.0"))
        answer = await client.answer()
        assert (answer.body, answer.framing) == (body, "length")
        assert answer.one(b"Connection") == b"keep-alive"
    client.send(get("/version", version="1.0"))
    await proxy.idle()


async def test_connection_close_is_kept_to_on_each_side_alone(raw_worker, answering, start_proxy, raw):
    worker = await raw_worker(answering(fixed(b"1"), fixed(b"2", b"Connection: close"), fixed(b"3")))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(get("/a"))
    assert (await client.answer()).body == b"1"
    client.send(get("/b"))
    answer = await client.answer()
    assert (answer.body, answer.one(b"Connection")) == (b"2", None), "the client's connection stays"
    client.send(get("/c", "Connection: close"))
    answer = await client.answer()
    assert (answer.body, answer.one(b"Connection")) == (b"1", b"close")
    assert await client.ended()
    assert len(worker.tasks) == 2, "the worker asked for a new connection, the client did not"
    assert not any(b"onnection:" in head for head in worker.requests)


async def test_pipelined_requests_are_answered_in_order(raw_worker, start_proxy, raw):
    async def script(worker, reader, writer):
        while True:
            body = await worker.read_request(reader)
            writer.write(fixed(body or worker.requests[-1].split()[1]))

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(post("/a", b"[1]"), get("/b"), get("/health"), post("/c", b"[2]"), get("/d"))
    answers = [await client.answer() for _ in range(5)]
    assert [answer.body for answer in answers] == [b"[1]", b"/b", b"ok\n", b"[2]", b"/d"]
    await proxy.idle()


async def test_continue_is_answered_by_the_proxy(raw_worker, answering, start_proxy, raw):
    worker = await raw_worker(answering(fixed(b"{}")))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    request = post(CHAT, ASK, "Expect: 100-continue")
    client.send(request[: -len(ASK)])
    assert (await client.answer()).status == 100
    assert not worker.requests
    client.send(ASK)
    assert (await client.answer()).body == b"{}"
    assert b"xpect" not in worker.requests[0]


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_another_expectation_is_not_met(path, raw_worker, answering, start_proxy, raw):
    worker = await raw_worker(answering(fixed(b"{}")))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(post(path, ASK, "Expect: 200-ok")[: -len(ASK)])
    answer = await client.answer()
    assert answer.status == 417
    error = orjson.loads(answer.body)["error"]
    assert (error["type"], "100-continue" in error["message"]) == ("invalid_request_error", True)
    # What may come of the body is no request.
    assert answer.one(b"connection") == b"close"
    assert not worker.requests
    await proxy.idle()


async def test_head_keeps_the_length_and_the_connection(raw_worker, answering, start_proxy, raw):
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\nX-A: b\r\n\r\n"
    worker = await raw_worker(answering(head, fixed(b"12")))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(get("/v1/files/1", method="HEAD"))
    answer = await client.answer("HEAD")
    assert (answer.one(b"Content-Length"), answer.one(b"X-A")) == (b"1234", b"b")
    client.send(get("/v1/files/1"))
    assert (await client.answer()).body == b"12"
    assert len(worker.tasks) == 1
    await proxy.idle()


@pytest.mark.parametrize("behind", [b"5678", b"5", b"1"])
async def test_what_follows_the_answer_to_head_never_answers_the_next_request(
    behind, raw_worker, start_proxy, raw
):
    async def script(worker, reader, writer):
        await worker.read_request(reader)
        if worker.requests[-1].startswith(b"HEAD"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n" + behind)
            await worker.read_request(reader)
        writer.write(fixed(b"new"))

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(get("/x", method="HEAD"))
    assert (await client.answer("HEAD")).status == 200
    client.send(get("/x"))
    assert (await client.answer()).body == b"new"
    assert len(worker.tasks) == 2, "that connection was not used again"


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_answers_that_have_no_body(status, raw_worker, answering, start_proxy, raw):
    head = b"HTTP/1.1 %b\r\nETag: x\r\n\r\n" % status
    worker = await raw_worker(answering(head, head))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    for _ in range(2):
        client.send(get("/v1/files/1"))
        answer = await client.answer()
        assert answer.one(b"etag") == b"x"
        assert (answer.one(b"content-length"), answer.one(b"transfer-encoding")) == (None, None)
    assert len(worker.tasks) == 1


async def test_early_hints_pass_and_continue_does_not(raw_worker, answering, start_proxy, raw):
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\nConnection: x\r\n\r\n"
    worker = await raw_worker(answering(interim + fixed(b"1"), interim + fixed(b"2")))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(get("/a"))
    hints, answer = await client.answer(), await client.answer()
    assert (hints.status, hints.fields) == (103, [(b"Link", b"</a>")])
    assert (answer.status, answer.body) == (200, b"1")
    client.send(get("/a", version="1.0"))
    assert (await client.answer()).body == b"2", "HTTP/1.0 knows no interim responses"


async def test_trailers_pass_where_there_are_chunks(raw_worker, answering, start_proxy, raw):
    end = b"0\r\nX-Checksum: 1\r\nX-Empty:\r\n\r\n"
    response = b"HTTP/1.1 200 OK\r\nTrailer: X-Checksum\r\nTransfer-Encoding: chunked\r\n\r\n"
    worker = await raw_worker(answering(*[response + chunks(b"abc", end=end)] * 2))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(get("/a", "TE: trailers"))
    answer = await client.answer()
    assert (answer.body, answer.trailers) == (b"abc", [(b"X-Checksum", b"1"), (b"X-Empty", b"")])
    client.send(get("/a", version="1.0"))
    answer = await client.answer()
    assert (answer.body, answer.framing) == (b"abc", "close")
    assert b"TE:" not in worker.requests[0], "what a client can take is not what the proxy can take"


@pytest.mark.parametrize("target", ["http://elsewhere/v1/x?a=%2F", "HTTP://elsewhere:1/v1/x?a=%2F"])
async def test_an_absolute_target_is_sent_in_origin_form(target, raw_worker, answering, start_proxy, raw):
    worker = await raw_worker(answering(fixed(b"{}")))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(get(target))
    assert (await client.answer()).status == 200
    assert worker.requests[0].startswith(b"GET /v1/x?a=%2F HTTP/1.1\r\nHost: 127.0.0.1:")


async def test_the_proxy_is_no_tunnel(raw_worker, answering, start_proxy, raw):
    worker = await raw_worker(answering(fixed(b"{}")))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(b"CONNECT elsewhere:443 HTTP/1.1\r\nHost: elsewhere:443\r\n\r\n")
    assert (await client.answer()).status == 400
    assert not worker.requests
    await proxy.idle()


async def test_events_pass_whole_however_chunks_and_reads_cut_them(raw_worker, start_proxy, raw):
    events = [CHUNK, CHUNK.replace(b"x", b"data: y"), CHUNK, b": c\r\n\r\n", CHUNK, DONE]
    body = b"".join(events)
    framed = chunks(*[body[i : i + 7] for i in range(0, len(body), 7)])

    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(CHUNKED_STREAM)
        for i in range(0, len(framed), 11):
            writer.write(framed[i : i + 11])
            await writer.drain()
            await asyncio.sleep(0)
        await reader.read()

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(post(CHAT, ASK))
    answer = await client.answer()
    assert answer.body == body
    at, ends = 0, set()
    for event in events:
        at += len(event)
        ends.add(at)
    at = 0
    for size in answer.chunks:
        at += size
        assert at in ends, "no chunk ends inside an event"
    await proxy.idle()


async def test_small_writes_do_not_wait_for_acknowledgements(
    raw_worker, answering, start_proxy, raw, transports
):
    worker = await raw_worker(answering(fixed(b"{}")))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(get("/x"))
    await client.answer()
    for found in transports.values():
        assert len(found) == 1
        assert found[0].get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_worker_that_hangs_up_at_once_is_a_502(raw_worker, start_proxy, raw):
    async def script(worker, reader, writer):
        writer.transport.abort()

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    for _ in range(20):
        client.send(post(CHAT, ASK))
        assert (await client.answer()).status == 502
    await proxy.idle()


async def test_a_worker_that_speaks_before_it_is_asked_does_no_harm(raw_worker, start_proxy, raw):
    async def script(worker, reader, writer):
        writer.write(fixed(b"nobody asked", b"Connection: close"))
        await reader.read()

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    for _ in range(20):
        client.send(get("/x"))
        assert (await client.answer()).status in {502, 200}
    await proxy.idle()


async def test_garbage_behind_a_response_never_answers_another_request(
    raw_worker, start_proxy, raw, until, transports
):
    answered = asyncio.Event()

    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(fixed(b"right"))
        await answered.wait()
        writer.write(fixed(b"wrong"))
        await reader.read()

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    for _ in range(2):
        client.send(get("/x"))
        assert (await client.answer()).body == b"right"
        answered.set()
        await until(transports[WorkerConnection][-1].is_closing)
        answered.clear()
    assert len(worker.tasks) == 2


async def test_two_codings_in_two_fields_are_no_plain_chunks(raw_worker, answering, start_proxy, raw):
    coding = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"
    worker = await raw_worker(answering(coding + chunks(b"zipped")))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(get("/x"))
    assert (await client.answer()).status == 502


@pytest.mark.parametrize(
    "reads",
    [
        [chunks(CHUNK, CHUNK, end=b"")],
        [chunks(CHUNK, CHUNK, CHUNK, end=b""), chunks(CHUNK, end=b"")],
        # Not only plain events: the same bytes by the exact way, and the plain ones after it still count.
        [chunks(CHUNK, b": ping\n\n", end=b""), chunks(CHUNK, CHUNK, end=b"")],
        [chunks(CHUNK + CHUNK, CHUNK, end=b"")],
        [chunks(CHUNK, CHUNK, end=b"")[:-9], chunks(CHUNK, CHUNK, end=b"")[-9:] + chunks(CHUNK, end=b"")],
        [chunks(CHUNK, CHUNK.replace(b" x", b'","role":"'), CHUNK, end=b"")],
    ],
)
async def test_chunks_that_come_together_pass_and_count_each(reads, raw_worker, start_proxy, raw):
    body = b"".join(reads)

    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(CHUNKED_STREAM + chunks(CHUNK, end=b""))
        # The first read shows what its events look like, the second where its chunks begin.
        for read in (chunks(CHUNK, end=b""), *reads, chunks(DONE)):
            await asyncio.sleep(0.01)
            writer.write(read)

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(post(CHAT, ASK))
    answer = await client.answer()
    events = [part for part in body.split(b"\r\n") if b"data" in part or b": ping" in part]
    assert answer.body == CHUNK * 2 + b"".join(events) + DONE
    await proxy.idle()
    assert proxy.running.service.metrics.groups["default"].output_tokens == 2 + body.count(b'" x"')


async def test_what_looks_like_a_chunk_in_a_body_without_chunks_is_its_body(raw_worker, start_proxy, raw):
    sends = [CHUNK, b": x\r\n\r\n", as_chunk(CHUNK), DONE]

    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(STREAM + b"\r\n")
        for send in sends:
            writer.write(send)
            await asyncio.sleep(0.01)

    worker = await raw_worker(script)
    client = await raw(await start_proxy([worker.url]))
    client.send(post(CHAT, ASK))
    assert (await client.answer()).body == b"".join(sends)
