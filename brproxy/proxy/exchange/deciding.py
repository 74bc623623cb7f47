"""What one worker answers to one attempt: told apart by its head, then handed to the kind that it is.

A *stream* of server-sent events, a *reply* of any other form, an *error body* that may tell of the engine's
death, a *late reply* where the client expects the rest of a stream, a *tunnel*: each has a file. What is here
is common to them: what the connection, the client and the clock tell, and how an attempt ends.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Protocol

from brproxy.journey import Event
from brproxy.proxy.accounting import Account
from brproxy.proxy.errors import ProxyError, response_not_handled, stream_broke_off, worker_silent
from brproxy.proxy.exchange.client_sink import ClientSink
from brproxy.proxy.exchange.error_body import ErrorBody
from brproxy.proxy.exchange.late_reply import LateReply
from brproxy.proxy.exchange.reply import Reply
from brproxy.proxy.exchange.stream import Stream
from brproxy.proxy.exchange.tunnel import Tunnel
from brproxy.proxy.in_band import LoadTaker
from brproxy.proxy.service import RelayLimits
from brproxy.relay.connection import Exchange, WorkerConnection
from brproxy.relay.errors import BrokenResponseError, ClientGoneError, StaleConnectionError, WorkerFailedError
from brproxy.relay.response import ResponseHead
from brproxy.roster import Member

# As a plain number: looking a member of an enumeration up costs more than comparing it.
_ERROR = int(HTTPStatus.BAD_REQUEST)


class Kind(Protocol):
    """One kind of answer: takes the body's bytes as they come."""

    def receive(self, payload: bytes) -> None:
        """Take a piece of the body, never empty."""

    def end(self, piece: bytes, trailers: bytes) -> None:
        """Take the last piece (b"" for none) and trailers (lines): the answer is complete."""


class Attempt(Protocol):
    """Whoever drives the attempts, as an answer sees it."""

    def may_move(self, event: Event) -> bool:
        """Tell whether another worker would get the request after ``event``."""

    def put_off_s(self, member: Member, kept_s: float) -> float:
        """Return how long ``member`` may go on being silent, 0 if no longer (seconds).

        It has been for ``kept_s`` beyond its time-out.
        """

    def settle(self, event: Event, error: Exception | None) -> None:
        """Take the end of this attempt; only the first counts."""

    def finished(self) -> None:
        """Take the end of a complete answer; as ``settle``."""

    def begun(self, *, is_long: bool) -> None:
        """Note that the client gets this answer: the request is not sent again."""


class WorkerAnswer(Exchange):
    """One request to one worker, and that worker's answer on its way to the client.

    ``has_begun``: the client has had some of this answer. ``member`` is the worker that was asked.
    ``load_taker`` takes what the head says of the worker's load, where that was asked for.
    """

    __slots__ = (
        "_attempt",
        "_connection",
        "_is_over",
        "_kept_s",
        "_kept_until_s",
        "_kind",
        "account",
        "deadline_s",
        "has_begun",
        "limit_s",
        "limits",
        "load_taker",
        "member",
        "path",
        "progressed",
        "sink",
    )

    def __init__(
        self,
        attempt: Attempt,
        sink: ClientSink,
        account: Account,
        limits: RelayLimits,
        *,
        path: str,
        member: Member,
        bodiless: bool,
    ) -> None:
        super().__init__(bodiless=bodiless)
        self._attempt = attempt
        self._connection: WorkerConnection
        self._kind: Kind | None = None
        self.receive: Callable[[bytes], None] = _ignore
        self._is_over = False
        self.sink = sink
        self.account = account
        self.limits = limits
        self.path = path
        self.member = member
        self.has_begun = False
        self.progressed = False
        self.limit_s = limits.first_byte_s
        self.deadline_s = 0.0
        self.load_taker: LoadTaker | None = None
        # How much of the silence is beyond its time-out; both are of a deadline that progress moves.
        self._kept_s = self._kept_until_s = 0.0

    def send(self, connection: WorkerConnection, request: bytes, *, whole: bool) -> None:
        """Put the request on ``connection``."""
        self._connection = connection
        # An earlier answer may have been turned down at its very end.
        self.sink.is_corked = False
        connection.send(self, request, whole=whole)
        self.sink.client.follow(self)

    def close(self) -> None:
        """Leave; an answer that is not complete is abandoned with its connection."""
        # These refer to this object, and all that the request held would wait for the garbage collector:
        # every new request would be written to memory that no cache holds, and others wait while it collects.
        self.receive, self.take_chunks, self._kind = _ignore, None, None
        self.sink.client.finish()
        if not self._is_over:
            self._abandon()

    # What the worker's connection tells.

    def interim(self, head: ResponseHead) -> None:
        """See Exchange.interim."""
        self.sink.interim(head)

    def head(self, head: ResponseHead) -> None:
        """See Exchange.head."""
        self.progressed = True
        if self.load_taker is not None:
            head = self.load_taker.take(head, self.member)
        known = head.known
        if b"location" in known or b"content-location" in known:
            head = head.relative_to(self._connection.origin)
        is_error = head.status >= _ERROR
        if is_error and self.account.dialect.is_refusal(head.status):
            if self._attempt.may_move(Event.REFUSED):
                # Acted on at once: a body that is left open would hold the request up.
                self.receive = _ignore
                self.moves_on(Event.REFUSED, f"it refused the request with status {head.status}")
                return
            self.account.refused()
        self._kind = kind = self._kind_of(head)
        self.receive = kind.receive
        if is_error and not self.bodiless and isinstance(kind, Reply):
            kind.tell()

    def end(self, piece: bytes, trailers: bytes) -> None:
        """See Exchange.end."""
        self._is_over = True
        if self._kind is not None:
            self._kind.end(piece, trailers)

    def upgraded(self, head: ResponseHead, rest: bytes) -> None:
        """See Exchange.upgraded: from here on bytes pass both ways until one side closes."""
        if not self.sink.client.wants_upgrade or self.sink.has_head:
            self._abandon()
            self.moves_on(Event.CUT, "it changed the protocol, which nobody had asked for")
            return
        self.begins()
        self.sink.upgraded(head, rest)
        self._become(Tunnel(self, self._connection))

    def lost(self, error: WorkerFailedError | BrokenResponseError) -> None:
        """See Exchange.lost."""
        self._is_over = True
        if isinstance(self._kind, Tunnel):
            # It has no other end.
            self._attempt.finished()
            self.sink.client.close()
        elif self.has_begun:
            self.break_off(stream_broke_off())
        else:
            self._attempt.settle(Event.STALE if isinstance(error, StaleConnectionError) else Event.CUT, error)

    def crashed(self, error: Exception) -> None:
        """See Exchange.crashed, Paced.crashed and Watched.crashed."""
        self._abandon()
        self._attempt.settle(Event.CRASHED, response_not_handled())
        if self.sink.has_head:
            self.sink.client.close()

    def worker_paused(self) -> None:
        """See Exchange.worker_paused. An upload waits by itself."""
        if isinstance(self._kind, Tunnel):
            self.sink.client.pause()

    def worker_resumed(self) -> None:
        """See Exchange.worker_resumed."""
        if isinstance(self._kind, Tunnel):
            self.sink.client.resume()

    # What the client and the clock tell.

    def client_paused(self) -> None:
        """See Paced.client_paused."""
        if not self._is_over:
            self._connection.pause()

    def client_resumed(self) -> None:
        """See Paced.client_resumed."""
        self.progressed = True
        if not self._is_over:
            self._connection.resume()

    def client_gone(self) -> None:
        """See Paced.client_gone."""
        self._abandon()
        self._attempt.settle(Event.LEFT, ClientGoneError("the client has closed its connection"))

    def timed_out(self) -> None:
        """See Watched.timed_out."""
        if self._is_over or self._is_put_off():
            return
        silent_s = self.limit_s + self._beyond_s
        self._abandon()
        if self.sink.client.is_paused:
            self.sink.client.abort()
            reason = f"the client has not read anything for {self.limit_s:g} s"
            self._attempt.settle(Event.LEFT, ClientGoneError(reason))
        elif self.has_begun:
            self.break_off(worker_silent(silent_s))
        else:
            self._attempt.settle(Event.SILENT, worker_silent(silent_s))

    def silent_s(self, now_s: float) -> float:
        """Return how long nothing has come, in seconds of the loop's time, as the last look knew."""
        return 0.0 if self.progressed else now_s - (self.deadline_s - self.limit_s) + self._beyond_s

    def worker_out(self, reason: str) -> None:
        """Note that the worker may no longer be chosen: a request that it has not answered moves on."""
        if not self._is_over and not self.has_begun:
            self._abandon()
            self.moves_on(Event.OUT, reason)

    def worker_gone(self, reason: str) -> None:
        """Note that there is no such worker any more: what it has begun breaks off as well."""
        if self._is_over:
            return
        self.worker_out(reason)
        if self.has_begun:
            self._abandon()
            self.break_off(stream_broke_off())

    # What the kinds do with it.

    @property
    def may_follow_comments(self) -> bool:
        """Whether comments may go ahead: the client has had nothing of it, and can take it behind them."""
        return not self.has_begun and (self._kind is None or isinstance(self._kind, Stream | LateReply))

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes of this attempt."""
        return self._is_over

    def begins(self, *, is_long: bool = False) -> None:
        """Note that the client gets some of this answer now; ``is_long``: it may take minutes."""
        # Progress, or the time-out for a first byte would go on counting.
        self.has_begun = self.progressed = True
        self.limit_s = self.limits.stall_s
        self._attempt.begun(is_long=is_long)

    def may_move(self, event: Event) -> bool:
        """Tell whether another worker would get the request after ``event``."""
        return self._attempt.may_move(event)

    def moves_on(self, event: Event, reason: str) -> None:
        """End this attempt: the client has had nothing of it."""
        self._attempt.settle(event, WorkerFailedError(reason))

    def complete(self, trailers: bytes) -> None:
        """Send what is left of the answer and its end, and wake the handler."""
        sink = self.sink
        sink.finish(trailers)
        self._attempt.finished()
        if sink.ends_by_close:
            sink.client.close()

    def break_off(self, error: ProxyError, event: bytes | None = None) -> None:
        """End an answer of which the client has had a part; ``event`` says why, else ``error`` does."""
        if isinstance(self._kind, Stream):
            self.sink.pass_on(self._kind.rest())
        self.sink.say(error.event(self.path) if event is None else event)
        self._attempt.settle(Event.BROKE_OFF, error)
        # Without the framing's end: a client that ignores the event still sees a broken response.
        self.sink.client.close()

    def become_reply(self, head: ResponseHead) -> Reply:
        """Let the rest pass as it comes; return what it goes to."""
        reply = Reply(self, head, is_read=False)
        self._become(reply)
        return reply

    def _become(self, kind: Kind) -> None:
        self._kind = kind
        self.receive = kind.receive

    def _kind_of(self, head: ResponseHead) -> Kind:
        is_encoded = b"content-encoding" in head.known and head.is_encoded
        media_type = b"" if self.bodiless or is_encoded else head.media_type
        if media_type == b"text/event-stream":
            return Stream(self, head)
        if self.sink.has_head:
            return LateReply(self, head.status)
        if (
            head.status >= _ERROR
            and not is_encoded
            and self.account.dialect.may_tell_death(head.status)
            and self.may_move(Event.DIED)
        ):
            return ErrorBody(self, head)
        return Reply(self, head, is_read=media_type == b"application/json" and head.status < 300)

    @property
    def _beyond_s(self) -> float:
        """How long this is kept beyond its time-out; nothing has come since (seconds)."""
        return self._kept_s if self.deadline_s == self._kept_until_s else 0.0

    def _is_put_off(self) -> bool:
        """Look whether the engine has the request still; then it has more time."""
        if self.sink.client.is_paused or isinstance(self._kind, Tunnel):
            return False
        kept_s = self._beyond_s
        more_s = self._attempt.put_off_s(self.member, kept_s)
        if not more_s:
            return False
        self._kept_s = kept_s + more_s
        self.deadline_s += more_s
        self._kept_until_s = self.deadline_s
        return True

    def _abandon(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._connection.abandon()


def _ignore(_piece: bytes) -> None:
    """Take what comes when all has been said: nothing does."""
