"""An answer that is no stream: its bytes pass as they come, and a copy of a JSON reply is read for usage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from brproxy.relay.framing import choose_framing
from brproxy.relay.response import ResponseHead

if TYPE_CHECKING:
    from brproxy.proxy.exchange.deciding import WorkerAnswer


class Reply:
    """The bytes of any answer that nobody has to look into while it passes."""

    __slots__ = ("_answer", "_copy", "_copy_bytes", "_head")

    def __init__(self, answer: WorkerAnswer, head: ResponseHead, *, is_read: bool) -> None:
        self._answer = answer
        self._head = head
        self._copy: list[bytes] | None = [] if is_read else None
        self._copy_bytes = 0

    def receive(self, payload: bytes) -> None:
        """See Kind.receive."""
        answer = self._answer
        answer.progressed = True
        if not answer.has_begun:
            self._begin()
        copy = self._copy
        if copy is not None:
            copy.append(payload)
            self._copy_bytes += len(payload)
            if self._copy_bytes > answer.limits.response_parse_bytes_max:
                self._copy = None
        answer.sink.pass_on(payload)

    def end(self, piece: bytes, trailers: bytes) -> None:
        """See Kind.end."""
        answer, sink = self._answer, self._answer.sink
        sink.is_corked = True
        if piece:
            self.receive(piece)
        if self._copy:
            answer.account.reply(b"".join(self._copy))
        answer.account.learn()
        if not answer.has_begun:
            self._begin()
        answer.complete(trailers)

    def tell(self) -> None:
        """Send the head before there is a body: an error is known by it, and its body may never come."""
        self._begin()
        self._answer.sink.flush()

    def _begin(self) -> None:
        answer, sink = self._answer, self._answer.sink
        http10 = sink.client.is_http10
        framing = choose_framing(self._head, http10=http10, bodiless=answer.bodiless, rewritten=False)
        answer.begins()
        sink.begin(self._head, framing, is_stream=False)
