"""What relay/client.py and server.py lean on in aiohttp: another version that differs fails here first."""

import asyncio
import inspect

import pytest
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from brproxy.relay.client import Client
from brproxy.relay.server import ClientProtocol
from tests.brproxy.wire import get

BOTH_LOOPS = True
LARGE = bytes(8 << 20)
"""More than the kernel holds of what a client does not read."""
UPGRADE = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: k")
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"


def reply(client, body=b"ok"):
    """Answer past aiohttp's writer, as forwarding does."""
    client.begin()
    client.write(HEAD % len(body) + body)


class Noted:
    """Follows a client and notes what it is told."""

    def __init__(self):
        self.told = []

    def client_paused(self):
        self.told.append("paused")

    def client_resumed(self):
        self.told.append("resumed")

    def client_gone(self):
        self.told.append("gone")


class Watching:
    """A handler that follows its client and answers with ``body``; it keeps what it saw."""

    def __init__(self, body=b"ok", drain_s=600.0):
        self.body, self.drain_s = body, drain_s
        self.requests, self.clients, self.noted = [], [], []

    async def __call__(self, request):
        client, noted = Client(request, self.drain_s), Noted()
        client.follow(noted)
        self.requests.append(request)
        self.clients.append(client)
        self.noted.append(noted)
        reply(client, self.body)
        return client.answered


async def read_large(client):
    """Read an answer of LARGE; RawClient would look at all of it for each read."""
    assert await client.reader.readexactly(len(HEAD % len(LARGE) + LARGE)) == HEAD % len(LARGE) + LARGE


class Tunnelled:
    """A handler that makes every connection a tunnel once it may; it keeps what came."""

    def __init__(self, pauses=False):
        self.pauses = pauses
        self.may_begin = asyncio.Event()
        self.clients = []
        self.received = b""
        self.reads = 0
        self.cancelled = False

    async def __call__(self, request):
        client = Client(request, 600.0)
        self.clients.append(client)
        try:
            await self.may_begin.wait()
            client.begin()
            client.tunnel(self.receive)
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    def receive(self, data):
        self.received += data
        self.reads += 1
        if self.pauses:
            self.clients[0].pause()


def test_aiohttp_asks_for_the_callbacks_by_these_names():
    for name in ("pause_writing", "resume_writing", "connection_lost"):
        assert callable(getattr(RequestHandler, name, None)), f"RequestHandler has lost {name}"
    assert isinstance(inspect.getattr_static(RequestHandler, "writing_paused", None), property), (
        "RequestHandler.writing_paused is no property any more"
    )
    assert list(inspect.signature(RequestHandler.set_parser).parameters)[:2] == ["self", "parser"]


async def test_a_connection_is_a_client_protocol_with_the_servers_settings(serve, within):
    seen = Watching()
    client = await (await serve(seen, body_bytes_max=123))()
    client.send(get("/"))
    await within(client.answer(), "the request factory was not called as RelayServer expects")
    request = seen.requests[0]
    assert type(request.protocol) is ClientProtocol, "request.protocol is not what the server made"
    assert request.client_max_size == 123, "the request factory was passed over"
    assert request.protocol.access_logger is None, "settings do not reach RequestHandler"
    assert request.transport is request.protocol.transport, "responses would go elsewhere"


async def test_how_fast_the_client_reads_reaches_whoever_follows(serve, within, until):
    seen = Watching(LARGE)
    client = await (await serve(seen))(receive_bytes=1 << 16)
    client.writer.transport.pause_reading()
    client.send(get("/"))
    paused = until(lambda: seen.noted and seen.noted[0].told)
    await within(paused, "pause_writing does not reach ClientProtocol")
    assert seen.clients[0].is_paused, "writing_paused does not follow pause_writing"
    client.writer.transport.resume_reading()
    await within(read_large(client), "the response did not come")
    resumed = until(lambda: seen.noted[0].told == ["paused", "resumed"])
    await within(resumed, "resume_writing does not reach ClientProtocol")
    assert not seen.clients[0].is_paused, "writing_paused does not follow resume_writing"


async def test_whoever_follows_a_client_that_is_paused_is_told_at_once_and_after_finish_no_more(
    serve, within, until
):
    late, early = Noted(), Noted()

    async def handler(request):
        client = Client(request, 600.0)
        client.follow(early)
        client.finish()
        reply(client, LARGE)
        client.follow(late)
        return client.answered

    client = await (await serve(handler))(receive_bytes=1 << 16)
    client.writer.transport.pause_reading()
    client.send(get("/"))
    await within(until(lambda: late.told), "a client that is paused already is not known to be")
    assert (early.told, late.told) == ([], ["paused"])


@pytest.mark.parametrize("reset", [True, False])
async def test_leaving_is_told_first_and_then_cancels_the_handler(reset, serve, within, until):
    order = []

    async def handler(request):
        task = asyncio.current_task()
        noted = Noted()
        noted.client_gone = lambda: order.append(("gone", task.cancelling(), request.transport is None))
        Client(request, 600.0).follow(noted)
        order.append("here")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            order.append("cancelled")
            with pytest.raises(ConnectionResetError):
                Client(request, 600.0)
            order.append("no transport")
            raise

    client = await (await serve(handler))()
    client.send(get("/"))
    await within(until(lambda: order), "the handler was not called")
    client.writer.transport.abort() if reset else client.writer.close()
    told = until(lambda: len(order) > 1)
    await within(told, "connection_lost does not reach ClientProtocol")
    assert order[1] == ("gone", 0, False), "connection_lost comes when aiohttp has acted on it already"
    await within(until(lambda: "cancelled" in order), "a handler outlives its client")
    assert order[2:] == ["cancelled", "no transport"], "request.transport is still there"


async def test_a_response_is_asked_for_nothing_but_what_answered_has(serve, within):
    asked = []

    class Asked:
        def __init__(self, response):
            self.response = response

        def __getattribute__(self, name):
            if name != "response":
                asked.append(name)
                return getattr(object.__getattribute__(self, "response"), name)
            return object.__getattribute__(self, name)

    async def handler(request):
        client = Client(request, 600.0)
        reply(client)
        return Asked(client.answered)

    client = await (await serve(handler))()
    for _ in range(2):
        client.send(get("/"))
        await within(client.answer(), f"aiohttp does not go on; it asked the response for {asked}")
    # The last is asked with a default.
    known = {"prepare", "write_eof", "keep_alive", "__http_exception__"}
    assert set(asked) <= known, f"aiohttp asks a response for {set(asked) - known} now"
    assert asked.index("prepare") < asked.index("write_eof") < asked.index("keep_alive")


async def test_an_answer_that_says_so_ends_the_connection(serve, within):
    async def handler(request):
        client = Client(request, 600.0)
        reply(client)
        client.keep_alive = "stay" in request.path
        return client.answered

    client = await (await serve(handler))()
    client.send(get("/stay"), get("/go"))
    for _ in range(2):
        await within(client.answer(), "keep_alive of the response was not kept to")
    assert await within(client.ended(), "keep_alive=False no longer ends the connection")


@pytest.mark.parametrize(
    ("request_bytes", "http10", "keep_alive"),
    [
        (get("/"), False, True),
        (get("/", "Connection: close"), False, False),
        (get("/", version="1.0"), True, False),
        (get("/", "Connection: keep-alive", version="1.0"), True, True),
    ],
)
async def test_what_the_client_can_and_wants(request_bytes, http10, keep_alive, serve, within):
    seen = Watching()
    client = await (await serve(seen))()
    client.send(request_bytes)
    await within(client.answer(), "there was no answer")
    assert (seen.clients[0].is_http10, seen.clients[0].keep_alive) == (http10, keep_alive), (
        "BaseRequest.version or keep_alive tell something else now"
    )
    if not keep_alive:
        assert await within(client.ended(), "the connection stays")


async def test_no_error_page_comes_behind_a_response_that_has_begun(serve, within, caplog):
    async def handler(request):
        client = Client(request, 600.0)
        if "begin" in request.path:
            client.begin()
            client.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nso far")
        raise ValueError("a bug")

    connect = await serve(handler)
    client = await connect()
    client.send(get("/none"))
    answer = await within(client.answer(), "there is no error page at all")
    assert answer.status == 500
    client = await connect()
    client.send(get("/begin"))
    received = await within(client.reader.read(), "the connection does not end")
    assert received.endswith(b"so far"), f"output_size does not keep aiohttp from writing {received!r}"
    assert "a bug" in caplog.text


async def test_output_size_is_a_plain_number_that_counts_from_nothing(serve, within):
    sizes = []

    async def handler(request):
        sizes.append(request.writer.output_size)
        Client(request, 600.0).begin()
        sizes.append(request.writer.output_size)
        return web.Response(text="ok")

    client = await (await serve(handler))()
    client.send(get("/"))
    await within(client.answer(), "writer.output_size cannot be set")
    assert sizes == [0, 1]


async def test_pages_and_answers_keep_their_order(serve, within):
    async def handler(request):
        if "page" in request.path:
            return web.Response(text="page")
        client = Client(request, 600.0)
        await asyncio.sleep(0.001)
        reply(client)
        return client.answered

    client = await (await serve(handler))()
    client.send(get("/a"), get("/page"), get("/b"), get("/page"))
    bodies = [(await within(client.answer(), "an answer is missing")).body for _ in range(4)]
    assert bodies == [b"ok", b"page", b"ok", b"page"], "aiohttp's writer buffers what it used to write"


async def test_the_next_request_waits_for_a_client_that_does_not_read(serve, within, until):
    seen = Watching(LARGE)
    client = await (await serve(seen))(receive_bytes=1 << 16)
    client.writer.transport.pause_reading()
    client.send(get("/") * 2)
    await within(until(lambda: seen.noted and seen.noted[0].told), "the client is not paused")
    await asyncio.sleep(0.02)
    assert len(seen.requests) == 1, "write_eof is not waited for, or writer.drain() does not wait"
    client.writer.transport.resume_reading()
    for _ in range(2):
        await within(read_large(client), "writer.drain() does not return when the client has read")


async def test_a_client_that_does_not_read_in_time_is_disconnected(serve, within, until):
    seen = Watching(LARGE, drain_s=0.02)
    client = await (await serve(seen))(receive_bytes=1 << 16)
    client.writer.transport.pause_reading()
    client.send(get("/"))
    gone = until(lambda: seen.noted and seen.noted[0].told == ["paused", "gone"])
    await within(gone, "writer.drain() returns without waiting, or a client that never reads stays")
    assert not seen.clients[0].keep_alive


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ((), False),
        (("Connection: Upgrade",), False),
        (("Upgrade: websocket",), False),
        (UPGRADE, True),
        (("Connection: keep-alive, upgrade", "Upgrade: WebSocket"), True),
        (("Connection: Upgrade", "Upgrade: h2c"), False),
        (("Connection: Upgrade", "Upgrade: websocket", "Upgrade: h2c"), False),
        (("Connection: Upgrade", "Upgrade: websocket, h2c"), False),
        (("Connection: Upgrade", "Upgrade: tls/1.0"), False),
    ],
)
async def test_an_upgrade_is_told_by_the_message(fields, wanted, serve, within):
    seen = []

    async def handler(request):
        client = Client(request, 600.0)
        client.names_upgrade(",".join(request.headers.getall("Upgrade", [])).encode())
        seen.append(client.wants_upgrade)
        reply(client)
        return client.answered

    client = await (await serve(handler))()
    for number in (1, 2):
        client.send(get("/", *fields))
        await within(client.answer(), "after an upgrade that was not made aiohttp does not parse on")
        assert seen == [wanted] * number, "BaseRequest._message.upgrade tells something else now"


async def test_a_tunnel_gets_every_byte_as_it_came(serve, within, until):
    seen = Tunnelled()
    client = await (await serve(seen))()
    client.send(get("/", *UPGRADE), b"with the head ")
    await within(until(lambda: seen.clients), "the handler was not called")
    client.send(b"before the tunnel ")
    await asyncio.sleep(0.01)
    assert not seen.received
    seen.may_begin.set()
    early = b"with the head before the tunnel "
    await within(until(lambda: seen.received == early), f"set_parser loses what came early: {seen.received}")
    for said in (b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", b"\x81\x80\x00", bytes(range(256)) * 4096):
        seen.received = b""
        client.send(said)
        came = until(lambda said=said: seen.received == said)
        await within(came, "set_parser does not hand over the bytes as they came")
    assert len(seen.clients) == 1, "what a tunnel carries was taken for a request"
    client.writer.close()
    await within(until(lambda: seen.cancelled), "the end of a tunnel does not cancel its handler")


async def test_what_comes_too_early_for_a_tunnel_is_bounded_and_not_lost(serve, within, until):
    seen = Tunnelled()
    client = await (await serve(seen))()
    client.send(get("/", *UPGRADE), LARGE)
    await within(until(lambda: seen.clients), "the handler was not called")
    stopped = until(lambda: not seen.clients[0].transport.is_reading())
    await within(stopped, "aiohttp reads on and on before there is a tunnel")
    seen.may_begin.set()
    await within(until(lambda: len(seen.received) == len(LARGE)), "set_parser does not read on")


@pytest.mark.parametrize("early_bytes", [1, 1 << 20])
async def test_in_a_tunnel_nobody_else_decides_when_to_read(early_bytes, serve, within, until):
    seen = Tunnelled(pauses=True)
    client = await (await serve(seen))()
    client.send(get("/", *UPGRADE), bytes(early_bytes))
    await within(until(lambda: seen.clients), "the handler was not called")
    await asyncio.sleep(0.02)
    seen.may_begin.set()
    await within(until(lambda: seen.reads), "set_parser loses what came early")
    client.send(b"more")
    await asyncio.sleep(0.02)
    assert seen.reads == 1, "aiohttp reads although the client is paused"
    seen.pauses = False
    seen.clients[0].resume()
    came = until(lambda: len(seen.received) == early_bytes + 4)
    await within(came, "a client that is resumed is not read")
