"""Who can be connected to, and what becomes of attempts to connect."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import random
from collections.abc import Callable

from tests.simulation.transport import Link, MemoryTransport

Address = tuple[str, int]
Factory = Callable[[], asyncio.Protocol]

_ACCEPT_AGAIN_S = 0.1
_NOTED_BYTES_MAX = 65_536


class Door:
    """A listening address. ``mode``: "open", "refuse", "silent" (no answer) or "reset" (at once)."""

    def __init__(self, factory: Factory) -> None:
        self.factory = factory
        self.mode = "open"


class Network:
    """All connections of one simulation: drawn from ``seed``, and told to ``digest``.

    ``buffered_bytes_most``: the largest write buffer that any client's connection had in the proxy.
    ``out_of_files``: the proxy has no descriptor left, neither to connect nor to accept.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.seed = 0
        self.latency_s_max = 0.005
        self.out_of_files = False
        self.buffered_bytes_most = 0
        self.doors: dict[Address, Door] = {}
        self.open: dict[MemoryTransport, None] = {}
        self._opened = 0
        self._digest = hashlib.blake2b(digest_size=16)
        # Digested many events at a time.
        self._noted = bytearray()

    def note(self, name: str, what: str, data: bytes = b"") -> None:
        """Put an event into the digest of the whole run."""
        self._noted += f"{self.loop.time()!r} {name} {what} {len(data)}\n".encode()
        self._noted += data
        if len(self._noted) > _NOTED_BYTES_MAX:
            self._digest_noted()

    def _digest_noted(self) -> None:
        self._digest.update(self._noted)
        self._noted.clear()

    @property
    def digest(self) -> str:
        """What the run was, in 32 digits: equal for equal runs."""
        self._digest_noted()
        return self._digest.copy().hexdigest()

    def listen(self, factory: Factory, host: str, port: int) -> MemoryServer:
        """Have connections to ``host:port`` answered by ``factory``."""
        self.doors[host, port] = Door(factory)
        return MemoryServer(self, (host, port))

    async def connect_from_proxy(self, factory: Factory, host: str, port: int):
        """Connect as the proxy, which may be out of files."""
        if self.out_of_files:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return await self.connect(factory, host, port)

    async def connect(self, factory: Factory, host: str, port: int):
        """Return the transport and protocol of a new connection; raises OSError."""
        self._opened += 1
        name = f"{host}:{port}#{self._opened}"
        rng = random.Random(f"{self.seed} {name}")
        await asyncio.sleep(rng.random() * self.latency_s_max)
        door = self.doors.get((host, port))
        if door is not None and door.mode == "silent":
            self.note(name, "silent")
            await asyncio.sleep(127)
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        if door is None or door.mode == "refuse":
            self.note(name, "refused")
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"Connect call failed ('{host}', {port})")
        link = Link(self, name, rng)
        near, far = link.ends
        made = self.loop.create_future()
        protocol = factory()
        self.loop.call_soon(near.start, protocol)
        self.loop.call_soon(_set, made)
        self.loop.call_later(rng.random() * self.latency_s_max, self._accept, door, far)
        try:
            await made
        except BaseException:
            near.close()
            raise
        return near, protocol

    def _accept(self, door: Door, far: MemoryTransport) -> None:
        if door.mode == "reset" or door not in self.doors.values():
            # Whoever has not been accepted by the time that nobody listens any more is reset.
            far.reset()
        elif self.out_of_files and far.is_proxys:
            self.loop.call_later(_ACCEPT_AGAIN_S, self._accept, door, far)
        else:
            far.start(door.factory())


class MemoryServer(asyncio.AbstractServer):
    """What ``create_server`` returns."""

    def __init__(self, network: Network, address: Address) -> None:
        self._network = network
        self._address = address
        self.sockets = (self,)

    def getsockname(self) -> Address:
        return self._address

    def get_loop(self):
        return self._network.loop

    def is_serving(self) -> bool:
        return self._address in self._network.doors

    def close(self) -> None:
        self._network.doors.pop(self._address, None)

    async def start_serving(self) -> None:
        pass

    async def wait_closed(self) -> None:
        pass


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
