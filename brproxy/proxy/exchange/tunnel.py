"""A connection that goes on in another protocol: bytes pass both ways until one side closes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from brproxy.relay.connection import WorkerConnection

if TYPE_CHECKING:
    from brproxy.proxy.exchange.deciding import WorkerAnswer


class Tunnel:
    """Bytes between a client and a worker; silence in both directions for ``stall_s`` ends it."""

    __slots__ = ("_answer", "_connection", "_write")

    def __init__(self, answer: WorkerAnswer, connection: WorkerConnection) -> None:
        self._answer = answer
        self._connection = connection
        self._write = answer.sink.write
        answer.sink.client.tunnel(self._to_worker)

    def receive(self, payload: bytes) -> None:
        """See Kind.receive."""
        self._answer.progressed = True
        self._write(payload)

    def end(self, piece: bytes, trailers: bytes) -> None:
        """See Kind.end: a tunnel has none but its connection's."""

    def _to_worker(self, payload: bytes) -> None:
        self._answer.progressed = True
        self._connection.write(payload)
