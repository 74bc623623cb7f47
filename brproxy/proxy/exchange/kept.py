"""An answer that another worker may go on with: its end is not the client's, if it comes too early."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from brproxy.journey import Event
from brproxy.proxy.errors import ProxyError, gave_up, stream_broke_off
from brproxy.proxy.exchange.deciding import Kind, WorkerAnswer
from brproxy.proxy.exchange.handles import DecodeAnswer, PairedAnswer
from brproxy.proxy.exchange.reply import Reply
from brproxy.proxy.exchange.stream import Stream
from brproxy.proxy.kept_events import Keeper, KeptEvents
from brproxy.relay.framing import Framing, choose_framing
from brproxy.relay.response import ResponseHead

if TYPE_CHECKING:
    from brproxy.proxy.accounting import Account

MARK: Final = b"X-Brproxy-Failover: possible\r\n"
"""Tells the client of a stream that another worker may go on with it."""


class _Kept(WorkerAnswer):
    """What all answers that may go on elsewhere have in common; ``keeper`` is set before they are sent."""

    __slots__ = ()

    keeper: Keeper

    def break_off(self, error: ProxyError, event: bytes | None = None) -> None:
        """See WorkerAnswer.break_off: where another worker may go on, whoever drives this decides."""
        keeper = self.keeper
        is_cut = event is None and error.status == HTTPStatus.BAD_GATEWAY
        if is_cut and isinstance(self._kind, KeptStream) and (keeper.is_cut or keeper.may_fail_over):
            keeper.is_cut, keeper.member = True, self.member
            self._flush()
            self._attempt.settle(Event.BROKE_OFF, error)
        else:
            super().break_off(error, event)

    def begins(self, *, is_long: bool = False) -> None:
        """See WorkerAnswer.begins."""
        self.keeper.has_passed = True
        super().begins(is_long=is_long)

    def cut_short(self) -> None:
        """Leave an answer whose engine has died."""
        self._abandon()
        self.break_off(stream_broke_off())

    def end_part(self) -> None:
        """Take the end of an answer that the worker gave up: it goes on, starts over, or ends as an error."""
        keeper = self.keeper
        if keeper.recomputed_left and (keeper.can_go_on or not keeper.has_passed):
            if not keeper.can_go_on:
                keeper.start_over()
            self._flush()
            if not self.has_begun:
                # What was prefilled for it has been fetched all the same.
                self._attempt.begun(is_long=False)
            self._attempt.finished()
        elif self.sink.has_head:
            super().break_off(gave_up())
        else:
            # The client has had nothing, and is answered as if nobody had taken the request.
            self._attempt.settle(Event.CRASHED, gave_up())

    def _flush(self) -> None:
        self.sink.is_corked = False
        self.sink.flush()

    def _kind_of(self, head: ResponseHead) -> Kind:
        kind = super()._kind_of(head)
        if isinstance(kind, Stream):
            return KeptStream(self, head)
        is_json = head.media_type == b"application/json" and head.status < HTTPStatus.MULTIPLE_CHOICES
        if isinstance(kind, Reply) and is_json and not head.is_encoded and self.keeper.is_watched:
            return KeptReply(self, head)
        return kind


class KeptAnswer(_Kept):
    """A worker's answer with which another may go on."""

    __slots__ = ("keeper",)


class KeptDecodeAnswer(_Kept, DecodeAnswer):
    """The same of a worker that decodes what another has prefilled."""

    __slots__ = ("keeper",)


class KeptPairedAnswer(_Kept, PairedAnswer):
    """The same of a worker that decodes what another prefills beside it."""

    __slots__ = ("keeper",)


class KeptStream(Stream):
    """A stream of which each event is looked into."""

    __slots__ = ("_keeper", "_kept")

    def __init__(self, answer: _Kept, head: ResponseHead) -> None:
        self._kept, self._keeper = answer, answer.keeper
        if self._keeper.failovers_left and self._keeper.completion is not None:
            head = head._replace(lines=head.lines + MARK)
        super().__init__(answer, head)
        self._events = KeptEvents(answer.account, answer.limits.event_bytes_max, self._keeper)

    def end(self, piece: bytes, trailers: bytes) -> None:
        """See Kind.end."""
        if piece:
            self._receive_exactly(piece)
        if self._is_turned_down or self._keeper.is_cut:
            return
        if self._keeper.is_given_up:
            self._stop_timer()
            self._kept.end_part()
        else:
            super().end(b"", trailers)

    def _receive_exactly(self, payload: bytes) -> None:
        super()._receive_exactly(payload)
        if self._keeper.is_cut and not self._is_turned_down:
            self._kept.cut_short()

    def _framing(self) -> Framing:
        # What another worker adds is in no length.
        return choose_framing(self._head, http10=self._sink.client.is_http10, bodiless=False, rewritten=True)


class KeptReply:
    """A reply that is looked into before it goes on: within a limit, beyond it passes."""

    __slots__ = ("_account", "_answer", "_bytes", "_head", "_pieces")

    def __init__(self, answer: _Kept, head: ResponseHead) -> None:
        self._answer = answer
        self._account: Account = answer.account
        self._head = head
        self._pieces: list[bytes] = []
        self._bytes = 0

    def receive(self, payload: bytes) -> None:
        """See Kind.receive."""
        answer = self._answer
        answer.progressed = True
        self._pieces.append(payload)
        self._bytes += len(payload)
        if self._bytes > answer.limits.response_parse_bytes_max:
            answer.become_reply(self._head).receive(b"".join(self._pieces))
            self._pieces.clear()

    def end(self, piece: bytes, trailers: bytes) -> None:
        """See Kind.end."""
        answer, keeper = self._answer, self._answer.keeper
        body, head = b"".join(self._pieces) + piece, self._head
        self._account.reply(body)
        completion = keeper.completion
        if keeper.asks_again(body):
            keeper.is_given_up = True
            if completion is not None:
                completion.take(body, given_up=True)
            answer.end_part()
            return
        if completion is not None and completion.is_continued:
            body = completion.joined(body)
            head = head._replace(length=b"%d" % len(body), chunked=False)
        answer.become_reply(head).end(body, trailers)
