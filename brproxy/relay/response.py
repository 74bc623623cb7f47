"""A worker's response, read with httptools: head, body and end, whatever frames it. Pure.

``feed`` takes bytes as they come and returns the body bytes in them. The framing is tracked by the parser,
chunk by chunk; no search for something that looks like an end.
"""

from __future__ import annotations

import re
from functools import partial
from http import HTTPStatus
from typing import NamedTuple

import httptools

from brproxy.relay.errors import BrokenResponseError
from brproxy.relay.fields import NOT_IN_TRAILERS, response_fields

# As plain numbers: looking a member of an enumeration up costs more than comparing it.
_INTERIM = int(HTTPStatus.CONTINUE)
_FINAL = int(HTTPStatus.OK)
_UPGRADED = int(HTTPStatus.SWITCHING_PROTOCOLS)
_NO_BODY = frozenset({int(HTTPStatus.NO_CONTENT), int(HTTPStatus.NOT_MODIFIED)})

_CONTROLS = bytes({*range(0x20), 0x7F} - {0x09})
"""What no reason phrase may hold (RFC 9112, section 4), and parsers let pass."""

_NOTHING_KNOWN: dict[bytes, bytes] = {}

_READ_BYTES_MAX = 1 << 18
"""Event loops hand over at most this much at once; a head may be complete only at its end."""


def _as_path(place: re.Match[bytes]) -> bytes:
    """Return the field's name and how the path begins that leads to ``place`` at whoever is asked."""
    # A path that begins with two slashes, or what browsers take for them, would name another host
    # (RFC 3986, section 4.2); with a dot segment in front it is a path.
    return place[1] + (b"/" if place[2] is None else b"/./")


class ResponseHead(NamedTuple):
    """Status and header fields of a response.

    ``lines`` are the fields that cross to a client; ``known`` are all by lower-case name. ``length`` is the
    Content-Length, None without one; ``chunked``: that is how the body is framed.
    """

    status: int
    reason: bytes
    lines: bytes
    known: dict[bytes, bytes]
    length: bytes | None
    chunked: bool

    @property
    def media_type(self) -> bytes:
        """The content type without parameters, in lower case; empty without one."""
        return self.known.get(b"content-type", b"").partition(b";")[0].strip().lower()

    @property
    def is_encoded(self) -> bool:
        """Whether the body is compressed, or otherwise not what its content type says."""
        return self.known.get(b"content-encoding", b"identity").lower() != b"identity"

    def relative_to(self, worker: str) -> ResponseHead:
        """Return the head with places at ``worker``, its URL, as paths: clients find them here.

        A place is a Location or a Content-Location (RFC 9110, sections 10.2.2 and 8.7). Of a worker with a
        base path only places below that can be reached, and the path is theirs without it.
        """
        scheme, _, rest = worker.encode("latin-1").partition(b"://")
        authority, slash, path = rest.partition(b"/")
        host = b"(?:%b:)?//%b" % (re.escape(scheme), re.escape(authority))
        # A path is not the same in other letters.
        begin = b"(?:%b)?(?-i:%b)" % (host, re.escape(slash + path)) if path else host
        place = rb"(?im)^((?:content-)?location: *)%b(?=[/?#\r])/?(?=([/\\\t])?)"
        return self._replace(lines=re.sub(place % begin, _as_path, self.lines))

    def framing_only(self) -> ResponseHead:
        """Return a head without fields that frames the body in the same way."""
        return ResponseHead(self.status, b"", b"", _NOTHING_KNOWN, self.length, self.chunked)

    @property
    def is_framed(self) -> bool:
        """Whether something else than the connection's end tells where the body ends."""
        return self.chunked or self.length is not None

    @property
    def has_no_body(self) -> bool:
        """Whether a response with this status never has a body (RFC 9110, section 6.4.1)."""
        return self.status in _NO_BODY


class ResponseParser:
    """Reads one response after another from the bytes of one connection.

    After ``feed``: ``head`` is there once the head is complete, ``complete`` once the whole response is,
    ``keep_alive`` then tells whether another may follow. ``interim`` are the heads of 1xx responses that came
    first; ``upgraded_rest`` the bytes behind a 101 head. ``trailers`` are lines ready to be sent.
    """

    __slots__ = (
        "_bodiless",
        "_fields",
        "_head_bytes",
        "_head_bytes_max",
        "_in_trailers",
        "_open_chunk",
        "_parser",
        "_reason",
        "complete",
        "feed_body",
        "head",
        "interim",
        "keep_alive",
        "on_body",
        "on_chunk_complete",
        "on_chunk_header",
        "pieces",
        "trailers",
        "upgraded_rest",
    )

    def __init__(self, head_bytes_max: int) -> None:
        self._head_bytes_max = head_bytes_max
        self.pieces: list[bytes] = []
        # What httptools calls for each piece of a body: no frame of ours is on the way.
        self.on_body = self.pieces.append
        # The same for where chunks begin and end: something is in here between the two.
        self._open_chunk: list[None] = []
        self.on_chunk_header = partial(self._open_chunk.append, None)
        self.on_chunk_complete = self._open_chunk.clear
        self._restart()
        self.expect(bodiless=False)

    def _restart(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.feed_body = self._parser.feed_data

    def expect(self, *, bodiless: bool) -> None:
        """Get ready for the next response; ``bodiless``: it answers a HEAD request."""
        self._bodiless = bodiless
        self._fields: list[tuple[bytes, bytes]] = []
        self._reason = b""
        self._head_bytes = 0
        self._in_trailers = False
        self._open_chunk.clear()
        self.head: ResponseHead | None = None
        self.interim: list[ResponseHead] = []
        self.complete = False
        self.keep_alive = False
        self.trailers = b""
        self.upgraded_rest: bytes | None = None

    def feed(self, data: bytes) -> bytes:
        """Take in bytes and return the body bytes in them, b"" for none; raises BrokenResponseError."""
        overrun = False
        try:
            self.feed_body(data)
        except httptools.HttpParserUpgrade as upgrade:
            self.upgraded_rest = data[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            # After a bodiless response its length may have led the parser on.
            overrun = self._bodiless and self.head is not None
            if self.complete:
                self.overrun()
            elif not overrun:
                raise broken(error) from error
        if self.head is None:
            self._head_bytes += len(data)
            if self._head_bytes > self._head_bytes_max + _READ_BYTES_MAX:
                self._too_long("head")
        elif self._bodiless:
            return self._end_without_body(overrun=overrun)
        return self.take_body()

    def take_body(self) -> bytes:
        """Return the body bytes that have come, b"" for none.

        For the ordinary read: once ``head`` is there, ``feed_body`` and this do what ``feed`` does at half
        the cost; ``feed_body`` raises httptools.HttpParserError.
        """
        pieces = self.pieces
        if len(pieces) == 1:
            return pieces.pop()
        body = b"".join(pieces)
        pieces.clear()
        return body

    def is_between_chunks(self, data: bytes) -> bool:
        """Tell whether a chunk ends, and the next has not begun, where the last bytes fed, ``data``, end."""
        # Of what may stand between two chunks only the size line is left: it would not end like this.
        # A body without chunks may hold what looks like one.
        head = self.head
        return head is not None and head.chunked and not self._open_chunk and data.endswith(b"\r\n")

    def overrun(self) -> None:
        """Note that bytes came behind the complete response: it is whole, but no other may follow."""
        self.keep_alive = False

    def ends_with_connection(self) -> bool:
        """Tell whether the end of the connection now is the end of the response."""
        head = self.head
        return head is not None and not self.complete and not head.is_framed

    def forget_fields(self) -> None:
        """Keep of ``head``, which somebody has taken, what frames the body."""
        if self.head is not None:
            self.head = self.head.framing_only()

    def _end_without_body(self, *, overrun: bool) -> bytes:
        if not self.complete:
            self.complete = True
            self.keep_alive = self._parser.should_keep_alive()
        # Bytes behind the head are no part of it, nor of whatever would be asked for next.
        if overrun or self.pieces or self._open_chunk:
            self.keep_alive = False
        self.pieces.clear()
        # The parser waits for the body that the length announces: it cannot be used again.
        self._restart()
        return b""

    def _too_long(self, what: str) -> None:
        msg = f"the response's {what} is longer than {self._head_bytes_max} bytes"
        raise BrokenResponseError(msg)

    # What httptools calls.

    def on_message_begin(self) -> None:
        """Refuse a second response (see ``overrun``): only behind a 1xx response may one more begin."""
        if self.complete:
            msg = "more bytes than one response came for one request"
            raise BrokenResponseError(msg)

    def on_status(self, reason: bytes) -> None:
        """Take a part of the reason phrase."""
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a field of the head, or of the trailers."""
        if self._in_trailers:
            if name.lower() in NOT_IN_TRAILERS:
                return
            self.trailers += b"%b: %b\r\n" % (name, value)
            if len(self.trailers) > self._head_bytes_max:
                self._too_long("trailer section")
        else:
            self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        """Make the head of what came; what follows as fields are trailers."""
        status = self._parser.get_status_code()
        if status < _INTERIM:
            msg = f"there is no status {status:03d}"
            raise BrokenResponseError(msg)
        lines, known = response_fields(self._fields)
        coding = known.get(b"transfer-encoding")
        if coding is not None and coding.strip().lower() != b"chunked":
            msg = f"transfer coding {coding.decode('latin-1')!r} was not asked for"
            raise BrokenResponseError(msg)
        length = known.get(b"content-length")
        reason = self._reason.translate(None, _CONTROLS)
        head = ResponseHead(status, reason, lines, known, length, chunked=coding is not None)
        self._fields, self._reason = [], b""
        if status < _FINAL and status != _UPGRADED:
            self.interim.append(head)
        else:
            self.head = head
            self._in_trailers = True

    def on_message_complete(self) -> None:
        """Note the end; of an interim response only if it was the real one."""
        if self.head is not None:
            self.complete = True
            self.keep_alive = self._parser.should_keep_alive()


def broken(error: httptools.HttpParserError) -> BrokenResponseError:
    """Return what a parser's error means for the response."""
    # What a callback raised is the context of what the parser raises.
    reason = error.__context__ if isinstance(error.__context__, BrokenResponseError) else error
    return BrokenResponseError(f"no valid HTTP response: {reason}")
