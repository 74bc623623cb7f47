"""How a response is framed for the client: the head, the pieces of the body, the end. Pure.

The body's bytes never change. A chunked response stays chunked (one chunk for each read), a length stays a
length; only where the client cannot read what the worker sent, or where the body is rewritten, does the
framing change (RFC 9112, section 6).
"""

from __future__ import annotations

from enum import Enum, auto
from functools import lru_cache

from brproxy.relay.response import ResponseHead


class Framing(Enum):
    """What tells a client where the body ends."""

    NONE = auto()
    LENGTH = auto()
    CHUNKED = auto()
    UNTIL_CLOSE = auto()


# As plain names: looking a member of an enumeration up costs more than comparing it.
NONE, LENGTH, CHUNKED, UNTIL_CLOSE = Framing


def choose_framing(head: ResponseHead, *, http10: bool, bodiless: bool, rewritten: bool) -> Framing:
    """Return the framing for a client.

    ``http10``: it knows no chunks. ``bodiless``: it asked with HEAD. ``rewritten``: the body may become
    shorter than its Content-Length says.
    """
    if bodiless or head.has_no_body:
        return NONE
    if head.length is not None and not rewritten:
        return LENGTH
    return UNTIL_CLOSE if http10 else CHUNKED


def response_head(
    head: ResponseHead, framing: Framing, *, keep_alive: bool, http10: bool, more: bytes = b""
) -> bytes:
    """Return the head for a client; ``more`` are further lines."""
    if framing is CHUNKED:
        more += b"Transfer-Encoding: chunked\r\n"
    elif framing is not UNTIL_CLOSE and head.length is not None:
        more += b"Content-Length: " + head.length + b"\r\n"
    if not keep_alive:
        more += b"Connection: close\r\n"
    elif http10:
        more += b"Connection: keep-alive\r\n"
    return b"".join((_status_line(head.status, head.reason), head.lines, more, b"\r\n"))


@lru_cache(maxsize=64)
def _status_line(status: int, reason: bytes) -> bytes:
    return b"HTTP/1.1 %d %b\r\n" % (status, reason)


def interim_head(head: ResponseHead) -> bytes:
    """Return the bytes of a 1xx response."""
    return b"HTTP/1.1 %d %b\r\n%b\r\n" % (head.status, head.reason, head.lines)


def upgrade_head(head: ResponseHead) -> bytes:
    """Return the bytes of a 101 response, with the fields that make it one."""
    protocol = head.known.get(b"upgrade", b"")
    lines = b"Connection: Upgrade\r\nUpgrade: %b\r\n" % protocol
    return b"HTTP/1.1 101 %b\r\n%b%b\r\n" % (head.reason, head.lines, lines)


def chunk(payload: bytes) -> bytes:
    """Return ``payload`` (not empty: that would be the end) as one chunk."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def _size_lines(read_bytes_max: int) -> tuple[bytes, ...]:
    lines = [b"none"] * (read_bytes_max + 1)
    for payload_bytes in range(1, read_bytes_max):
        line = b"%x\r\n" % payload_bytes
        chunk_bytes = len(line) + payload_bytes + 2
        if chunk_bytes <= read_bytes_max:
            lines[chunk_bytes] = line
    return tuple(lines)


ONE_CHUNK_BYTES_MAX = 4096
SIZE_LINES = _size_lines(ONE_CHUNK_BYTES_MAX)
"""By the length of a whole chunk, the line that it must begin with; b"none" where no chunk has that length.

A read that starts where a chunk starts, and begins with the line for its length, is exactly that chunk.
"""


def last_chunk(trailers: bytes) -> bytes:
    """Return the end of a chunked body; ``trailers`` are lines."""
    return b"0\r\n%b\r\n" % trailers
