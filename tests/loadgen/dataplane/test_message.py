"""HTTP messages that arrive in pieces."""

import pytest

from loadgen.dataplane.message import HEAD_BYTES_MAX, Message, MessageError, parse_head

CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n"
CHUNKED = CHUNKED_HEAD + b"5;x=y\r\nhello\r\nA\r\n, world!!!\r\n0\r\nT: 1\r\n\r\n"
SIZED = b"POST /x HTTP/1.1\r\ncontent-length: 4\r\nConnection: close\r\n\r\nbody"


def read(data, step, until_close=True):
    message, body = Message(until_close=until_close), b""
    for at in range(0, len(data), step):
        body += message.feed(data[at : at + step])
    return message, body


@pytest.mark.parametrize("step", [1, 3, 7, 1000])
def test_bodies_in_pieces_of_any_size(step):
    message, body = read(CHUNKED, step)
    assert (message.complete, body, message.rest) == (True, b"hello, world!!!", b"")
    message, body = read(SIZED, step, until_close=False)
    assert (message.complete, body) == (True, b"body")
    assert message.head.start_line == b"POST /x HTTP/1.1"


def test_what_follows_a_message_is_kept():
    for data in (CHUNKED, SIZED, b"GET / HTTP/1.1\r\n\r\n"):
        message, _ = read(data + b"GET /next", 1000, until_close=False)
        assert (message.complete, message.rest) == (True, b"GET /next")


def test_a_boundary_is_between_two_chunks():
    message = Message(until_close=True)
    whole = []
    for count, byte in enumerate(CHUNKED, 1):
        message.feed(bytes([byte]))
        if message.at_boundary:
            whole.append(count)
    assert whole == [CHUNKED.index(part) + len(part) for part in (b"\r\n\r\n", b"hello\r\n", b"!!!\r\n")]


def test_a_body_may_end_with_the_connection():
    message, body = read(b"HTTP/1.0 200 OK\r\n\r\nall of it", 4)
    assert (message.complete, message.closes, body) == (False, True, b"all of it")
    message.end()
    assert message.complete


def test_who_closes():
    assert parse_head(b"HTTP/1.1 200 OK\r\nConnection: close").close
    assert parse_head(b"HTTP/1.0 200 OK").close
    assert not parse_head(b"HTTP/1.1 200 OK\r\nConnection: keep-alive").close
    assert not read(CHUNKED, 1000)[0].closes


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200", CHUNKED[:-1], CHUNKED[:60], SIZED[:-1]])
def test_an_unclean_end(data):
    message = Message(until_close=True)
    message.feed(data)
    with pytest.raises(MessageError, match="the connection ended before the message"):
        message.end()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", "not a size"),
        (CHUNKED.replace(b"5;x=y", b"five"), "not a size"),
        (CHUNKED.replace(b"hello\r\n", b"hello you\r\n"), "where a chunk ends"),
        (b"x" * (HEAD_BYTES_MAX + 1), "a head of more than"),
        (CHUNKED_HEAD + b"1" * (HEAD_BYTES_MAX + 1), "does not end"),
    ],
)
def test_no_message(data, words):
    with pytest.raises(MessageError, match=words):
        Message(until_close=True).feed(data)
