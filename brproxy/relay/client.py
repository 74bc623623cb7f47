"""The client's side of the relay: everything that leans on aiohttp's internals, and nothing else.

aiohttp's server accepts, parses and queues requests; what a worker answers goes to the client's transport
past its writer. That leans on:

* ``web.Server`` keeping its loop in ``_loop``, making requests with ``request_factory`` and cancelling the
  handler of a client that has left; on ``BaseRequest`` limiting ``read`` by ``client_max_size``.
* ``RequestHandler`` being the client's asyncio protocol (``request.protocol``), with ``pause_writing``,
  ``resume_writing``, ``writing_paused`` and ``connection_lost``; one request of a connection at a time;
  ``set_parser`` handing over what has come and all that comes, and ``feed_eof`` at the end.
* a response being asked for nothing but ``prepare``, ``write_eof`` and ``keep_alive``, unless there is an
  access log; no error page coming behind a response that has begun, which ``writer.output_size`` tells; the
  writer keeping nothing back; ``writer.drain`` waiting for ``resume_writing``.
* ``BaseRequest._message`` being the request as parsed, with ``method``, ``path`` (the target), ``version``,
  ``should_close`` and ``upgrade``; parsing on behind an upgrade that is not made.
* ``BaseRequest._read_bytes`` being what ``read`` keeps of a body.
* ``StreamReader.is_eof``, ``total_bytes`` and ``_buffer`` of a body that has come, as one up to
  ``_LOOKED_AT_BYTES_MAX`` does though nobody reads it, and which need not be read for the next request to be
  parsed; only what ``body_exists`` is true of has a buffer.
* ``Expect`` being left to the handler, and HTTPExpectationFailed being an answer.
* ``data_received`` of a complete head waking ``_waiter``, which is there while a connection waits for its
  next request; ``_messages`` being what is parsed and not handled, an ``_ErrInfo`` for what is no request.
* ``_next_keepalive_close_time`` and ``_keepalive_handle`` ending a connection that waits for a head too long.
* ``handle_error`` making the answer to what is no request, or to a bug, and ``log_exception`` logging it;
  ``_prepare_hook`` of a request being called when a page's header fields are complete.

tests/brproxy/relay/test_client.py and test_client_bodies.py pin each of these.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from heapq import nsmallest
from http import HTTPStatus
from operator import attrgetter
from typing import Any, Protocol, cast

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpVersion11, RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from brproxy.logs import SparingLog
from brproxy.relay.errors import BrokenRequestError

log = logging.getLogger(__name__)

_LOOKED_AT_BYTES_MAX = 1 << 16
"""Far below what makes aiohttp stop reading: larger bodies are read the usual way."""


class Paced(Protocol):
    """What follows how fast a client reads."""

    def client_paused(self) -> None:
        """Send no more: the client has not read what it was sent."""

    def client_resumed(self) -> None:
        """Send again: the client has caught up."""

    def client_gone(self) -> None:
        """Send nothing from now on: there is no connection to the client any more."""


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """What bounds connections of clients.

    ``connections_max`` are open at once, and none has a file number from ``file_number_max`` on: the system
    gives the least that is free, so that a number tells how many files are open. ``head_s`` seconds are what
    a request's head may take.
    """

    connections_max: int = 1 << 20
    file_number_max: int = 1 << 20
    head_s: float = 60.0


class ClientProtocol(RequestHandler):
    """aiohttp's server protocol, with limits, which also tells whoever writes how fast the client reads."""

    __slots__ = ("_head_has_begun", "_server", "paced")

    def __init__(self, manager: RelayServer, **settings: Any) -> None:
        super().__init__(manager, **settings)
        self.paced: Paced | None = None
        self._server = manager
        self._head_has_begun = False

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a request, of which nothing or not all has come."""
        waiter = self._waiter
        return waiter is not None and not waiter.done()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._expect_head()
        self._server.opened(self)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol. The ordinary read ends the head of a request."""
        super().data_received(data)
        if not self.is_idle:
            self._head_has_begun = False
            if self._messages and isinstance(self._messages[-1][0], _ErrInfo):
                self._break_body()
        elif not self._head_has_begun:
            self._head_has_begun = True
            self._expect_head()

    def _expect_head(self) -> None:
        """Have the connection closed unless a head is complete in time."""
        close_s = self._loop.time() + self._server.limits.head_s
        if close_s < self._next_keepalive_close_time:
            self._next_keepalive_close_time = close_s
            if self._keepalive_handle is not None:
                self._keepalive_handle.cancel()
            self._keepalive_handle = self._loop.call_at(close_s, self._process_keepalive)

    def _break_body(self) -> None:
        """Tell whoever waits for the rest of a body that what came is none: the parser keeps it to itself."""
        request = self._current_request
        body = self._messages[-2][1] if len(self._messages) > 1 else request and request.content
        if body and not body.is_eof():
            body.set_exception(BrokenRequestError("the request's body is no valid HTTP"))

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no request (``message`` says why), or one that a bug has stopped."""
        if message is None:
            self.log_exception("Error handling request from %s", request.remote, exc_info=exc)
            message = "The proxy failed on this request; its log says why."
        else:
            status, message = _in_plain_words(status, message)
            self._server.bad_requests.warning("bad request from %s: %s", request.remote, message)
        if request.writer.output_size > 0:
            msg = "the response has begun: no page can follow"
            raise ConnectionError(msg)
        response = self._server.error_page(status, message)
        response.force_close()
        return response

    def log_exception(self, *arguments: Any, **keywords: Any) -> None:
        """Log what should not happen, but not for each of a thousand requests."""
        error = keywords.get("exc_info")
        if isinstance(error, BrokenRequestError):
            # Met again by aiohttp, which reads on behind a response to see where the request ends.
            self._server.bad_requests.warning("bad request: %s", error)
            return
        self._server.bugs.log(logging.ERROR, *arguments, **keywords)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        if self.paced is not None:
            self.paced.client_paused()

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        super().resume_writing()
        if self.paced is not None:
            self.paced.client_resumed()

    def connection_lost(self, exc: BaseException | None) -> None:
        """See asyncio.Protocol."""
        # The handler is cancelled, but until it runs a worker's bytes would go to a closed transport.
        if self.paced is not None:
            self.paced.client_gone()
        self._server.closed(self)
        super().connection_lost(exc)


class _Request(web.BaseRequest):
    """A request whose pages do not say what serves them."""

    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        response.headers.pop("Server", None)


def _in_plain_words(status: int, message: str) -> tuple[int, str]:
    """Return status and message for what the parser says of bytes that are no request, without the bytes."""
    first = message.strip().partition("\n")[0].partition(": b'")[0].strip(" :")
    first = "".join(character for character in first if character.isprintable())
    if first.startswith("Pause on PRI"):
        return HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "HTTP/2 is not spoken here; use HTTP/1.1."
    return status, f"This is no valid HTTP request: {first[:200]}."


def _plain_page(status: int, message: str) -> web.Response:
    return web.Response(status=status, text=message + "\n")


class RelayServer(web.Server):
    """aiohttp's low-level server with ClientProtocol; bodies that handlers read are limited in size.

    ``error_page`` makes the answer to what is no request: of a status and a message.
    """

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        body_bytes_max: int,
        *,
        limits: ClientLimits = ClientLimits(),
        error_page: Callable[[int, str], web.Response] = _plain_page,
        **settings: Any,
    ) -> None:
        super().__init__(handler, request_factory=self._request, handler_cancellation=True)
        self._settings = settings
        self._body_bytes_max = body_bytes_max
        self._open: dict[ClientProtocol, None] = {}
        self.limits = limits
        self.error_page = error_page
        self.bad_requests = SparingLog(log)
        self.bugs = SparingLog(log, interval_s=1.0)
        self._crowds = SparingLog(log)

    def __call__(self) -> RequestHandler:
        """Return the protocol of a new connection."""
        return ClientProtocol(self, loop=self._loop, **self._settings)

    def _request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        return _Request(
            message, payload, protocol, writer, task, self._loop, client_max_size=self._body_bytes_max
        )

    def opened(self, newcomer: ClientProtocol) -> None:
        """Take in a new connection; where it is one too many, others that are idle give way, else itself."""
        limits, transport = self.limits, newcomer.transport
        sock = transport.get_extra_info("socket") if transport is not None else None
        number = -1 if sock is None else sock.fileno()
        if len(self._open) >= limits.connections_max or number >= limits.file_number_max:
            if not self._make_room():
                self._crowds.warning(
                    "no room for a client: %d are connected and none is idle", len(self._open)
                )
                newcomer.force_close()
                return
            self._crowds.warning("idle clients gave way to new ones: %d are connected", len(self._open))
        self._open[newcomer] = None

    def closed(self, connection: ClientProtocol) -> None:
        """Note that a connection has ended."""
        self._open.pop(connection, None)

    def _make_room(self) -> bool:
        """Close idle connections, first those that would be closed next anyway; return whether there are any.

        Some at once: looking for them goes through all.
        """
        idle = [connection for connection in self._open if connection.is_idle]
        count = 1 + len(idle) // 128
        for connection in nsmallest(count, idle, key=attrgetter("_next_keepalive_close_time")):
            del self._open[connection]
            connection.force_close()
        return bool(idle)


class _Answered:
    """Stands for a response that the client has had already; aiohttp asks for no more than this of it."""

    __slots__ = ("_client", "_drain_s", "keep_alive")

    def __init__(self, client: Client, drain_s: float) -> None:
        self._client = client
        self._drain_s = drain_s
        self.keep_alive = client.keep_alive

    async def prepare(self, _request: web.BaseRequest) -> None:
        """Do nothing: the head has been sent."""

    async def write_eof(self) -> None:
        """Wait for a slow client, so that it cannot pile up responses by pipelining."""
        if self._client.is_paused:
            await self._client.drained(self._drain_s)


def answered(client: Client, drain_s: float) -> web.StreamResponse:
    """Return what a handler returns when the client has had its response, past aiohttp's writer.

    A client that does not read it for ``drain_s`` seconds is disconnected.
    """
    return cast(web.StreamResponse, _Answered(client, drain_s))


class Client:
    """The client of one request: what it asks for, where its response goes, what it can read."""

    __slots__ = (
        "_protocol",
        "_request",
        "has_begun",
        "is_http10",
        "keep_alive",
        "method",
        "target",
        "transport",
        "write",
    )

    def __init__(self, request: web.BaseRequest) -> None:
        self._request = request
        self._protocol = cast(ClientProtocol, request.protocol)
        transport = request.transport
        if transport is None:
            msg = "the client left before its request was looked at"
            raise ConnectionResetError(msg)
        self.transport: asyncio.Transport = transport
        self.write = transport.write
        self.has_begun = False
        message = request._message  # noqa: SLF001 - the request tells these too, by a property call for each
        self.method: str = message.method
        self.target: str = message.path
        self.is_http10 = message.version < HttpVersion11
        self.keep_alive = not message.should_close

    @property
    def wants_upgrade(self) -> bool:
        """Whether the client asks to go on as a WebSocket.

        Of other protocols aiohttp parses on; and HTTP/2 past this proxy (h2c) is not for clients to have.
        """
        asked = self._request._message.upgrade  # noqa: SLF001 - there is no public way to ask
        return bool(asked) and self._request.headers.get("Upgrade", "").lower() == "websocket"

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

    async def drained(self, limit_s: float) -> None:
        """Wait until the client has read enough; after ``limit_s`` seconds the connection is aborted."""
        try:
            async with asyncio.timeout(limit_s):
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
    """Answer ``Expect: 100-continue`` before the body is read (RFC 9110, section 10.1.1)."""
    expectation = request.headers.get("Expect")
    if expectation is None or request.version < HttpVersion11:
        return
    if expectation.lower() != "100-continue":
        raise web.HTTPExpectationFailed(text=f"Unknown Expect: {expectation}")
    if request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
