"""The client's connections, on aiohttp's server: accepted, parsed, queued and bounded.

With client.py this is all that leans on aiohttp's internals. This leans on:

* ``web.Server`` keeping its loop in ``_loop``, making requests with ``request_factory`` and cancelling the
  handler of a client that has left; on ``BaseRequest`` limiting ``read`` by ``client_max_size``.
* ``RequestHandler`` being the client's asyncio protocol (``request.protocol``), with ``connection_made``,
  ``data_received``, ``pause_writing``, ``resume_writing`` and ``connection_lost``; one request of a
  connection at a time.
* ``_messages`` being what was parsed and is not being handled yet, with what is no request where a body or
  another request is damaged, and ``_current_request`` the request that is being handled.
* ``data_received`` of a complete head waking ``_waiter``, which is there while a connection waits for its
  next request.
* ``_next_keepalive_close_time`` and ``_keepalive_handle`` ending a connection that waits for a head too long.
* ``handle_error`` making the answer to what is no request, or to a bug, and ``log_exception`` logging it;
  the parser's words for too many fields and for one that is too long, bounded by ``max_headers`` and
  ``max_field_size``;
  ``_prepare_hook`` of a request being called when a page's header fields are complete.

tests/brproxy/relay/test_client.py and test_client_limits.py pin each of these.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from heapq import nsmallest
from http import HTTPStatus
from operator import attrgetter
from typing import Any, Protocol

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from brproxy.logs import SparingLog
from brproxy.relay.errors import BadBodyError
from brproxy.relay.hops import Hop

log = logging.getLogger(__name__)


class Paced(Protocol):
    """What follows how fast a client reads."""

    def client_paused(self) -> None:
        """Send no more: the client has not read what it was sent."""

    def client_resumed(self) -> None:
        """Send again: the client has caught up."""

    def client_gone(self) -> None:
        """Send nothing from now on: there is no connection to the client any more."""

    def crashed(self, error: Exception) -> None:
        """End, wherever this is: ``error`` was raised by one of the methods above. Must not raise."""


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """What bounds connections of clients.

    ``connections_max`` are open at once, and none has a file number from ``file_number_max`` on: the system
    gives the least that is free, so that a number tells how many files are open. ``head_s`` seconds are what
    a request's head may take, ``unread_s`` those for which a page of the proxy's own may stay unread.
    """

    connections_max: int = 1 << 20
    file_number_max: int = 1 << 20
    head_s: float = 60.0
    unread_s: float = 120.0


_USUAL_LIMITS = ClientLimits()


class ClientProtocol(RequestHandler):
    """aiohttp's server protocol, with limits, which also tells whoever writes how fast the client reads."""

    __slots__ = ("_head_has_begun", "_server", "_unread", "hop", "paced")

    def __init__(self, manager: RelayServer, **settings: Any) -> None:
        super().__init__(manager, **settings)
        self.paced: Paced | None = None
        self.hop: Hop | None = None
        self._server = manager
        self._head_has_begun = False
        self._unread: asyncio.TimerHandle | None = None

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
        if self._messages and self._is_damaged:
            # Nothing is a request behind what is none. The parser would say so of each read, and enough of
            # these would stop reading: then nobody sees that the client leaves.
            return
        super().data_received(data)
        waiter = self._waiter
        if waiter is None or waiter.done():
            self._head_has_begun = False
            if self._messages and self._is_damaged:
                self._note_damage()
        elif not self._head_has_begun:
            self._head_has_begun = True
            self._expect_head()

    @property
    def _is_damaged(self) -> bool:
        """Whether the last of what came, and is not handled yet, is no request."""
        return not isinstance(self._messages[-1][0], RawRequestMessage)

    def _expect_head(self) -> None:
        """Have the connection closed unless a head is complete in time."""
        close_s = self._loop.time() + self._server.limits.head_s
        if close_s < self._next_keepalive_close_time:
            self._next_keepalive_close_time = close_s
            if self._keepalive_handle is not None:
                self._keepalive_handle.cancel()
            self._keepalive_handle = self._loop.call_at(close_s, self._process_keepalive)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no request (``message`` says why), or one that a bug has stopped."""
        if message is None:
            self.log_exception("Error handling request from %s", _shown(request.remote), exc_info=exc)
            message = "The proxy failed on this request; its log says why."
        else:
            status, message = self._in_plain_words(status, message)
            self._server.bad_requests.warning("bad request from %s: %s", _shown(request.remote), message)
        if request.writer.output_size > 0:
            msg = "the response has begun: no page can follow"
            raise ConnectionError(msg)
        response = self._server.error_page(status, message)
        response.force_close()
        return response

    def _in_plain_words(self, status: int, message: str) -> tuple[int, str]:
        """Return status and message for what the parser says of bytes that are no request, without these."""
        first = message.strip().partition("\n")[0].partition(": b'")[0].strip(" :.")
        first = "".join(character for character in first if character.isprintable())
        if first.startswith("Pause on PRI"):
            return HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "HTTP/2 is not spoken here; use HTTP/1.1."
        most, too_large = "the most that this proxy accepts", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        if first.startswith("Too many headers"):
            return too_large, f"The request has more than {self.max_headers} header fields, {most}."
        if first.startswith("Got more than"):
            # The parser does not say which of them it was.
            what = "target or a header field of the request"
            return too_large, f"The {what} is longer than {self.max_field_size} bytes, {most}."
        return status, f"This is no valid HTTP request: {first[:200]}."

    def log_exception(self, *arguments: Any, **keywords: Any) -> None:
        """Log what should not happen, but not for each of a thousand requests."""
        error = keywords.get("exc_info")
        if isinstance(error, BadBodyError):
            # Met again by aiohttp, which reads on behind a response to see where the request ends.
            self._server.bad_requests.warning("bad request: %s", error)
            return
        self._server.bugs.log(logging.ERROR, *arguments, **keywords)

    def _note_damage(self) -> None:
        """Tell whoever reads a body that it is damaged: aiohttp would have it wait for ever."""
        # What could not be parsed is queued like a request, behind the one that it was found in.
        request = self._current_request
        body = self._messages[-2][1] if len(self._messages) > 1 else request and request.content
        if body and not body.is_eof() and body.exception() is None:
            body.set_exception(BadBodyError("the request's body is no valid HTTP"))

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        if self.paced is not None:
            self._tell(self.paced, self.paced.client_paused)
        elif self._unread is None and self.transport is not None:
            # A page, which nobody watches.
            self._unread = self._loop.call_later(self._server.limits.unread_s, self.transport.abort)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        super().resume_writing()
        self._forget_unread()
        if self.paced is not None:
            self._tell(self.paced, self.paced.client_resumed)

    def connection_lost(self, exc: BaseException | None) -> None:
        """See asyncio.Protocol."""
        # The handler is cancelled, but until it runs a worker's bytes would go to a closed transport.
        if self.paced is not None:
            self._tell(self.paced, self.paced.client_gone)
        self._forget_unread()
        self._server.closed(self)
        super().connection_lost(exc)

    def _forget_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _tell(self, paced: Paced, what: Callable[[], None]) -> None:
        try:
            what()
        except Exception as error:
            # Whatever it is, it concerns one request.
            log.exception("a client's response could not be continued")
            paced.crashed(error)


class _Request(web.BaseRequest):
    """A request whose pages do not say what serves them."""

    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        response.headers.pop("Server", None)


def _shown(address: str | None) -> str:
    """Return a client's address for the log: what has colons is told from what follows it."""
    return f"[{address}]" if address and ":" in address else str(address)


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
        limits: ClientLimits = _USUAL_LIMITS,
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
        surplus = max(len(self._open) - limits.connections_max, number - limits.file_number_max) + 1
        if surplus > 0:
            if not self._make_room(surplus):
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

    def _make_room(self, surplus: int) -> bool:
        """Close idle connections, first those that are closed next anyway; return whether there are any.

        ``surplus`` at least: were one closed for each that comes, what a burst, or anybody else, has once
        taken beyond the limit would stay taken until no file is left to accept with. And some at once, as
        looking for them goes through all.
        """
        idle = [connection for connection in self._open if connection.is_idle]
        count = max(surplus, 1 + len(idle) // 128)
        for connection in nsmallest(count, idle, key=attrgetter("_next_keepalive_close_time")):
            del self._open[connection]
            connection.force_close()
        return bool(idle)
