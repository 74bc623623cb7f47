"""Responses of workers: whatever frames them, however they are cut."""

from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.relay.errors import BrokenResponseError
from brproxy.relay.response import ResponseHead, ResponseParser

HEAD_BYTES_MAX = 4096


@dataclass
class Response:
    """A response as a worker sends it, and what should be understood of it."""

    raw: bytes
    status: int
    body: bytes
    trailers: bytes
    interim: list
    keep_alive: bool
    until_close: bool
    bodiless: bool


FRAMINGS = ("length", "chunked", "close", "none", "head")
NAMES = st.sampled_from(["X-A", "server", "Content-Type", "Date"])
VALUES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=12)


@st.composite
def responses(draw):
    framing = draw(st.sampled_from(FRAMINGS))
    status = draw(st.sampled_from([204, 304] if framing == "none" else [200, 201, 404, 503]))
    fields = draw(st.lists(st.tuples(NAMES, VALUES), max_size=4))
    interim = draw(st.lists(st.sampled_from([100, 103]), max_size=2))
    body = b"" if framing in {"none", "head"} else draw(st.binary(max_size=200))
    closes = framing == "close" or draw(st.booleans())
    lines = [f"{name}: {value}\r\n" for name, value in fields]
    if closes:
        lines.append("Connection: close\r\n")
    trailers = b""
    if framing in {"length", "head"}:
        lines.append(f"Content-Length: {len(body) if framing == 'length' else 7}\r\n")
        framed = body
    elif framing == "chunked":
        lines.append("Transfer-Encoding: chunked\r\n")
        trailers = draw(st.sampled_from([b"", b"X-T: 1\r\n"]))
        framed = chunks(draw, body) + b"0\r\n" + trailers + b"\r\n"
    else:
        framed = body
    before = b"".join(b"HTTP/1.1 %d Early\r\nLink: x\r\n\r\n" % code for code in interim)
    head = f"HTTP/1.1 {status} Some reason\r\n{''.join(lines)}\r\n".encode()
    return Response(
        before + head + framed,
        status,
        body,
        trailers,
        interim,
        not closes,
        framing == "close",
        framing == "head",
    )


def chunks(draw, body):
    framed = b""
    while body:
        size = draw(st.integers(1, len(body)))
        extension = draw(st.sampled_from([b"", b";a=b"]))
        framed += b"%x%b\r\n%b\r\n" % (size, extension, body[:size])
        body = body[size:]
    return framed


def read(parser, raw, cuts):
    body, start = b"", 0
    for cut in [*sorted(cuts), len(raw)]:
        if cut > start:
            body += parser.feed(raw[start:cut])
        start = max(start, cut)
    return body


def understood(response, cuts):
    parser = ResponseParser(HEAD_BYTES_MAX)
    parser.expect(bodiless=response.bodiless)
    body = read(parser, response.raw, cuts)
    assert parser.head.status == response.status
    assert parser.head.reason == b"Some reason"
    assert body == response.body
    assert parser.trailers == response.trailers
    assert [head.status for head in parser.interim] == response.interim
    assert parser.ends_with_connection() == response.until_close
    assert parser.complete != response.until_close
    if parser.complete:
        assert parser.keep_alive == response.keep_alive


@given(responses(), st.lists(st.integers(0, 600), max_size=8))
def test_a_response_is_the_same_however_it_is_cut(response, cuts):
    understood(response, [cut for cut in cuts if cut < len(response.raw)])


@given(responses())
def test_even_byte_by_byte(response):
    understood(response, list(range(len(response.raw))))


@given(st.lists(responses().filter(lambda r: not r.until_close), min_size=1, max_size=4))
def test_one_parser_reads_one_response_after_another(several):
    parser = ResponseParser(HEAD_BYTES_MAX)
    for response in several:
        parser.expect(bodiless=response.bodiless)
        body = parser.feed(response.raw)
        assert (parser.head.status, body, parser.complete) == (response.status, response.body, True)
        if not parser.keep_alive:
            break


@given(responses(), responses())
def test_a_second_response_to_one_request_is_not_read(first, second):
    if first.until_close or first.bodiless:
        return
    parser = ResponseParser(HEAD_BYTES_MAX)
    parser.expect(bodiless=False)
    body = parser.feed(first.raw + second.raw)
    assert (parser.head.status, body, parser.complete) == (first.status, first.body, True)
    assert not parser.keep_alive, "nobody may read on from there"


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nbad name: x\r\n\r\n",
    ],
)
def test_what_is_no_http_is_an_error(raw):
    parser = ResponseParser(HEAD_BYTES_MAX)
    with pytest.raises(BrokenResponseError, match="no valid HTTP response: "):
        parser.feed(raw)


def feed_all(parser, pieces):
    for piece in pieces:
        parser.feed(piece)


def test_a_head_without_an_end_is_an_error():
    field = b"X-A: " + b"x" * 100 + b"\r\n"
    with pytest.raises(BrokenResponseError, match="the response's head is longer than 1024 bytes"):
        feed_all(ResponseParser(1024), [b"HTTP/1.1 200 OK\r\n", *[field] * 10_000])


def test_trailers_without_an_end_are_an_error():
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    with pytest.raises(BrokenResponseError, match="trailer section is longer than 1024 bytes"):
        feed_all(ResponseParser(1024), [head, *[b"X-A: " + b"x" * 100 + b"\r\n"] * 100])


def test_an_upgrade_hands_out_what_is_behind_it():
    parser = ResponseParser(HEAD_BYTES_MAX)
    raw = b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x02hi"
    assert parser.feed(raw) == b""
    assert (parser.head.status, parser.upgraded_rest) == (101, b"\x81\x02hi")


@pytest.mark.parametrize(
    ("data", "between"),
    [
        (b"3\r\nabc\r\n", True),
        (b"3\r\nabc", False),
        (b"3\r\n", False),
        (b"3\r\nabc\r\n5", False),
        (b"3\r", False),
    ],
)
def test_where_a_chunk_begins(data, between):
    parser = ResponseParser(HEAD_BYTES_MAX)
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    parser.feed(head)
    assert parser.is_between_chunks(head)
    parser.feed(data)
    assert parser.is_between_chunks(data) == between


@given(
    st.sampled_from(["http://worker:1", "HTTP://worker:1", "//worker:1"]), st.text("/\\?#.:@\ta", max_size=8)
)
def test_a_place_at_the_worker_leads_nowhere_else(origin, rest):
    head = ResponseHead(307, b"", b"Location: %b\r\n" % (origin + rest).encode(), {}, None, chunked=False)
    lines = head.relative_to("http://worker:1").lines
    place = lines.removeprefix(b"Location: ").removesuffix(b"\r\n").decode()
    if rest and rest[0] not in "/?#":
        # Part of another host's name, or nothing that is known.
        assert place == origin + rest
        return
    # What browsers make of it (WHATWG URL, section 4.4): no tabs, and a backslash is a slash.
    seen = urljoin("http://proxy/v1/x?y", place.replace("\t", "").replace("\\", "/"))
    assert urlsplit(seen).netloc == "proxy"
    assert place in {rest, "/." + rest, "/" + rest}


@pytest.mark.parametrize(
    ("place", "seen"),
    [
        ("http://worker:1/base/x", "/x"),
        ("HTTP://Worker:1/base/x", "/x"),
        ("//worker:1/base?q", "/?q"),
        ("http://worker:1/base", "/"),
        ("/base/x", "/x"),
        ("/base", "/"),
        ("/base//evil/x", "/.//evil/x"),
        ("http://worker:1/base//evil", "/.//evil"),
        # What is not below the base cannot be reached through the proxy.
        ("/basement/x", "/basement/x"),
        ("/Base/x", "/Base/x"),
        ("/other/base/x", "/other/base/x"),
        ("http://worker:1/other", "http://worker:1/other"),
        ("http://other:1/base/x", "http://other:1/base/x"),
        ("x/y", "x/y"),
    ],
)
@pytest.mark.parametrize("name", ["Location", "content-location"])
def test_a_place_below_a_base_path_is_found_without_it(name, place, seen):
    lines = f"X: y\r\n{name}: {place}\r\nZ: /base/z\r\n".encode()
    head = ResponseHead(307, b"", lines, {}, None, chunked=False)
    told = head.relative_to("http://worker:1/base").lines
    assert told == f"X: y\r\n{name}: {seen}\r\nZ: /base/z\r\n".encode()
