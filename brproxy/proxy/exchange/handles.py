"""The answers to both legs: a prefill worker's, which goes to no client, and that of who decodes after it."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Protocol

from brproxy.engines.dialect import EventFacts
from brproxy.journey import Event
from brproxy.proxy.accounting import Account
from brproxy.proxy.exchange.client_sink import ClientSink
from brproxy.proxy.exchange.deciding import Attempt, Kind, WorkerAnswer
from brproxy.proxy.service import RelayLimits
from brproxy.relay.errors import BrokenResponseError, ClientGoneError, WorkerFailedError
from brproxy.relay.response import ResponseHead
from brproxy.roster import Member

# As plain numbers: looking a member of an enumeration up costs more than comparing it.
_OTHER = int(HTTPStatus.MULTIPLE_CHOICES)
_ERROR = int(HTTPStatus.BAD_REQUEST)
_OF_SERVER = int(HTTPStatus.INTERNAL_SERVER_ERROR)


class PrefillAttempt(Attempt, Protocol):
    """Whoever drives the attempts at a prefill, as an answer sees it."""

    def handed(self, body: bytes) -> None:
        """Take the body of a complete answer."""

    def adopts(self, answer: PrefillAnswer) -> bool:
        """Tell whether an answer that is left before its end is waited for all the same."""


class DecodeAttempt(Attempt, Protocol):
    """Whoever drives the attempts at decoding, as an answer sees it."""

    def may_serve_alone(self, event: Event) -> bool:
        """Tell whether the same worker would get the request once more after ``event``, without handles."""


class PrefillAnswer(WorkerAnswer):
    """A prefill worker's answer. An error passes to the client as any worker's does.

    Where the client leaves, whoever drives this may adopt it: it then goes on for nobody, who waits for its
    ``body``. For a worker that is about to answer keeps what it has prefilled, and only its answer says how
    that is freed.
    """

    __slots__ = ("_prefill", "orphaned")

    def __init__(
        self,
        attempt: PrefillAttempt,
        sink: ClientSink,
        account: Account,
        limits: RelayLimits,
        *,
        path: str,
        member: Member,
        bodiless: bool,
    ) -> None:
        super().__init__(attempt, sink, account, limits, path=path, member=member, bodiless=bodiless)
        self._prefill = attempt
        self.orphaned: asyncio.Future[bytes | None] | None = None

    def close(self) -> None:
        """See WorkerAnswer.close."""
        if self._is_over or not self._prefill.adopts(self):
            super().close()
            return
        self.orphaned = asyncio.get_running_loop().create_future()
        self.sink.client.finish()

    async def body(self) -> bytes | None:
        """Wait for the body of an answer that goes on for nobody; None if there will be none."""
        return None if self.orphaned is None else await self.orphaned

    def abandon(self) -> None:
        """Leave an answer that nobody waits for any more; the worker sees that, and stops."""
        self._tell(None)
        super().close()

    def handed(self, body: bytes) -> None:
        """Take the whole body of an answer that is no error."""
        if self.orphaned is not None:
            self._tell(body)
            return
        self._prefill.handed(body)
        self._prefill.finished()

    def too_long(self) -> None:
        """Give up on an answer that has more bytes than an answer without a client may have."""
        self._abandon()
        if not self._tell(None):
            self.moves_on(Event.CUT, f"its answer has over {self.limits.response_parse_bytes_max} bytes")

    def head(self, head: ResponseHead) -> None:
        """See Exchange.head."""
        if self.orphaned is None:
            super().head(head)
        elif head.status < _OTHER:
            kind = Handles(self)
            self._become(kind)
        else:
            self._abandon()
            self._tell(None)

    def lost(self, error: WorkerFailedError | BrokenResponseError) -> None:
        """See Exchange.lost."""
        if self.orphaned is None:
            super().lost(error)
        else:
            self._is_over = True
            self._tell(None)

    def client_gone(self) -> None:
        """See Paced.client_gone. What becomes of the answer is said when the attempt is closed."""
        self._prefill.settle(Event.LEFT, ClientGoneError("the client has closed its connection"))

    def _tell(self, body: bytes | None) -> bool:
        """Tell what came of an answer that goes on for nobody; return whether it is one."""
        if self.orphaned is None:
            return False
        if not self.orphaned.done():
            self.orphaned.set_result(body)
        return True

    def _kind_of(self, head: ResponseHead) -> Kind:
        if head.status < _OTHER:
            return Handles(self)
        return super()._kind_of(head)


class PairedAnswer(WorkerAnswer):
    """The answer of a worker that decodes what another prefills beside it, or has prefilled."""

    __slots__ = ("_is_error",)

    _is_error: bool

    @property
    def tells_failure(self) -> bool:
        """Whether it says, by its status or in an event so far, that the worker does not decode."""
        return self._is_error or self.account.reports_error

    def head(self, head: ResponseHead) -> None:
        """See Exchange.head."""
        self._is_error = head.status >= _ERROR
        super().head(head)


class DecodeAnswer(PairedAnswer):
    """The answer of a worker that decodes what another has prefilled.

    Engines have no word of its own for what they could not fetch: vLLM answers 500, or 200 with a stream
    whose first event is an error (seen on 0.32). So any failure of the engine's may be that, and counts as a
    death where the request can be served without.
    """

    __slots__ = ("_decode",)

    def __init__(
        self,
        attempt: DecodeAttempt,
        sink: ClientSink,
        account: Account,
        limits: RelayLimits,
        *,
        path: str,
        member: Member,
        bodiless: bool,
    ) -> None:
        super().__init__(attempt, sink, account, limits, path=path, member=member, bodiless=bodiless)
        self._decode = attempt

    def head(self, head: ResponseHead) -> None:
        """See Exchange.head."""
        if (
            head.status >= _OF_SERVER
            and not self.account.dialect.is_refusal(head.status)
            and self._decode.may_serve_alone(Event.DIED)
        ):
            self.moves_on(Event.DIED, f"it answered with status {head.status}")
            return
        super().head(head)


class DecodeAccount(Account):
    """Books the answer of a worker that decodes: its first event may be all that tells of a failed fetch."""

    __slots__ = ()

    def look(self, event: bytes) -> EventFacts:
        """See Account.look."""
        facts = super().look(event)
        return facts._replace(died=True) if facts.error and not facts.refused else facts


class Handles:
    """The body of an answer that says how to fetch what has been prefilled, collected within a limit."""

    __slots__ = ("_answer", "_bytes", "_pieces")

    def __init__(self, answer: PrefillAnswer) -> None:
        self._answer = answer
        self._pieces: list[bytes] = []
        self._bytes = 0

    def receive(self, payload: bytes) -> None:
        """See Kind.receive."""
        self._answer.progressed = True
        self._pieces.append(payload)
        self._bytes += len(payload)
        if self._is_too_long():
            self._answer.too_long()

    def end(self, piece: bytes, trailers: bytes) -> None:
        """See Kind.end."""
        self._pieces.append(piece)
        self._bytes += len(piece)
        if self._is_too_long():
            self._answer.too_long()
        else:
            self._answer.handed(b"".join(self._pieces))

    def _is_too_long(self) -> bool:
        return self._bytes > self._answer.limits.response_parse_bytes_max
