"""An answer that is no stream, for a client that has been told to expect one.

It has had comments, of the proxy or of a worker that then turned the request down; what a worker says of it
now, an error mostly, reaches it as an event. An engine's last words still move the request on.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from brproxy.engines.api_errors import event_line
from brproxy.journey import Event
from brproxy.proxy.errors import stream_broke_off

if TYPE_CHECKING:
    from brproxy.proxy.exchange.deciding import WorkerAnswer

HELD_BYTES_MAX = 1 << 16
"""What fits into an event; of a longer answer the client only learns that there was one."""


class LateReply:
    """Keeps an answer and sends it as the last event of a stream that has no clean end."""

    __slots__ = ("_answer", "_held", "_is_long", "_status")

    def __init__(self, answer: WorkerAnswer, status: int) -> None:
        self._answer = answer
        self._status = status
        self._held = b""
        self._is_long = False

    def receive(self, payload: bytes) -> None:
        """See Kind.receive."""
        self._answer.progressed = True
        if len(self._held) + len(payload) > HELD_BYTES_MAX:
            self._is_long = True
        else:
            self._held += payload

    def end(self, piece: bytes, trailers: bytes) -> None:
        """See Kind.end."""
        if piece:
            self.receive(piece)
        answer, status = self._answer, self._status
        dialect = answer.account.dialect
        if dialect.may_tell_death(status) and answer.may_move(Event.DIED) and self._tells_death():
            answer.moves_on(Event.DIED, "its engine is dead")
            return
        lines = [] if self._is_long else self._held.splitlines()
        event = None
        if lines:
            event = event_line(answer.path) if status >= HTTPStatus.BAD_REQUEST else b""
            event += b"".join(b"data: %b\n" % line for line in lines) + b"\n"
        answer.break_off(stream_broke_off(), event)

    def _tells_death(self) -> bool:
        return not self._is_long and self._answer.account.dialect.is_death(self._status, self._held)
