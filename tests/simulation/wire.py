"""The end of a connection that a script holds, a client's or a worker's."""

from __future__ import annotations

import asyncio
import math

from tests.simulation.transport import MemoryTransport


class Wire(asyncio.Protocol):
    """Keeps what has come in ``received``. ``ended``: there will be no more; ``lost``: nothing can be sent.

    ``requests``: how many have come to the worker whose end it is; that was killed at ``killed_s``, if so.

    A wire that reaches an end of its peer's stays open to write, as only a script may want it.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport: MemoryTransport
        self.received = bytearray()
        self.ended = self.lost = False
        self.was_reset = self.is_killed = False
        self.killed_s = math.inf
        self.requests = 0
        self._news: asyncio.Future[None] | None = None
        self._may_write: asyncio.Future[None] | None = None

    def connection_made(self, transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        self._wake()

    def eof_received(self) -> bool:
        self.ended = True
        self._wake()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = self.lost = True
        self.was_reset = exc is not None
        self._wake()
        self.resume_writing()

    def pause_writing(self) -> None:
        self._may_write = self.loop.create_future()

    def resume_writing(self) -> None:
        if self._may_write is not None and not self._may_write.done():
            self._may_write.set_result(None)
        self._may_write = None

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def more(self) -> bool:
        """Wait for more than there is; return False when nothing more will come."""
        if self.ended:
            return False
        known = len(self.received)
        while len(self.received) == known and not self.ended:
            self._news = self.loop.create_future()
            await self._news
        return len(self.received) > known

    async def line(self) -> bytes:
        """Return the next line without its end, b"" when nothing more comes."""
        while b"\r\n" not in self.received and await self.more():
            pass
        line, end, rest = bytes(self.received).partition(b"\r\n")
        self.received[:] = rest
        return line if end else b""

    async def exactly(self, size: int) -> bytes:
        """Return the next ``size`` bytes; fewer when nothing more comes."""
        while len(self.received) < size and await self.more():
            pass
        data = bytes(self.received[:size])
        del self.received[:size]
        return data

    async def gone(self) -> None:
        """Wait until the peer has closed or half-closed, whatever comes until then."""
        while await self.more():
            pass

    async def send(self, data: bytes) -> None:
        """Write and wait until there is room for more."""
        self.transport.write(data)
        if self._may_write is not None:
            await self._may_write
