"""The client of one request, as a response sees it: where bytes go past aiohttp's writer, and how fast.

What a worker answers goes to the client's transport directly. With server.py this is all that leans on
aiohttp's internals. This leans on:

* ``request.protocol`` being the ClientProtocol, with ``writing_paused``; ``set_parser`` handing over what has
  come and all that comes, and ``feed_eof`` at the end.
* a response being asked for nothing but ``prepare``, ``write_eof`` and ``keep_alive``, unless there is an
  access log; no error page coming behind a response that has begun, which ``writer.output_size`` tells; the
  writer keeping nothing back; ``writer.drain`` waiting for ``resume_writing``.
* ``BaseRequest._message`` being the request as parsed, with ``method``, ``path`` (the target), ``version``,
  ``should_close`` and ``upgrade``; parsing on behind an upgrade that is not made.
* ``BaseRequest._read_bytes`` being what ``read`` keeps of a body.
* ``StreamReader.is_eof``, ``total_bytes`` and ``_buffer`` of a body that has come, as one up to
  ``_LOOKED_AT_BYTES_MAX`` does though nobody reads it, and which need not be read for the next request to be
  parsed; only what ``body_exists`` is true of has a buffer.
* ``Expect`` being left to the handler.

tests/brproxy/relay/test_client.py and test_client_bodies.py pin each of these.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from aiohttp import web
from aiohttp.http import HttpVersion11

from brproxy.relay.errors import UnknownExpectationError
from brproxy.relay.hops import Hop, Hops
from brproxy.relay.server import ClientProtocol, Paced

_LOOKED_AT_BYTES_MAX = 1 << 16
"""Far below what makes aiohttp stop reading: larger bodies are read the usual way."""


class Client:
    """The client of one request: what it asks for, where its response goes, what it can read.

    One that does not read the end of its response for ``drain_s`` seconds is disconnected.
    """

    __slots__ = (
        "_drain_s",
        "_protocol",
        "_request",
        "has_begun",
        "is_http10",
        "keep_alive",
        "method",
        "target",
        "transport",
        "wants_upgrade",
        "write",
    )

    def __init__(self, request: web.BaseRequest, drain_s: float) -> None:
        self._request = request
        self._drain_s = drain_s
        self._protocol: ClientProtocol = request.protocol  # type: ignore[assignment] # this server's own
        transport = request.transport
        if transport is None:
            msg = "the client left before its request was looked at"
            raise ConnectionResetError(msg)
        self.transport: asyncio.Transport = transport
        self.write = transport.write
        self.has_begun = False
        self.wants_upgrade = False
        message = request._message  # noqa: SLF001 - the request tells these too, by a property call for each
        self.method: str = message.method
        self.target: str = message.path
        self.is_http10 = message.version < HttpVersion11
        self.keep_alive = not message.should_close

    def names_upgrade(self, protocol: bytes) -> None:
        """Take what all Upgrade fields together name as the protocol to go on in: it may be WebSocket.

        Of other protocols aiohttp parses on; HTTP/2 past this proxy (h2c) is not for clients to have; and
        HTTP/1.0 knows no upgrades (RFC 9110, section 7.8).
        """
        asked = self._request._message.upgrade  # noqa: SLF001 - there is no public way to ask
        named = protocol.strip().lower() == b"websocket"
        self.wants_upgrade = named and bool(asked) and not self.is_http10

    def hop(self, hops: Hops) -> Hop:
        """Return what workers are told of it: the same for all requests of a connection."""
        protocol = self._protocol
        if protocol.hop is None:
            told = self.transport.get_extra_info
            peer = told("peername")
            protocol.hop = hops.of(peer[0] if peer else None, is_tls=told("sslcontext") is not None)
        return protocol.hop

    @property
    def page_origin(self) -> bytes | None:
        """The origin of the web page that asks, None where no page does."""
        origin = self._request.headers.get("Origin")
        return None if origin is None else origin.encode("utf-8", "surrogateescape")

    @property
    def followed_by(self) -> Paced | None:
        """What ``follow`` was told last, None where nothing writes to it."""
        return self._protocol.paced

    @property
    def is_paused(self) -> bool:
        """Whether it has not read what it was sent."""
        return self._protocol.writing_paused

    def follow(self, paced: Paced) -> None:
        """Tell ``paced`` from now on how fast the client reads, and when it leaves."""
        self._protocol.paced = paced
        # An earlier response, of a client that pipelines, may not have been read yet.
        if self._protocol.writing_paused:
            paced.client_paused()

    def begin(self) -> None:
        """Note that the response begins here."""
        # aiohttp must not put an error page behind what has been sent.
        self._request.writer.output_size += 1
        self.has_begun = True

    def finish(self) -> None:
        """Note that nothing more is written for this request."""
        self._protocol.paced = None

    def tunnel(self, receive: Callable[[bytes], None]) -> None:
        """Hand everything that the client sends from now on to ``receive``."""
        self._protocol.set_parser(cast(Any, _Tunnel(receive)))

    def pause(self) -> None:
        """Read nothing from the client for now."""
        # By way of aiohttp, which would else resume what it does not know to be paused.
        self._protocol.pause_reading()

    def resume(self) -> None:
        """Read again."""
        self._protocol.resume_reading(resume_parser=False)

    def close(self) -> None:
        """Close the connection once what was written is sent."""
        self.keep_alive = False
        self.transport.close()

    def abort(self) -> None:
        """Close the connection at once."""
        self.keep_alive = False
        self.transport.abort()

    @property
    def answered(self) -> web.StreamResponse:
        """What a handler returns when the client has had its response, past aiohttp's writer."""
        return self  # type: ignore[return-value]  # cast would be a call for each request

    # What aiohttp asks of a response that has been sent.

    async def prepare(self, _request: web.BaseRequest) -> None:
        """Do nothing: the head has been sent."""

    async def write_eof(self) -> None:
        """Wait for a slow client, so that it cannot pile up responses by pipelining."""
        if not self._protocol.writing_paused:
            return
        try:
            async with asyncio.timeout(self._drain_s):
                await self._request.writer.drain()
        except TimeoutError:
            self.abort()


class _Tunnel:
    """Takes the place of aiohttp's WebSocket parser; ``feed_data`` answers "not the end, nothing left"."""

    def __init__(self, receive: Callable[[bytes], None]) -> None:
        self._receive = receive

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        if data:
            self._receive(data)
        return False, b""

    def feed_eof(self) -> None:
        """Do nothing: the client has left, and its handler is cancelled."""


def body_so_far(request: web.BaseRequest) -> bytes | None:
    """Return the body if it has come as a whole and is not large, as that of the usual request; else None.

    Only for a request that has one (``body_exists``): the stream of one that has none is of another kind.
    Looking is enough: reading it out would have aiohttp parse the connection's next bytes, of which there
    are none, at the cost of a tenth of a small request.
    """
    content = request.content
    if content.is_eof() and content.total_bytes <= _LOOKED_AT_BYTES_MAX:
        return b"".join(content._buffer)  # noqa: SLF001 - see above
    return None


def forget_body(request: web.BaseRequest) -> None:
    """Free the body, which has come as a whole; nobody reads it again."""
    # What ``read`` returned, kept for a second call. Only then: setting it gives a request a dictionary.
    if request._read_bytes is not None:  # noqa: SLF001 - there is no public way to let go of it
        request._read_bytes = None  # noqa: SLF001 - as above
    if request.body_exists:
        request.content._buffer.clear()  # noqa: SLF001 - what ``body_so_far`` has looked at


async def continue_upload(request: web.BaseRequest) -> None:
    """Answer ``Expect: 100-continue`` before the body is read; raises UnknownExpectationError for others."""
    expectation = request.headers.get("Expect")
    if expectation is None or request.version < HttpVersion11:
        return
    if expectation.lower() != "100-continue":
        msg = "of what a request may expect, only 100-continue is known here"
        raise UnknownExpectationError(msg)
    if request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
