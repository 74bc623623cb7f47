"""How a request moves from a worker that turns it down to another, over real sockets."""

import asyncio

import orjson
import pytest

from brproxy.proxy.events import EventReader
from brproxy.proxy.exchange.client_sink import ClientSink
from brproxy.proxy.exchange.reply import Reply
from brproxy.relay.connection import STALE_S
from tests.brproxy.proxy.test_semantics import ASK, CHAT, CHUNK, CHUNKED_STREAM, DONE, chunks, fixed
from tests.brproxy.wire import WireError, as_chunk, get, post

BOTH_LOOPS = True
REFUSED = b'data: {"error":{"message":"full","type":"Service Unavailable","code":503}}\n\n'
PING = b": ping\n\n"
SERVED = CHUNKED_STREAM + chunks(CHUNK, DONE)
# The policy takes them in turn: the first request meets the first worker.
IN_TURN = {"routing": {"policy": "round-robin"}}


@pytest.fixture
def start_pair(raw_worker, start_proxy):
    """Return a function that starts a worker with each script and a proxy that asks them in turn."""

    async def start(*scripts, **tables):
        workers = [await raw_worker(script) for script in scripts]
        return await start_proxy([worker.url for worker in workers], **IN_TURN | tables), workers

    return start


async def test_a_refusal_counts_when_its_head_is_there(start_pair, answering, raw):
    proxy, workers = await start_pair(
        answering(b"HTTP/1.1 503 Busy\r\nContent-Length: 100\r\n\r\nand then nothing"), answering(SERVED)
    )
    client = await raw(proxy)
    client.send(post(CHAT, ASK))
    assert (await client.answer()).body == CHUNK + DONE
    assert [len(worker.requests) for worker in workers] == [1, 1]
    await proxy.idle()


@pytest.mark.parametrize("status", [b"503 Busy", b"500 Oops", b"400 No"])
async def test_an_error_that_is_the_answer_passes_whole_whatever_its_length(
    status, raw_worker, answering, start_proxy, raw
):
    body = bytes(range(256)) * (3 << 12)
    worker = await raw_worker(answering(fixed(body, b"X-W: 1", status=status)))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(post(CHAT, ASK))
    answer = await client.answer()
    assert (b"%d %b" % (answer.status, answer.reason), answer.one(b"X-W")) == (status, b"1")
    assert answer.body == body
    await proxy.idle()


@pytest.mark.parametrize("status", [b"503 Busy", b"500 Oops", b"429 Slow", b"400 No"])
@pytest.mark.parametrize("beginning", [b"", b"{"])
@pytest.mark.parametrize("workers", [1, 2])
async def test_an_error_is_told_though_its_body_never_comes(
    workers, beginning, status, silence, start_worker, start_proxy, raw
):
    head = b"HTTP/1.1 %b\r\nContent-Length: 100\r\n\r\n" % status
    urls = [(await start_worker(silence(head + beginning))).url for _ in range(workers)]
    proxy = await start_proxy(urls)
    client = await raw(proxy)
    client.send(post(CHAT, ASK))
    received = await client.reader.readuntil(b"\r\n\r\n" + beginning)
    assert received.startswith(b"HTTP/1.1 %b\r\n" % status)
    client.writer.close()
    await proxy.idle()


async def comments_first(client, proxy):
    """Send a request and wait for the comments that reach its client before any data."""
    client.send(post(CHAT, ASK))
    while PING not in client.received:
        client.received += await client.reader.read(1 << 16)
    assert not sum(proxy.ledger.active().output_tokens)


def pinging(go_on, *then):
    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(CHUNKED_STREAM + as_chunk(PING))
        await go_on.wait()
        for data in then:
            writer.write(data)
        await reader.read()

    return script


async def test_comments_go_on_and_a_refusal_behind_them_still_moves_the_request(start_pair, answering, raw):
    go_on = asyncio.Event()
    proxy, workers = await start_pair(pinging(go_on, as_chunk(REFUSED)), answering(SERVED))
    client = await raw(proxy)
    await comments_first(client, proxy)
    go_on.set()
    answer = await client.answer()
    assert (answer.status, answer.body) == (200, PING + CHUNK + DONE)
    assert [len(worker.requests) for worker in workers] == [1, 1]
    await proxy.idle()


async def test_comments_and_then_the_stream(start_pair, raw):
    go_on = asyncio.Event()
    proxy, _ = await start_pair(pinging(go_on, chunks(CHUNK, DONE)))
    client = await raw(proxy)
    await comments_first(client, proxy)
    go_on.set()
    assert (await client.answer()).body == PING + CHUNK + DONE
    await proxy.idle()


@pytest.mark.parametrize(
    "body", [b'{"error":{"message":"no such thing"}}', b"line\nline", b"", bytes(1 << 17)]
)
async def test_what_is_no_stream_reaches_a_client_that_has_had_comments_as_an_event(
    body, start_pair, answering, raw
):
    go_on = asyncio.Event()
    refuses = pinging(go_on, as_chunk(REFUSED))
    proxy, _ = await start_pair(refuses, answering(fixed(body, status=b"400 Bad Request")))
    client = await raw(proxy)
    await comments_first(client, proxy)
    go_on.set()
    with pytest.raises(WireError) as caught:
        await client.answer()
    event = caught.value.answer.body.removeprefix(PING)
    if 0 < len(body) < 1000:
        assert event == b"".join(b"data: %b\n" % line for line in body.split(b"\n")) + b"\n"
    else:
        assert b"broke off" in event
    await proxy.idle()


async def test_a_client_that_has_had_comments_is_told_when_nobody_answers(start_pair, raw):
    go_on = asyncio.Event()
    proxy, _ = await start_pair(pinging(go_on), timeouts={"first_byte_s": 3.0})
    client = await raw(proxy)
    await comments_first(client, proxy)
    with pytest.raises(WireError) as caught:
        await client.answer()
    assert b"The worker sent nothing for 3 s." in caught.value.answer.body
    await proxy.idle()


TURNED_DOWN = {
    "refused": CHUNKED_STREAM + chunks(REFUSED, DONE),
    "without [DONE]": b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + CHUNK[:20],
}


@pytest.mark.parametrize("turned_down", TURNED_DOWN.values(), ids=TURNED_DOWN)
async def test_a_stream_that_comes_after_one_that_was_turned_down_at_its_end_still_streams(
    turned_down, start_pair, answering, raw
):
    go_on = asyncio.Event()

    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(CHUNKED_STREAM + as_chunk(CHUNK))
        await go_on.wait()
        writer.write(chunks(CHUNK, DONE))
        await reader.read()

    proxy, _ = await start_pair(answering(turned_down, close=True), script)
    client = await raw(proxy)
    client.send(post(CHAT, ASK))
    while CHUNK not in client.received:
        client.received += await client.reader.read(1 << 16)
    go_on.set()
    assert (await client.answer()).body == CHUNK + CHUNK + DONE
    await proxy.idle()


async def test_a_head_alone_is_no_sign_of_life_and_waits_for_what_it_is_the_head_of(
    start_pair, answering, raw
):
    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(CHUNKED_STREAM + as_chunk(CHUNK[:9]))
        # Longer than comments would be held.
        await asyncio.sleep(1.0)
        writer.transport.abort()

    answer = fixed(b'{"error":{"message":"no such"}}', status=b"400 Bad Request")
    proxy, _ = await start_pair(script, answering(answer))
    client = await raw(proxy)
    client.send(post(CHAT, ASK))
    assert (await client.answer()).status == 400
    await proxy.idle()


@pytest.mark.parametrize("path", [CHAT, "/reset_prefix_cache"])
async def test_a_kept_connection_that_closes_at_once_was_closed_before(path, raw_worker, start_proxy, raw):
    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(fixed(b"{}"))
        await worker.read_request(reader)
        writer.transport.abort()

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url], limits={"retries_max": 0})
    client = await raw(proxy)
    for _ in range(3):
        client.send(post(path, ASK))
        assert (await client.answer()).status == 200
    await proxy.idle()


@pytest.mark.parametrize(("path", "runs"), [(CHAT, 2), ("/reset_prefix_cache", 1)])
async def test_a_kept_connection_that_closes_later_may_have_worked(path, runs, start_pair, raw):
    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(fixed(b"{}"))
        await worker.read_request(reader)
        await asyncio.sleep(1.5 * STALE_S)
        writer.transport.abort()

    proxy, workers = await start_pair(script, script, script)
    client = await raw(proxy)
    for _ in workers:
        client.send(post(CHAT, ASK))
        assert (await client.answer()).status == 200
    client.send(post(path, ASK))
    status = (await client.answer()).status
    ran = sum(len(worker.requests) for worker in workers) - len(workers)
    # The second try is on a new connection, where the script takes it for a first request.
    assert (status, ran) == ((200, 2) if runs == 2 else (502, 1))
    await proxy.idle()


@pytest.mark.parametrize(
    ("place", "seen"),
    [
        (b"{origin}/v1/files/1?a=b", b"/v1/files/1?a=b"),
        (b"{origin}", b"/"),
        (b"{origin}?x", b"/?x"),
        (b"{origin}//elsewhere/", b"/.//elsewhere/"),
        (b"//{host}/v1", b"/v1"),
        (b"{origin}1/elsewhere", b"{origin}1/elsewhere"),
        (b"http://other/v1", b"http://other/v1"),
        (b"/v1/relative", b"/v1/relative"),
    ],
)
@pytest.mark.parametrize("field", [b"Location", b"content-location"])
async def test_a_place_at_the_worker_is_here_for_clients(field, place, seen, raw_worker, start_proxy, raw):
    async def script(worker, reader, writer):
        await worker.read_request(reader)
        named = place.replace(b"{origin}", worker.url.encode())
        named = named.replace(b"{host}", worker.url.removeprefix("http://").encode())
        writer.write(fixed(b"", b"%b: %b" % (field, named), status=b"307 Temporary Redirect"))
        await reader.read()

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(get("/v1/files/1/"))
    answer = await client.answer()
    assert answer.one(field) == seen.replace(b"{origin}", worker.url.encode())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (b"", b"identity"),
        (b',"stream_options":{"include_usage":true}', b"gzip,br"),
        (b',"stream":false', b"gzip,br"),
    ],
)
async def test_a_stream_is_not_compressed_where_usage_is_taken_out_again(
    options, told, raw_worker, answering, start_proxy, raw
):
    worker = await raw_worker(answering(fixed(b"{}")))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(
        post(
            CHAT,
            b'{"model":"m","stream":true,"messages":[]%b}' % options,
            "Accept-Encoding: gzip",
            "accept-encoding: br",
        )
    )
    await client.answer()
    lines = worker.requests[0].split(b"\r\n")
    assert [line for line in lines if line.lower().startswith(b"accept-encoding")] == [
        b"Accept-Encoding: " + told
    ]


@pytest.mark.parametrize("first", ["websocket", "h2c"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_two_protocols_are_none(first, version, raw_worker, answering, start_proxy, raw):
    worker = await raw_worker(answering(fixed(b"no")))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    fields = [f"Upgrade: {name}" for name in sorted(["websocket", "h2c"], key=first.__ne__)]
    client.send(get("/v1/realtime", "Connection: Upgrade", *fields, version=version))
    assert (await client.answer()).body == b"no"
    assert b"upgrade" not in worker.requests[0].lower()


async def test_a_1_0_client_gets_no_upgrade(raw_worker, answering, start_proxy, raw):
    worker = await raw_worker(answering(fixed(b"no")))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(get("/v1/realtime", "Connection: Upgrade", "Upgrade: websocket", version="1.0"))
    assert (await client.answer()).body == b"no"
    assert b"upgrade" not in worker.requests[0].lower()


@pytest.mark.parametrize(
    ("target", "seen"), [("http://h?x=/v1/models", b"/?x=/v1/models"), ("http://h/a%20b?c#/d", b"/a%20b?c")]
)
async def test_a_target_means_the_same_to_all(target, seen, raw_worker, answering, start_proxy, raw):
    worker = await raw_worker(answering(fixed(b"{}")))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(f"GET {target} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
    assert (await client.answer()).body == b"{}"
    assert worker.requests[0].split(b" ")[1] == seen


@pytest.mark.parametrize(
    ("owner", "method", "answer"),
    [
        (EventReader, "read", SERVED),
        (EventReader, "end", SERVED),
        (EventReader, "take", SERVED),
        (Reply, "receive", fixed(b"{}")),
        (Reply, "end", fixed(b"{}")),
        (ClientSink, "begin", SERVED),
        (ClientSink, "finish", fixed(b"{}")),
        (ClientSink, "pass_on", SERVED),
    ],
)
async def test_a_bug_in_one_answer_ends_that_one(
    owner, method, answer, raw_worker, start_proxy, raw, monkeypatch
):
    async def script(worker, reader, writer):
        while True:
            await worker.read_request(reader)
            at = answer.index(b"\r\n\r\n") + 4
            writer.write(answer[:at])
            await asyncio.sleep(0.02)
            writer.write(answer[at:])

    worker = await raw_worker(script)
    proxy = await start_proxy([worker.url])
    original, broken = getattr(owner, method), [True]

    def raising(self, *args, **named):
        if broken:
            broken.pop()
            raise ZeroDivisionError
        return original(self, *args, **named)

    monkeypatch.setattr(owner, method, raising)
    client = await raw(proxy)
    client.send(post(CHAT, ASK))
    try:
        failed = await client.answer()
        assert (failed.status, orjson.loads(failed.body)["error"]["type"]) == (500, "internal_error")
    except WireError:
        # Its client had some of it already.
        client = await raw(proxy)
    await proxy.idle()
    client.send(post(CHAT, ASK))
    assert (await client.answer()).status == 200
    await proxy.idle()
