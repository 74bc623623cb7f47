"""One connection to a worker: requests out, responses back, one at a time.

What happens is told to the *exchange* that is on it, synchronously, from the event loop's read callback: no
task and no queue stand between a worker's bytes and its client.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

from httptools import HttpParserError

from brproxy.relay.errors import BrokenResponseError, StaleConnectionError, WorkerFailedError
from brproxy.relay.response import ResponseHead, ResponseParser, broken
from brproxy.relay.states import AFTER, Event, State

log = logging.getLogger(__name__)

# As plain names: looking a member of an enumeration up costs more than comparing it.
_IDLE, _BODY, _TUNNEL = State.IDLE, State.BODY, State.TUNNEL
_SEND, _HEAD, _END_KEEP = Event.SEND, Event.HEAD, Event.END_KEEP

STALE_S = 0.2
"""A kept connection that closes within this time after a request was sent on it had been closed before: the
worker has not worked on the request (seconds). Later, it may have."""

TUNNEL_CLOSE_S = 5.0
"""What a tunnel was given has this long to go out once its client has left (seconds)."""


class Exchange(ABC):
    """One request to one worker and its response, as the connection sees it.

    In this order: any number of ``interim``, then either ``upgraded``, or ``head``, ``receive`` for each read
    that has body bytes (never empty) but the last, ``end``. ``lost`` may come instead of whatever would be
    next, and is the last. ``receive`` is an attribute, so that what it does can follow from the head. When
    one of these raises, ``crashed`` is called, the connection is closed, and nothing else follows.

    ``take_chunks``, where an exchange has it, is offered each read that begins where a chunk of a chunked
    body begins. It returns False for anything but whole chunks, which it then takes with their framing.
    """

    __slots__ = ("bodiless", "receive", "take_chunks")

    receive: Callable[[bytes], None]

    def __init__(self, *, bodiless: bool) -> None:
        self.bodiless = bodiless
        self.take_chunks: Callable[[bytes], bool] | None = None

    @abstractmethod
    def interim(self, head: ResponseHead) -> None:
        """Take the head of a 1xx response."""

    @abstractmethod
    def head(self, head: ResponseHead) -> None:
        """Take the response's head."""

    @abstractmethod
    def end(self, piece: bytes, trailers: bytes) -> None:
        """Take the last bytes of the body (b"" for none) and ``trailers`` (lines).

        There is nothing left to abandon: the connection is kept, or closed, once this has returned.
        """

    @abstractmethod
    def upgraded(self, head: ResponseHead, rest: bytes) -> None:
        """Go on in another protocol; ``rest`` are the worker's first bytes in it."""

    @abstractmethod
    def worker_paused(self) -> None:
        """Write no more: the worker has not read what was written."""

    @abstractmethod
    def worker_resumed(self) -> None:
        """Write again: the worker has caught up."""

    @abstractmethod
    def lost(self, error: WorkerFailedError | BrokenResponseError) -> None:
        """Note that there will be no (more) response."""

    @abstractmethod
    def crashed(self, error: Exception) -> None:
        """End, wherever this is: ``error`` was raised by one of the methods above. Must not raise."""


class WorkerConnection(asyncio.Protocol):
    """The protocol of one connection to ``origin``; ``on_idle`` is called when it may be used again.

    Of ``loop`` it asks the time, timers and futures.
    """

    __slots__ = (
        "_exchange",
        "_heard",
        "_loop",
        "_on_idle",
        "_parser",
        "_sent_s",
        "_take_chunks",
        "_transport",
        "_used",
        "_writable",
        "idle_since_s",
        "origin",
        "request_is_whole",
        "state",
    )

    def __init__(
        self,
        origin: str,
        head_bytes_max: int,
        on_idle: Callable[[WorkerConnection], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._loop = loop
        self._sent_s = 0.0
        self.origin = origin
        self.state = _IDLE
        self.idle_since_s = 0.0
        self.request_is_whole = True
        self._on_idle = on_idle
        self._parser = ResponseParser(head_bytes_max)
        self._exchange: Exchange | None = None
        self._take_chunks: Callable[[bytes], bool] | None = None
        self._transport: asyncio.Transport
        self._used = False
        self._heard = False
        self._writable: asyncio.Future[None] | None = None

    # What the proxy asks of it.

    def send(self, exchange: Exchange, request: bytes, *, whole: bool = True) -> None:
        """Put ``exchange`` on the connection; not ``whole``: the rest of the body comes by ``write``."""
        self.state = AFTER[self.state][_SEND]
        self._exchange = exchange
        self._heard = False
        if self._used:
            self._sent_s = self._loop.time()
        self.request_is_whole = whole
        self._parser.expect(bodiless=exchange.bodiless)
        self._transport.write(request)

    def write(self, data: bytes) -> None:
        """Send more of a request's body, or of a tunnel."""
        self._transport.write(data)

    async def writable(self) -> None:
        """Wait until the worker has taken enough of what was written; returns at once when it is closed."""
        if self._writable is not None:
            await self._writable

    def pause(self) -> None:
        """Read nothing from the worker: its client cannot take more."""
        self._transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        self._transport.resume_reading()

    def abandon(self) -> None:
        """Close, telling nobody: the client has left, or nothing more is wanted.

        What a tunnel was given still goes out; anything else is not worth the wait.
        """
        self._exchange = self._take_chunks = None
        if self.state is _TUNNEL:
            self._transport.close()
            # A worker that does not read would keep the connection for ever.
            self._loop.call_later(TUNNEL_CLOSE_S, self._transport.abort)
        else:
            self._transport.abort()
        self.state = AFTER[self.state][Event.LOST]

    @property
    def is_idle(self) -> bool:
        """Whether a request can be sent on it."""
        return self.state is _IDLE

    # What the event loop tells it.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol. The ordinary read is whole chunks, else a piece of a body."""
        exchange = self._exchange
        try:
            take_chunks = self._take_chunks
            if take_chunks is not None and take_chunks(data):
                return
            if exchange is None or self.state is not _BODY:
                self._received_first(exchange, data)
                return
            parser = self._parser
            try:
                parser.feed_body(data)
            except HttpParserError as error:
                if not parser.complete:
                    self._break(broken(error))
                    return
                parser.overrun()
            piece = parser.take_body()
            if parser.complete:
                self._complete(exchange, piece)
                return
            if piece:
                exchange.receive(piece)
            if exchange is self._exchange:
                # The exchange may have learnt by now what its chunks look like.
                self._take_chunks = exchange.take_chunks if parser.is_between_chunks(data) else None
        except Exception as error:  # noqa: BLE001 - whatever it is, it concerns one request
            self._crash(exchange, error)

    def _received_first(self, exchange: Exchange | None, data: bytes) -> None:
        """Take a read that is not just more of a body."""
        if exchange is None:
            # Nobody has asked for anything: whatever this is, it belongs to no request.
            self.abandon()
        elif self.state is _TUNNEL:
            exchange.receive(data)
        else:
            self._heard = True
            try:
                piece = self._parser.feed(data)
            except BrokenResponseError as error:
                self._break(error)
                return
            self._begin(exchange, piece)

    def eof_received(self) -> None:
        """See asyncio.Protocol. The transport closes itself; ``connection_lost`` has the rest to say."""

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._release_writer()
        exchange = self._exchange
        try:
            if exchange is not None and exc is None and self._parser.ends_with_connection():
                self._complete(exchange, b"")
                return
            self._break(BrokenResponseError(f"{self.origin} closed the connection: {exc or 'end of stream'}"))
        except Exception as error:  # noqa: BLE001 - as in data_received
            self._crash(exchange, error)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self._writable = self._loop.create_future()
        exchange = self._exchange
        if exchange is not None:
            try:
                exchange.worker_paused()
            except Exception as error:  # noqa: BLE001 - as in data_received
                self._crash(exchange, error)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._release_writer()
        exchange = self._exchange
        if exchange is not None:
            try:
                exchange.worker_resumed()
            except Exception as error:  # noqa: BLE001 - as in data_received
                self._crash(exchange, error)

    # How they lead on.

    def _begin(self, exchange: Exchange, piece: bytes) -> None:
        """Tell of the heads that are there, and of what of the body has come with them."""
        parser = self._parser
        for interim in parser.interim:
            exchange.interim(interim)
        parser.interim.clear()
        if parser.head is None:
            return
        if parser.upgraded_rest is not None:
            self.state = AFTER[self.state][Event.UPGRADE]
            exchange.upgraded(parser.head, parser.upgraded_rest)
            return
        self.state = AFTER[self.state][_HEAD]
        exchange.head(parser.head)
        if exchange is not self._exchange:
            # It has seen enough, and has abandoned the connection.
            return
        if parser.complete:
            self._complete(exchange, piece)
            return
        parser.forget_fields()
        if piece:
            exchange.receive(piece)

    def _complete(self, exchange: Exchange, piece: bytes) -> None:
        self._exchange = self._take_chunks = None
        # A worker that has answered before it read the whole request will not read the rest as one.
        if self._parser.keep_alive and self.request_is_whole:
            self.state = AFTER[self.state][_END_KEEP]
            # Told first: nobody gets a connection whose last response has not found its end.
            exchange.end(piece, self._parser.trailers)
            self._used = True
            if self.state is _IDLE:
                self._on_idle(self)
        else:
            self.state = AFTER[self.state][Event.END_CLOSE]
            # Not close(): that waits until the worker has read the rest of what was written.
            self._transport.abort()
            exchange.end(piece, self._parser.trailers)

    def _break(self, error: BrokenResponseError) -> None:
        exchange, state = self._exchange, self.state
        self._exchange = self._take_chunks = None
        self.state = AFTER[state][Event.LOST]
        self._transport.abort()
        if exchange is None:
            return
        if state is not State.WAITING:
            exchange.lost(error)
        elif self._used and not self._heard and self._loop.time() - self._sent_s < STALE_S:
            exchange.lost(StaleConnectionError(str(error)))
        else:
            exchange.lost(WorkerFailedError(f"{self.origin} gave no response: {error}"))

    def _crash(self, exchange: Exchange | None, error: Exception) -> None:
        """End what was on the connection, and it: a callback has raised what is a bug, not the worker's."""
        log.error("a response from %s could not be handled: %r", self.origin, error, exc_info=error)
        self._exchange = self._take_chunks = None
        self.state = AFTER[self.state][Event.LOST]
        self._transport.abort()
        if exchange is not None:
            exchange.crashed(error)

    def _release_writer(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None
