"""A response that the proxy itself wants: collected up to a limit, for nobody's client."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from brproxy.relay.connection import Exchange, WorkerConnection
from brproxy.relay.errors import BrokenResponseError, TooLongError, WorkerFailedError
from brproxy.relay.response import ResponseHead


class Reply(NamedTuple):
    """A response as a whole. The body is empty where nobody wanted it."""

    head: ResponseHead
    body: bytes


class Collect(Exchange):
    """Collects the response to one request on ``connection``.

    ``outcome`` is done with the Reply when the response is complete, or fails with WorkerFailedError. Without
    ``wants_body`` the body is thrown away, and one of more than ``bytes_max`` is not waited for: the
    connection is closed, and the head is the reply. With it, such a body is a failure.
    """

    __slots__ = ("_bytes", "_bytes_max", "_connection", "_head", "_pieces", "_wants_body", "outcome")

    def __init__(
        self,
        connection: WorkerConnection,
        loop: asyncio.AbstractEventLoop,
        *,
        bytes_max: int,
        wants_body: bool,
    ) -> None:
        super().__init__(bodiless=False)
        self.receive = self._collect
        self._connection = connection
        self._bytes_max = bytes_max
        self._wants_body = wants_body
        self._head: ResponseHead
        self._pieces: list[bytes] = []
        self._bytes = 0
        self.outcome: asyncio.Future[Reply] = loop.create_future()

    def send(self, request: bytes) -> None:
        """Put ``request``, all of it, on the connection."""
        self._connection.send(self, request)

    def close(self) -> None:
        """Leave; a response that is not complete is abandoned with its connection."""
        # It refers to this object: see WorkerAnswer.close.
        self.receive = _ignore
        if not self.outcome.done() or self.outcome.cancelled():
            self._connection.abandon()
        else:
            # Seen, whoever asks.
            self.outcome.exception()

    def interim(self, head: ResponseHead) -> None:
        """See Exchange.interim. The final response follows."""

    def head(self, head: ResponseHead) -> None:
        """See Exchange.head."""
        self._head = head

    def end(self, piece: bytes, trailers: bytes) -> None:
        """See Exchange.end."""
        if piece:
            self._collect(piece)
        self._succeed()

    def upgraded(self, head: ResponseHead, rest: bytes) -> None:
        """See Exchange.upgraded."""
        self._connection.abandon()
        self._fail(WorkerFailedError("it changed the protocol, which nobody had asked for"))

    def worker_paused(self) -> None:
        """See Exchange.worker_paused. The request has been handed over as a whole."""

    def worker_resumed(self) -> None:
        """See Exchange.worker_resumed."""

    def lost(self, error: WorkerFailedError | BrokenResponseError) -> None:
        """See Exchange.lost."""
        if isinstance(error, WorkerFailedError):
            self._fail(error)
        else:
            self._fail(WorkerFailedError(f"{error} before the end of its response"))

    def crashed(self, error: Exception) -> None:
        """See Exchange.crashed."""
        self._fail(WorkerFailedError(f"its response could not be handled: {error!r}"))

    def _collect(self, piece: bytes) -> None:
        self._bytes += len(piece)
        if self._bytes <= self._bytes_max:
            if self._wants_body:
                self._pieces.append(piece)
            return
        # At the end of a response the connection is free already, and may stay.
        if not self._connection.is_idle:
            self._connection.abandon()
        if self._wants_body:
            self._fail(TooLongError(f"its response is longer than {self._bytes_max} bytes"))
        else:
            self._succeed()

    def _succeed(self) -> None:
        if not self.outcome.done():
            self.outcome.set_result(Reply(self._head, b"".join(self._pieces)))

    def _fail(self, error: WorkerFailedError) -> None:
        self._pieces.clear()
        if not self.outcome.done():
            self.outcome.set_exception(error)


def _ignore(_piece: bytes) -> None:
    """Take what comes when all has been said."""
