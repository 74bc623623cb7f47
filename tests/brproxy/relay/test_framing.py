"""How a response is framed for a client."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.relay.framing import (
    ONE_CHUNK_BYTES_MAX,
    SIZE_LINES,
    Framing,
    choose_framing,
    chunk,
    interim_head,
    last_chunk,
    response_head,
    upgrade_head,
)
from brproxy.relay.response import ResponseHead


def head(status=200, *, length=None, chunked=False, known=None):
    return ResponseHead(status, b"OK", b"A: b\r\n", known or {}, length, chunked)


@pytest.mark.parametrize(
    ("of_worker", "http10", "bodiless", "rewritten", "framing"),
    [
        (head(length=b"3"), False, False, False, Framing.LENGTH),
        (head(length=b"3"), True, False, False, Framing.LENGTH),
        (head(length=b"3"), False, False, True, Framing.CHUNKED),
        (head(length=b"3"), True, False, True, Framing.UNTIL_CLOSE),
        (head(length=b"3"), False, True, False, Framing.NONE),
        (head(chunked=True), False, False, False, Framing.CHUNKED),
        (head(chunked=True), True, False, False, Framing.UNTIL_CLOSE),
        (head(), False, False, False, Framing.CHUNKED),
        (head(204), False, False, False, Framing.NONE),
        (head(304, length=b"3"), False, False, False, Framing.NONE),
    ],
)
def test_the_framing_that_a_client_gets(of_worker, http10, bodiless, rewritten, framing):
    assert choose_framing(of_worker, http10=http10, bodiless=bodiless, rewritten=rewritten) is framing


@pytest.mark.parametrize(
    ("of_worker", "framing", "keep_alive", "http10", "lines"),
    [
        (head(length=b"3"), Framing.LENGTH, True, False, b"Content-Length: 3\r\n"),
        (head(length=b"3"), Framing.NONE, True, False, b"Content-Length: 3\r\n"),
        (head(length=b"3"), Framing.CHUNKED, True, False, b"Transfer-Encoding: chunked\r\n"),
        (head(length=b"3"), Framing.UNTIL_CLOSE, False, True, b"Connection: close\r\n"),
        (head(length=b"3"), Framing.LENGTH, True, True, b"Content-Length: 3\r\nConnection: keep-alive\r\n"),
        (head(204), Framing.NONE, False, False, b"Connection: close\r\n"),
    ],
)
def test_heads(of_worker, framing, keep_alive, http10, lines):
    status = b"HTTP/1.1 %d OK\r\n" % of_worker.status
    made = response_head(of_worker, framing, keep_alive=keep_alive, http10=http10, more=b"M: n\r\n")
    assert made == status + b"A: b\r\nM: n\r\n" + lines + b"\r\n"


def test_heads_of_other_kinds():
    assert interim_head(head(103)) == b"HTTP/1.1 103 OK\r\nA: b\r\n\r\n"
    upgraded = upgrade_head(head(101, known={b"upgrade": b"websocket"}))
    assert upgraded == b"HTTP/1.1 101 OK\r\nA: b\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


def test_chunks():
    assert chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"
    assert last_chunk(b"") == b"0\r\n\r\n"
    assert last_chunk(b"A: b\r\n") == b"0\r\nA: b\r\n\r\n"


@given(st.integers(1, 2 * ONE_CHUNK_BYTES_MAX))
def test_a_whole_chunk_begins_with_the_line_for_its_length(payload_bytes):
    whole = chunk(b"p" * payload_bytes)
    if len(whole) <= ONE_CHUNK_BYTES_MAX:
        assert whole.startswith(SIZE_LINES[len(whole)])


def test_no_line_fits_a_length_that_no_chunk_has():
    lengths = {len(chunk(b"p" * n)) for n in range(1, ONE_CHUNK_BYTES_MAX)}
    for length, line in enumerate(SIZE_LINES):
        assert line.endswith(b"\r\n") == (length in lengths), length
