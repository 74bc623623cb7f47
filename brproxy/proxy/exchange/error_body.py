"""The body of an error that may tell of the engine's death: held until it is known whether it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from brproxy.journey import Event
from brproxy.relay.response import ResponseHead

if TYPE_CHECKING:
    from brproxy.proxy.exchange.deciding import WorkerAnswer

HELD_BYTES_MAX = 1 << 16
"""An engine says in a few hundred bytes that it is dead; what is longer passes as any error does."""


class ErrorBody:
    """An error's first bytes: the engine's last words move the request on, all others pass."""

    __slots__ = ("_answer", "_head", "_held")

    def __init__(self, answer: WorkerAnswer, head: ResponseHead) -> None:
        self._answer = answer
        self._head = head
        self._held = b""

    def receive(self, payload: bytes) -> None:
        """See Kind.receive."""
        self._answer.progressed = True
        self._held += payload
        if len(self._held) > HELD_BYTES_MAX:
            self._answer.become_reply(self._head).receive(self._held)

    def end(self, piece: bytes, trailers: bytes) -> None:
        """See Kind.end."""
        body, answer = self._held + piece, self._answer
        if answer.account.dialect.is_death(self._head.status, body) and answer.may_move(Event.DIED):
            answer.moves_on(Event.DIED, "its engine is dead")
        else:
            answer.become_reply(self._head).end(body, trailers)
