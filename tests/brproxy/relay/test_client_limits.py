"""Connections of clients on a real socket: how many, for how long, and what those hear that talk nonsense."""

import asyncio
import logging
import os
from contextlib import suppress
from pathlib import Path

import orjson
import pytest
from aiohttp import web
from hypothesis import HealthCheck, example, given
from hypothesis import strategies as st

from brproxy.relay.client import Client
from brproxy.relay.errors import BadBodyError
from brproxy.relay.server import ClientLimits, RelayServer
from tests.brproxy.wire import RawClient, get, post, read_answer
from tests.draws import draws

BOTH_LOOPS = True
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Answering:
    """A handler that answers at once, or holds requests for /hold until it is told to go on."""

    def __init__(self):
        self.go_on = asyncio.Event()
        self.held = 0

    async def __call__(self, request):
        if request.path == "/page":
            return web.Response(text="page")
        client = Client(request, 5.0)
        if request.path == "/hold":
            self.held += 1
            await self.go_on.wait()
        client.begin()
        client.write(OK)
        return client.answered


async def ended(client, within):
    """Wait for the end of a connection on which nothing has come."""
    assert await within(client.reader.read(), "the connection is kept") == b""


async def test_the_oldest_of_the_idle_give_way_to_a_new_client(serve, within):
    connect = await serve(Answering(), limits=ClientLimits(connections_max=3))
    clients = []
    for _ in range(3):
        clients.append(await connect())
        clients[-1].send(get("/"))
        await within(clients[-1].answer(), "there was no answer")
        await asyncio.sleep(0.005)
    # The first is used again, so that the second has been idle for longest.
    clients[0].send(get("/"))
    await within(clients[0].answer(), "there was no answer")
    for gives_way in (clients[1], clients[2], clients[0]):
        newcomer = await connect()
        newcomer.send(get("/"))
        await within(newcomer.answer(), "a new client waits")
        await ended(gives_way, within)


async def test_a_client_with_a_request_does_not_give_way(serve, within, until):
    handler = Answering()
    connect = await serve(handler, limits=ClientLimits(connections_max=2))
    busy = [await connect(), await connect()]
    for client in busy:
        client.send(get("/hold"))
    await within(until(lambda: handler.held == 2), "requests are not handled")
    await ended(await connect(), within)
    handler.go_on.set()
    for client in busy:
        assert (await within(client.answer(), "it was cut off")).body == b"ok"
    # Now they are idle.
    newcomer = await connect()
    newcomer.send(get("/"))
    await within(newcomer.answer(), "a new client waits")


async def test_a_client_that_left_makes_room(serve, within, until):
    connect = await serve(Answering(), limits=ClientLimits(connections_max=1))
    for _ in range(5):
        client = await connect()
        client.send(get("/"))
        await within(client.answer(), "a client that left is counted")
        client.writer.close()
        await client.writer.wait_closed()
        await asyncio.sleep(0.01)


async def test_a_file_number_that_is_too_high_tells_that_files_run_out(serve, within, monkeypatch):
    # The numbers of this process are below a thousand: the first connection is one too many already.
    connect = await serve(Answering(), limits=ClientLimits(file_number_max=0))
    await ended(await connect(), within)
    connect = await serve(Answering(), limits=ClientLimits(file_number_max=1 << 19))
    client = await connect()
    client.send(get("/"))
    await within(client.answer(), "there are files enough")


def greatest_file_number():
    return max(int(file.name) for file in Path("/proc/self/fd").iterdir())


async def test_as_many_give_way_as_files_are_taken_beyond_the_limit(serve, within, stack):
    number_max = greatest_file_number() + 60
    connect = await serve(Answering(), limits=ClientLimits(file_number_max=number_max))
    clients = []
    for _ in range(10):
        clients.append(await connect())
        clients[-1].send(get("/"))
        await within(clients[-1].answer(), "there was no answer")
    taken = 0
    while taken < number_max + 10:
        taken = os.dup(0)
        stack.callback(os.close, taken)
    newcomer = await connect()
    for client in clients:
        await ended(client, within)
    newcomer.send(get("/"))
    await within(newcomer.answer(), "a new client waits")


@pytest.mark.parametrize(
    "beginning", [b"", b"G", b"\r\n", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: h\r\n"]
)
async def test_a_head_that_does_not_end_is_not_waited_for(beginning, serve, within):
    connect = await serve(Answering(), limits=ClientLimits(head_s=0.05))
    client = await connect()
    client.send(beginning)
    await ended(client, within)


async def test_dripping_does_not_make_a_head_last_longer(serve, within):
    connect = await serve(Answering(), limits=ClientLimits(head_s=0.05))
    client = await connect()
    client.send(get("/"))
    await within(client.answer(), "there was no answer")
    client.send(b"GET / HTTP/1.1\r\n")

    async def drip():
        while not client.reader.at_eof() and not client.writer.is_closing():
            client.send(b"X: y\r\n")
            await asyncio.sleep(0.01)

    await within(drip(), "a head may take as long as it likes")


async def test_between_requests_a_connection_is_kept_for_as_long_as_is_configured(serve, within):
    connect = await serve(Answering(), limits=ClientLimits(head_s=0.02), keepalive_timeout=60.0)
    client = await connect()
    for _ in range(3):
        client.send(get("/"))
        await within(client.answer(), "an idle connection has no head yet")
        await asyncio.sleep(0.06)


async def test_a_request_is_not_cut_off_by_the_limit_of_its_head(serve, within, until):
    handler = Answering()
    client = await (await serve(handler, limits=ClientLimits(head_s=0.02)))()
    client.send(get("/hold")[:9])
    await asyncio.sleep(0.005)
    client.send(get("/hold")[9:])
    await within(until(lambda: handler.held), "the request was not handled")
    await asyncio.sleep(0.06)
    handler.go_on.set()
    assert (await within(client.answer(), "it was cut off")).body == b"ok"


async def test_a_page_that_is_not_read_is_not_waited_for(serve, within, until):
    made = []

    async def handler(request):
        made.append(request.protocol)
        return web.Response(body=bytes(8 << 20))

    connect = await serve(handler, limits=ClientLimits(unread_s=0.05))
    client = await connect(receive_bytes=1 << 16)
    client.writer.transport.pause_reading()
    client.send(get("/"))
    gone = until(lambda: made and made[0].transport is None)
    await within(gone, "a client that does not read keeps its connection for ever")
    client = await connect(receive_bytes=1 << 16)
    client.send(get("/"))
    for _ in range(3):
        # Slow, but it reads.
        await asyncio.sleep(0.03)
        assert await within(client.reader.read(1 << 20), "a slow client is cut off")


@pytest.mark.parametrize(
    ("nonsense", "status", "told"),
    [
        (
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04",
            505,
            "HTTP/2 is not spoken here; use HTTP/1.1.",
        ),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "Received HTTPS traffic on an HTTP port."),
        (b"GET / HTTP/1.1\r\nsecret\x00 h\r\n\r\n", 400, "Invalid header token."),
        (
            b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
            431,
            "The request has more than 128 header fields, the most that this proxy accepts.",
        ),
        (b"GET /secret\x00 HTTP/1.1\r\n\r\n", 400, "Invalid char in url path."),
        (
            b"GET / HTTP/1.1\r\nX: " + b"s" * 100_000 + b"\r\n\r\n",
            431,
            "a header field of the request is longer than 8190 bytes, the most that this proxy accepts.",
        ),
    ],
)
async def test_what_is_no_request_is_answered_in_one_line_and_logged_in_one(
    nonsense, status, told, serve, within, caplog
):
    def page(status, message):
        return web.json_response({"status": status, "message": message}, status=status)

    connect = await serve(Answering(), error_page=page)
    for _ in range(20):
        client = await connect()
        client.send(nonsense)
        answer = await within(client.answer(), "there was no answer")
        assert answer.status == status
        assert told.encode() in answer.body
        assert b"secret" not in answer.body
        assert answer.one(b"server") is None
        assert await within(client.ended(), "nonsense is read on")
    lines = [record.getMessage() for record in caplog.records if record.levelno > logging.DEBUG]
    assert len(lines) == 1
    assert lines[0].startswith("bad request from 127.0.0.1: ")
    assert lines[0].endswith(told)
    assert not any(record.exc_info for record in caplog.records if record.levelno > logging.DEBUG)


async def test_a_bug_is_logged_with_its_traceback_but_not_a_thousand_times(serve, within, caplog):
    async def handler(request):
        raise ValueError("a bug")

    connect = await serve(handler)
    for _ in range(20):
        client = await connect()
        client.send(get("/"))
        answer = await within(client.answer(), "there was no answer")
        assert (answer.status, answer.body) == (500, b"The proxy failed on this request; its log says why.\n")
    assert 1 <= caplog.text.count("ValueError: a bug") < 20


async def test_a_page_does_not_say_what_serves_it(serve, within):
    client = await (await serve(Answering()))()
    client.send(get("/page"))
    answer = await within(client.answer(), "there was no answer")
    assert (answer.body, answer.one(b"server")) == (b"page", None)


@pytest.mark.parametrize("pipelined", [False, True])
async def test_a_body_that_turns_into_nonsense_is_told_to_who_waits_for_it(pipelined, serve, within, caplog):
    broken = []

    async def handler(request):
        if request.method == "GET":
            await asyncio.sleep(0.05)
            return web.Response(text="first")
        try:
            await request.read()
        except BadBodyError as error:
            broken.append(str(error))
            return web.Response(status=400, text="no body")
        raise AssertionError

    client = await (await serve(handler))()
    if pipelined:
        client.send(get("/"))
    client.send(
        post("/", b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"), b"5\r\nhello\r\n"
    )
    await asyncio.sleep(0.02)
    client.send(b"nonsense\r\n")
    if pipelined:
        assert (await within(client.answer(), "the first is lost")).body == b"first"
    answer = await within(client.answer(), "a body that cannot come is waited for")
    assert (answer.status, answer.body) == (400, b"no body")
    assert broken == ["the request's body is no valid HTTP"]
    assert "Traceback" not in caplog.text
    assert await within(client.ended(), "nonsense is read on")


@pytest.mark.parametrize("reads", [0, 1, 31, 100])
async def test_who_leaves_is_seen_however_much_nonsense_came_behind_its_request(reads, serve, within):
    protocols, has_come, is_cancelled = [], asyncio.Event(), asyncio.Event()

    async def handler(request):
        protocols.append(request.protocol)
        has_come.set()
        try:
            await asyncio.Event().wait()
        finally:
            is_cancelled.set()

    client = await (await serve(handler))()
    client.send(get("/"))
    await within(has_come.wait(), "the request does not come")
    for _ in range(reads):
        protocols[0].data_received(b"nonsense\r\n\r\n")
    client.writer.close()
    await within(is_cancelled.wait(), "nobody has seen it leave")


NONSENSE = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *(
                    b"GET / HTTP/1.1\r\n",
                    b"POST / HTTP/1.1\r\n",
                    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                    b"\r\n",
                    b" ",
                ),
                *(
                    b"Host: h\r\n",
                    b"Content-Length: 5\r\n",
                    b"Content-Length: x\r\n",
                    b"Content-Length: 5, 6\r\n",
                ),
                *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: what\r\n", b"Expect: nothing\r\n"),
                *(
                    b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
                    b"5\r\nhello\r\n",
                    b"0\r\n\r\n",
                    b"ZZ\r\n",
                ),
                *(
                    b"\x16\x03\x01\x02\x00",
                    b"\x00\x00\x00\x04\x00",
                    b": \r\n",
                    b"GET http://[ HTTP/1.1\r\n\r\n",
                ),
            ]
        ),
        st.binary(max_size=20),
    ),
    min_size=1,
    max_size=8,
)


async def say(pieces):
    """Say ``pieces`` to a server and nothing more; return all that it answers."""

    def page(status, message):
        return web.Response(status=status, body=orjson.dumps({"status": status, "message": message}))

    loop = asyncio.get_running_loop()
    complaints = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))

    async def handler(request):
        try:
            await request.read()
        except BadBodyError:
            return page(400, "bad body")
        return page(200, "ok")

    relay = RelayServer(handler, 1 << 20, access_log=None, error_page=page, limits=ClientLimits(head_s=0.02))
    server = await loop.create_server(relay, "127.0.0.1", 0)
    client = await RawClient.connect(server.sockets[0].getsockname()[1])
    received = b""
    # Whose words are nonsense may find the connection closed while it talks.
    with suppress(OSError):
        for piece in pieces:
            client.send(piece)
            await asyncio.sleep(0)
        # The end of what it says: a body that will not come need not be waited for here.
        client.writer.write_eof()
        received = await asyncio.wait_for(client.reader.read(), 30.0)
    client.writer.close()
    with suppress(OSError):
        await client.writer.wait_closed()
    server.close()
    await relay.shutdown(0.1)
    return received, complaints


@draws(200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NONSENSE)
@example([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x00\x00\x00\x04\x00"])
@example([b"POST / HTTP/1.1\r\n", b"Transfer-Encoding: chunked\r\n", b"\r\n", b"5\r\nhello\r\n", b"ZZ\r\n"])
def test_whatever_a_client_says_it_hears_answers_in_json_and_the_log_no_traceback(caplog, pieces):
    caplog.clear()
    received, complaints = asyncio.run(say(pieces))
    assert not complaints
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    while received:
        answer, received = read_answer(received, closed=True)
        assert orjson.loads(answer.body)["status"] == answer.status
        assert answer.status in {200, 400, 431, 505}
        assert answer.one(b"server") is None
