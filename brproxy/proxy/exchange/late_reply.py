"""An answer that is no stream, for a client that has been told to expect one.

It has had comments of a worker that then turned the request down; what another worker says of it, an error
mostly, reaches it as an event.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from brproxy.proxy.errors import stream_broke_off

if TYPE_CHECKING:
    from brproxy.proxy.exchange.deciding import WorkerAnswer

HELD_BYTES_MAX = 1 << 16
"""What fits into an event; of a longer answer the client only learns that there was one."""


class LateReply:
    """Keeps an answer and sends it as the last event of a stream that has no clean end."""

    __slots__ = ("_answer", "_held", "_is_long")

    def __init__(self, answer: WorkerAnswer) -> None:
        self._answer = answer
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
        lines = [] if self._is_long else self._held.splitlines()
        event = b"".join(b"data: %b\n" % line for line in lines) + b"\n" if lines else None
        self._answer.break_off(stream_broke_off(), event)
