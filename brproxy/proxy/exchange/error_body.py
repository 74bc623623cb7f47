"""The body of an error that may tell of the engine's death: held until it is known whether it does."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from brproxy.journey import Event
from brproxy.relay.response import ResponseHead

if TYPE_CHECKING:
    from brproxy.proxy.exchange.deciding import WorkerAnswer

HELD_BYTES_MAX = 1 << 16
"""An engine says in a few hundred bytes that it is dead; what is longer passes as any error does."""

HELD_S = 0.8
"""It says that at once: an error whose body does not come is told without it (seconds)."""


class ErrorBody:
    """An error's first bytes: the engine's last words move the request on, all others pass."""

    __slots__ = ("_answer", "_head", "_held", "_timer")

    def __init__(self, answer: WorkerAnswer, head: ResponseHead) -> None:
        self._answer = answer
        self._head = head
        self._held = b""
        self._timer = asyncio.get_running_loop().call_later(HELD_S, self._pass)

    def receive(self, payload: bytes) -> None:
        """See Kind.receive."""
        self._answer.progressed = True
        self._held += payload
        if len(self._held) > HELD_BYTES_MAX:
            self._pass()

    def end(self, piece: bytes, trailers: bytes) -> None:
        """See Kind.end."""
        self._timer.cancel()
        body, answer = self._held + piece, self._answer
        if answer.account.dialect.is_death(self._head.status, body) and answer.may_move(Event.DIED):
            answer.moves_on(Event.DIED, "its engine is dead")
        else:
            answer.become_reply(self._head).end(body, trailers)

    def _pass(self) -> None:
        """Pass on what has come, and let the rest follow."""
        self._timer.cancel()
        if self._answer.is_over:
            return
        reply = self._answer.become_reply(self._head)
        reply.tell()
        if self._held:
            reply.receive(self._held)
