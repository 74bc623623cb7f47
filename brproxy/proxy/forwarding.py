"""From the worker's response to the client's: bytes pass unchanged, counting tokens only looks.

Three ways through. A *stream* of server-sent events: its first event is held until it shows whether the
worker took the request (an engine may refuse with status 200), an incomplete event is held until it is whole,
and a stream that breaks off ends with an error event and no clean end. A *refusal* is kept, because another
worker may take the request. Everything else is a *reply*: its bytes pass as they come, and a copy of a JSON
reply is read for usage at the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from brproxy.proxy.accounting import Account
from brproxy.proxy.errors import ProxyError, stream_broke_off, worker_silent
from brproxy.proxy.events import HELD_BYTES_MAX, EventReader
from brproxy.proxy.plain_chunks import plain_chunk_taker
from brproxy.proxy.service import RelayLimits
from brproxy.relay.client import Client
from brproxy.relay.connection import Exchange, WorkerConnection
from brproxy.relay.errors import BrokenResponseError, ClientGoneError, WorkerFailedError
from brproxy.relay.fields import REQUEST_ID
from brproxy.relay.framing import (
    Framing,
    choose_framing,
    chunk,
    interim_head,
    last_chunk,
    response_head,
    upgrade_head,
)
from brproxy.relay.response import ResponseHead
from brproxy.types import BrproxyError


class WorkerRefusedError(BrproxyError):
    """The worker's queue is full: it said so instead of taking the request.

    ``head`` and ``body`` are what it answered, which the client gets unchanged if no other worker takes the
    request.
    """

    def __init__(self, head: ResponseHead, body: bytes) -> None:
        super().__init__(f"the worker refused the request with status {head.status}")
        self.head = head
        self.body = body


class Forwarding(Exchange):
    """One request to one worker, and that worker's response to the client.

    ``outcome`` is done when the response is complete, or fails with WorkerFailedError or WorkerRefusedError
    while the client has seen nothing, ProxyError when the worker stayed silent or broke off (the client has
    been told), ClientGoneError when the client stopped reading. ``on_commit`` is called when a stream begins
    to reach the client: the request is not sent again.
    """

    __slots__ = (
        "_account",
        "_chunked",
        "_client",
        "_connection",
        "_copy",
        "_copy_bytes",
        "_corked",
        "_events",
        "_framing",
        "_head",
        "_held",
        "_is_refusal",
        "_is_stream",
        "_is_tunnel",
        "_is_whole",
        "_limits",
        "_on_commit",
        "_path",
        "_request_id",
        "_unsent",
        "_write",
        "deadline_s",
        "is_committed",
        "limit_s",
        "outcome",
        "progressed",
    )

    def __init__(
        self,
        client: Client,
        account: Account,
        limits: RelayLimits,
        loop: asyncio.AbstractEventLoop,
        *,
        path: str,
        bodiless: bool,
        request_id: bytes,
        on_commit: Callable[[], None],
    ) -> None:
        super().__init__(bodiless=bodiless)
        self._client = client
        self._account = account
        self._limits = limits
        self._path = path
        self._request_id = request_id
        self._on_commit = on_commit
        self._connection: WorkerConnection
        self._head: ResponseHead
        self._framing = Framing.NONE
        self._chunked = False
        self._events: EventReader
        self._is_stream = False
        self._is_refusal = False
        self._is_tunnel = False
        # Between two events of a stream, and the client has had all of it.
        self._is_whole = False
        self._held = b""
        self._unsent = b""
        self._corked = False
        self._copy: list[bytes] | None = None
        self._copy_bytes = 0
        self._write = client.write
        self.is_committed = False
        self.outcome: asyncio.Future[None] = loop.create_future()
        self.progressed = False
        self.limit_s = limits.first_byte_s
        self.deadline_s = 0.0

    def send(self, connection: WorkerConnection, request: bytes, *, whole: bool) -> None:
        """Put the request on ``connection``."""
        self._connection = connection
        connection.send(self, request, whole=whole)
        self._client.follow(self)

    def close(self) -> None:
        """Leave; a response that is not complete is abandoned with its connection."""
        # These refer to this object, and all that the request held would wait for the garbage collector:
        # every new request would be written to memory that no cache holds, and others wait while it collects.
        self.receive, self.take_chunks = _ignore, None
        self._client.finish()
        if not self.outcome.done() or self.outcome.cancelled():
            self._connection.abandon()
        else:
            # Seen, whoever asks: a handler that is cancelled does not.
            self.outcome.exception()

    # What the worker's connection tells.

    def interim(self, head: ResponseHead) -> None:
        """See Exchange.interim. The proxy has answered ``Expect`` by itself; early hints pass."""
        if head.status != 100 and not self._client.is_http10:
            self._write(interim_head(head))

    def head(self, head: ResponseHead) -> None:
        """See Exchange.head."""
        self.progressed = True
        self._head = head
        if self._account.dialect.is_refusal(head.status):
            self._is_refusal = True
            self.receive = self._hold
            return
        media_type = b"" if head.is_encoded or self.bodiless else head.media_type
        if media_type == b"text/event-stream":
            self._is_stream = True
            self._events = EventReader(self._account, self._limits.event_bytes_max)
            self.receive = self._stream
        else:
            if media_type == b"application/json" and head.status < 300:
                self._copy = []
            self.receive = self._reply

    def end(self, piece: bytes, trailers: bytes) -> None:
        """See Exchange.end. All that is left goes out in one write."""
        self._corked, self._is_whole = True, False
        if piece:
            self.receive(piece)
        if self._is_refusal:
            self._fail(WorkerRefusedError(self._head, self._held))
            return
        if self._is_stream and not self._end_stream():
            return
        if self._copy:
            self._account.reply(b"".join(self._copy))
        self._account.learn()
        if not self.is_committed:
            self._commit()
        if self._chunked:
            self._unsent += last_chunk(trailers)
        self._flush()
        self._succeed()
        if self._framing is Framing.UNTIL_CLOSE:
            self._client.close()

    def upgraded(self, head: ResponseHead, rest: bytes) -> None:
        """See Exchange.upgraded: from here on bytes pass both ways until one side closes."""
        if not self._client.wants_upgrade:
            self._connection.abandon()
            self._fail(WorkerFailedError("it changed the protocol, which nobody had asked for"))
            return
        # Progress, or the time-out for a first byte would go on counting.
        self.is_committed = self._is_tunnel = self.progressed = True
        self.limit_s = self._limits.stall_s
        self._client.begin()
        self._write(upgrade_head(head) + rest)
        self.receive = self._from_tunnel
        self._client.tunnel(self._to_tunnel)

    def lost(self, error: WorkerFailedError | BrokenResponseError) -> None:
        """See Exchange.lost."""
        if self._is_tunnel:
            # It has no other end.
            self._succeed()
            self._client.close()
        elif self.is_committed:
            self._break_off(stream_broke_off())
        elif isinstance(error, WorkerFailedError):
            self._fail(error)
        else:
            self._fail(WorkerFailedError(f"{error} before the first byte of its response"))

    def worker_paused(self) -> None:
        """See Exchange.worker_paused. An upload waits by itself."""
        if self._is_tunnel:
            self._client.pause()

    def worker_resumed(self) -> None:
        """See Exchange.worker_resumed."""
        if self._is_tunnel:
            self._client.resume()

    # What the client and the clock tell.

    def client_paused(self) -> None:
        """See Paced.client_paused."""
        # The last write of all comes when the connection is free already, and may be another request's.
        if not self._corked and not self.outcome.done():
            self._connection.pause()

    def client_resumed(self) -> None:
        """See Paced.client_resumed."""
        self.progressed = True
        if not self.outcome.done():
            self._connection.resume()

    def client_gone(self) -> None:
        """See Paced.client_gone."""
        if not self.outcome.done():
            self._connection.abandon()
            self._fail(ClientGoneError("the client has closed its connection"))

    def timed_out(self) -> None:
        """See Watched.timed_out."""
        if self.outcome.done():
            return
        self._connection.abandon()
        if self._client.is_paused:
            self._client.abort()
            self._fail(ClientGoneError(f"the client has not read anything for {self.limit_s:g} s"))
        else:
            self._break_off(worker_silent(self.limit_s))

    # The three ways through, and the tunnel.

    def _pass_plain(self, data: bytes, events: int) -> None:
        """Pass on plain chunks as they came: the parser need not see whole chunks."""
        self.progressed = True
        self._account.count(events)
        self._write(data)

    def _stream(self, payload: bytes) -> None:
        """Pass on a read of a stream: plain events after a glance, all others after a close look."""
        self.progressed = True
        account = self._account
        events = account.plain.count(payload) if self._is_whole and account.plain is not None else 0
        if not events:
            self._stream_exactly(payload)
            return
        account.count(events)
        self._pass(payload)

    def _stream_exactly(self, payload: bytes) -> None:
        events = self._events
        events.read(payload)
        if events.is_refused:
            # The head says 200, but this and what follows is kept like the body of any refusal.
            self._is_refusal, self._held, self.receive = True, events.take(), self._hold
            return
        if events.is_taken:
            if not self.is_committed:
                self._commit()
            self._pass(events.take())
        self._is_whole = events.is_between
        plain = self._account.plain
        if plain is not None and self._is_whole and self._chunked and not self._corked:
            self.take_chunks = plain_chunk_taker(plain, self._pass_plain)
        else:
            self.take_chunks = None

    def _end_stream(self) -> bool:
        """Pass on what is left of a stream; return whether it is whole."""
        events = self._events
        if not self._head.is_framed and not events.ends_properly(self._path):
            self.lost(BrokenResponseError("the stream ended without [DONE]"))
            return False
        events.end()
        if not self.is_committed:
            self._commit()
        self._pass(events.take())
        return True

    def _reply(self, payload: bytes) -> None:
        self.progressed = True
        if not self.is_committed:
            self._commit()
        copy = self._copy
        if copy is not None:
            copy.append(payload)
            self._copy_bytes += len(payload)
            if self._copy_bytes > self._limits.response_parse_bytes_max:
                self._copy = None
        self._pass(payload)

    def _hold(self, payload: bytes) -> None:
        self.progressed = True
        if len(self._held) < HELD_BYTES_MAX:
            self._held += payload

    def _from_tunnel(self, data: bytes) -> None:
        self.progressed = True
        self._write(data)

    def _to_tunnel(self, data: bytes) -> None:
        self.progressed = True
        self._connection.write(data)

    # How they end.

    def _commit(self) -> None:
        """Send the worker's response head to the client: from here on nothing can be retried."""
        head, client = self._head, self._client
        rewritten = self._is_stream and self._account.usage_was_added
        self._framing = choose_framing(
            head, http10=client.is_http10, bodiless=self.bodiless, rewritten=rewritten
        )
        self._chunked = self._framing is Framing.CHUNKED
        if self._framing is Framing.UNTIL_CLOSE:
            client.keep_alive = False
        if self._is_stream:
            # A stream takes minutes: a thousand of them should not hold what nobody needs.
            self._on_commit()
            self._head = head.framing_only()
        more = b"" if REQUEST_ID in head.known else b"X-Request-Id: %b\r\n" % self._request_id
        client.begin()
        self.is_committed = True
        self.limit_s = self._limits.stall_s
        self._unsent = response_head(
            head, self._framing, keep_alive=client.keep_alive, http10=client.is_http10, more=more
        )

    def _pass(self, payload: bytes) -> None:
        # Without bytes there is nothing to frame: an empty chunk would be the end.
        if payload:
            self._unsent += chunk(payload) if self._chunked else payload
        if not self._corked:
            self._flush()

    def _flush(self) -> None:
        """Write what has come together: a write is a system call, and those are what a relay costs."""
        if self._unsent:
            self._write(self._unsent)
            self._unsent = b""

    def _break_off(self, error: ProxyError) -> None:
        """Tell a client that has seen part of a response that there is no more."""
        if self.is_committed:
            # Within a Content-Length the event could be taken for the missing rest.
            if self._is_stream and self._framing is not Framing.LENGTH:
                self._pass(error.event())
            self._flush()
        self._fail(error)
        if self.is_committed:
            # Without the framing's end: a client that ignores the event still sees a broken response.
            self._client.close()

    def _succeed(self) -> None:
        """Wake the handler; to be called before the client's connection is closed, as ``_fail`` is.

        Else aiohttp cancels it as if the client had left, and that is how the request would end in the books.
        """
        if not self.outcome.done():
            self.outcome.set_result(None)

    def _fail(self, error: Exception) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)


def _ignore(_piece: bytes) -> None:
    """Take what comes when all has been said: nothing does."""
