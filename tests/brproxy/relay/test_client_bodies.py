"""What relay/client.py leans on in aiohttp to get requests' bodies, piece by piece."""

import asyncio

import pytest
from aiohttp import web

from brproxy.relay.client import Client, body_so_far, continue_upload, forget_body
from brproxy.relay.errors import UnknownExpectationError
from tests.brproxy.wire import as_chunk, get, post

BOTH_LOOPS = True
CHUNKED = b"POST /chunked HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
EXPECT = "Expect: 100-continue"
KIB = 1 << 10
LOOKED_AT = 64 * KIB


def chunks(payload, size):
    pieces = (payload[i : i + size] for i in range(0, len(payload), size))
    return b"".join(map(as_chunk, pieces)) + b"0\r\n\r\n"


class Looking:
    """A handler that answers with the body that it sees without reading, and keeps those."""

    def __init__(self, wait=None):
        self.wait = wait
        self.seen = []

    async def __call__(self, request):
        if self.wait is not None:
            await self.wait(request)
        body = body_so_far(request) if request.body_exists else b""
        self.seen.append(body)
        client = Client(request, 600.0)
        client.begin()
        shown = b"none" if body is None else body
        client.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(shown), shown))
        return client.answered


async def come_whole(request):
    """Wait until the body is there, reading nothing."""
    while not request.content.is_eof():
        await asyncio.sleep(0.001)


async def beginning(request):
    """Wait until some of the body is there."""
    while request.body_exists and not request.content.total_bytes:
        await asyncio.sleep(0.001)


BODIES = {
    "none": (get("/"), b""),
    "empty": (post("/", b""), b""),
    "small": (post("/", b"small"), b"small"),
    "chunked": (CHUNKED + chunks(b"in three chunks", 5), b"in three chunks"),
    "empty chunked": (CHUNKED + chunks(b"", 1), b""),
    "as large as may be": (post("/", bytes(LOOKED_AT)), bytes(LOOKED_AT)),
    "in many chunks": (CHUNKED + chunks(bytes(range(256)) * 40, 1), bytes(range(256)) * 40),
    "compressed": (post("/", b"not gzip", "Content-Encoding: gzip"), b"not gzip"),
}


@pytest.mark.parametrize(("request_bytes", "body"), BODIES.values(), ids=BODIES.keys())
async def test_a_body_can_be_seen_without_reading_and_the_connection_goes_on(
    request_bytes, body, serve, within
):
    seen = Looking(come_whole)
    client = await (await serve(seen))()
    for _ in range(2):
        client.send(request_bytes)
        answer = await within(client.answer(), "a body does not come whole unless it is read")
        assert answer.body == body, "StreamReader._buffer does not hold the body"
    # Pipelined behind it: what was only looked at must not be in the way.
    client.send(request_bytes, request_bytes, get("/end"))
    for expected in (body, body, b""):
        answer = await within(client.answer(), "behind a body that was not read nothing is parsed")
        assert answer.body == expected, "bodies of two requests were mixed up"


@pytest.mark.parametrize(("request_bytes", "body"), BODIES.values(), ids=BODIES.keys())
@pytest.mark.parametrize("is_read", [False, True])
async def test_a_body_that_is_forgotten_is_gone_and_the_connection_goes_on(
    is_read, request_bytes, body, serve, within
):
    left = []

    async def handler(request):
        await come_whole(request)
        seen = await request.read() if is_read else body_so_far(request) if request.body_exists else b""
        forget_body(request)
        # Wherever aiohttp keeps a body, reading it out again shows it.
        left.append(await request.read())
        client = Client(request, 600.0)
        client.begin()
        client.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(seen), seen))
        return client.answered

    client = await (await serve(handler))()
    client.send(request_bytes, request_bytes)
    for _ in range(2):
        answer = await within(client.answer(), "behind a body that was forgotten nothing is parsed")
        assert answer.body == body
    assert left == [b"", b""], "a body is kept somewhere that forget_body does not know"


@pytest.mark.parametrize(("request_bytes", "body"), BODIES.values(), ids=BODIES.keys())
async def test_only_a_request_without_a_body_says_so(request_bytes, body, serve, within):
    async def handler(request):
        return web.Response(text=f"{request.body_exists}")

    client = await (await serve(handler))()
    client.send(request_bytes)
    answer = await within(client.answer(), "there was no answer")
    # An empty body in chunks is one that may still come.
    exists = bool(body) or request_bytes.startswith(CHUNKED)
    assert answer.body == b"%a" % exists, "body_so_far is asked of a reader that has no buffer"


async def test_the_pieces_of_a_body_are_seen_in_order(serve, within):
    seen = Looking(come_whole)
    client = await (await serve(seen))()
    request_bytes = post("/", b"first second")
    for piece in (request_bytes[:-12], b"first ", b"second"):
        client.send(piece)
        await asyncio.sleep(0.01)
    assert (await within(client.answer(), "a body in pieces does not come")).body == b"first second"


async def test_a_body_that_comes_with_its_head_is_whole_when_the_handler_begins(serve, within):
    seen = Looking()
    client = await (await serve(seen))()
    client.send(post("/", b"here"))
    answer = await within(client.answer(), "there was no answer")
    assert answer.body == b"here", "every request would take the slow way: is_eof() comes late now"


@pytest.mark.parametrize("size", [LOOKED_AT + 1, 400 * KIB])
async def test_a_large_body_is_not_looked_at(size, serve, within):
    seen = Looking(come_whole)
    client = await (await serve(seen))()
    client.send(post("/", bytes(size)), get("/next"))
    answer = await within(client.answer(), "the body does not come, although aiohttp should read that much")
    assert answer.body == b"none", "StreamReader.total_bytes does not count what came"
    assert (await within(client.answer(), "nothing is parsed behind it")).body == b""


async def test_a_body_that_is_not_whole_is_not_looked_at(serve, within):
    seen = Looking(beginning)
    client = await (await serve(seen))()
    client.send(post("/", b"half of it")[:-3])
    answer = await within(client.answer(), "total_bytes does not tell of what has come")
    assert answer.body == b"none", "is_eof() is true of a body that is not whole"
    client.send(b" it", get("/next"))
    assert (await within(client.answer(), "the rest was not read off")).body == b""
    assert seen.seen == [None, b""]


async def test_a_body_that_is_looked_at_can_be_read_as_well(serve, within):
    async def handler(request):
        await come_whole(request)
        return web.Response(body=b"%b %b" % (body_so_far(request), await request.read()))

    client = await (await serve(handler))()
    for _ in range(2):
        client.send(post("/", b"abc"))
        assert (await within(client.answer(), "the body was lost by looking")).body == b"abc abc"


@pytest.mark.parametrize("framed", [post("/", bytes(301)), CHUNKED + chunks(bytes(301), 100)])
async def test_a_body_over_the_limit_is_a_413_where_it_is_read(framed, serve, within):
    async def handler(request):
        try:
            await request.read()
        except web.HTTPRequestEntityTooLarge:
            return web.Response(status=413, text="raised")
        return web.Response(text="read")

    client = await (await serve(handler, body_bytes_max=300))()
    client.send(post("/", bytes(300)))
    assert (await within(client.answer(), "there was no answer")).body == b"read", "300 bytes may come"
    client.send(framed)
    answer = await within(client.answer(), "there was no answer")
    assert (answer.status, answer.body) == (413, b"raised"), "client_max_size does not limit read()"


async def read_all(request):
    await continue_upload(request)
    body = await request.read()
    return web.Response(body=body)


async def test_continue_is_answered_once_and_before_the_body(serve, within):
    client = await (await serve(read_all))()
    for _ in range(2):
        client.send(post("/", b"body", EXPECT)[:-4])
        answer = await within(client.answer(), "a client that waits for 100 waits for ever")
        assert answer.status == 100
        await asyncio.sleep(0.01)
        client.send(b"body")
        answer = await within(client.answer(), "there was no answer")
        assert (answer.status, answer.body) == (200, b"body"), "aiohttp answers Expect as well"


async def test_nobody_but_the_relay_answers_an_expectation(serve, within):
    seen = Looking(come_whole)
    client = await (await serve(seen))()
    client.send(post("/", b"body", EXPECT))
    answer = await within(client.answer(), "there was no answer")
    assert answer.status == 200, "aiohttp's low-level server answers Expect by itself now"


@pytest.mark.parametrize("fields", [(), (EXPECT,)])
async def test_where_nothing_is_expected_or_can_be_nothing_is_said(fields, serve, within):
    client = await (await serve(read_all))()
    version = "1.0" if fields else "1.1"
    client.send(post("/", b"body", *fields, version=version))
    answer = await within(client.answer(), "there was no answer")
    assert (answer.status, answer.body) == (200, b"body"), "HTTP/1.0 knows no interim responses"


async def test_another_expectation_is_an_error_and_the_case_does_not_matter(serve, within):
    async def handle(request):
        try:
            return await read_all(request)
        except UnknownExpectationError:
            return web.Response(status=417)

    client = await (await serve(handle))()
    client.send(post("/", b"", "Expect: 100-CONTINUE"))
    assert (await within(client.answer(), "there was no answer")).status == 100
    assert (await within(client.answer(), "there was no answer")).status == 200
    client.send(post("/", b"", "Expect: a-miracle"))
    assert (await within(client.answer(), "there was no answer")).status == 417
