"""A prefill worker's answer: it says how what has been prefilled is fetched, and goes to no client."""

from __future__ import annotations

from http import HTTPStatus
from typing import Protocol

from brproxy.journey import Event
from brproxy.proxy.accounting import Account
from brproxy.proxy.exchange.client_sink import ClientSink
from brproxy.proxy.exchange.deciding import Attempt, Kind, WorkerAnswer
from brproxy.proxy.service import RelayLimits
from brproxy.relay.response import ResponseHead
from brproxy.roster import Member


class PrefillAttempt(Attempt, Protocol):
    """Whoever drives the attempts at a prefill, as an answer sees it."""

    def handed(self, body: bytes) -> None:
        """Take the body of a complete answer."""


class PrefillAnswer(WorkerAnswer):
    """A prefill worker's answer. An error passes to the client as any worker's does."""

    __slots__ = ("_prefill",)

    def __init__(
        self,
        attempt: PrefillAttempt,
        sink: ClientSink,
        account: Account,
        limits: RelayLimits,
        *,
        path: str,
        member: Member,
    ) -> None:
        super().__init__(attempt, sink, account, limits, path=path, member=member, bodiless=False)
        self._prefill = attempt

    def handed(self, body: bytes) -> None:
        """Take the whole body of an answer that is no error."""
        self._prefill.handed(body)
        self._prefill.finished()

    def too_long(self) -> None:
        """Give up on an answer that has more bytes than an answer without a client may have."""
        self._abandon()
        self.moves_on(Event.CUT, f"its answer has over {self.limits.response_parse_bytes_max} bytes")

    def _kind_of(self, head: ResponseHead) -> Kind:
        if head.status < HTTPStatus.MULTIPLE_CHOICES:
            return Handles(self)
        return super()._kind_of(head)


class DecodeAnswer(WorkerAnswer):
    """The answer of a worker that decodes what another has prefilled; ``is_error``: it does not."""

    __slots__ = ("is_error",)

    is_error: bool

    def head(self, head: ResponseHead) -> None:
        """See Exchange.head."""
        self.is_error = head.status >= HTTPStatus.BAD_REQUEST
        super().head(head)


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
        self._bytes += len(payload)
        if self._bytes > self._answer.limits.response_parse_bytes_max:
            self._answer.too_long()
            return
        self._pieces.append(payload)

    def end(self, piece: bytes, trailers: bytes) -> None:
        """See Kind.end."""
        self._answer.handed(b"".join(self._pieces) + piece)
