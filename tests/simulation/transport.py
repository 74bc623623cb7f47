"""A connection in memory: two transports, and bytes that take time between them and are cut at random.

What a transport has been given and its peer has not taken yet lies with the peer (``_incoming``). The first
``window_bytes`` of it are what a kernel would hold for both; what is beyond counts as the sender's write
buffer, with water marks as asyncio's, some of them far lower so that little is much. As asyncio's own
transports do, ``abort`` throws that buffer away and closes: the peer sees what the kernel had, and an end.
``reset`` is what no asyncio transport does, and others do: bytes on the way are lost and the peer gets
ECONNRESET.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.simulation.network import Network

PROXY = ("proxy", 8000)
_READ_BYTES_MAX = 256 * 1024
_HIGH_BYTES = 64 * 1024


class Link:
    """One connection; ``ends`` are the transports of who connected and of who was connected to."""

    def __init__(self, network: Network, name: str, rng: random.Random) -> None:
        self.network = network
        self.loop = network.loop
        self.rng = rng
        # How this connection's bytes are cut: mostly not, so that most of a run is about something else.
        self.cut = rng.choice(("whole", "whole", "halves", "crumbs"))
        self.latency_s_max = network.latency_s_max
        self.window_bytes = rng.choice((512, 4096, 65_536, 262_144))
        self.high_bytes = rng.choice((256, 2048, _HIGH_BYTES))
        near, far = MemoryTransport(self, name + ">"), MemoryTransport(self, name + "<")
        near.peer, far.peer = far, near
        self.ends = near, far

    def piece(self, available: int) -> int:
        """Return how many bytes of ``available`` the next read gets."""
        most = min(available, _READ_BYTES_MAX)
        if self.cut == "whole" or most == 1:
            return most
        if self.cut == "halves" or most > 2048:
            return self.rng.randint(1, most)
        return min(most, self.rng.randint(1, 200))

    def delay_s(self) -> float:
        """Return how long the next bytes take."""
        return self.rng.random() * self.latency_s_max


class MemoryTransport(asyncio.Transport):
    """One end of a connection; ``taken_bytes`` were told to its protocol, ``written_bytes`` sent."""

    def __init__(self, link: Link, name: str) -> None:
        super().__init__()
        self.name = name
        self.peer: MemoryTransport
        self._link = link
        self._loop = link.loop
        self._protocol: asyncio.Protocol | None = None
        self._incoming = bytearray()
        self.taken_bytes = self.written_bytes = 0
        self._eof_comes = self._reset_comes = self._eof_told = False
        self._paused = self._closing = self._closed = self._eof_written = False
        self._protocol_paused = False
        self._high, self._low = link.high_bytes, link.high_bytes // 4
        self._pump: asyncio.Handle | None = None
        host, _, rest = name.partition(":")
        # Of a connection to the proxy the far end is the proxy's, of one to a worker the near end.
        self.is_clients = host == PROXY[0]
        self.is_proxys = self.is_clients == name.endswith("<")
        self._names = {"peername": (host, 0), "sockname": (host, int(rest.partition("#")[0]))}

    def __repr__(self) -> str:
        state = "closed" if self._closed else "closing" if self._closing else "open"
        return f"<{self.name} {state} incoming={len(self._incoming)}>"

    @property
    def unread(self) -> bytes:
        """What has come and was not read."""
        return bytes(self._incoming)

    @property
    def will_end(self) -> bool:
        """Whether the peer has closed, whether or not that has been noticed."""
        return self._eof_comes or self._reset_comes or self._closing

    def start(self, protocol: asyncio.Protocol) -> None:
        """Tell ``protocol`` that it is connected; from now on it reads."""
        self._link.network.open[self] = None
        self._protocol = protocol
        if self._closed:
            return
        self._tell(protocol.connection_made, self)
        self._read_soon()

    # asyncio.Transport.

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._names.get(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self):
        return self._protocol

    def is_closing(self) -> bool:
        return self._closing

    def is_reading(self) -> bool:
        return not self._closing and not self._paused

    def pause_reading(self) -> None:
        if not self._closing:
            self._paused = True

    def resume_reading(self) -> None:
        if self._paused and not self._closing:
            self._paused = False
            self._read_soon()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = self._link.high_bytes if high is None else high
        self._low = self._high // 4 if low is None else low
        self._maybe_pause()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def get_write_buffer_size(self) -> int:
        return max(0, len(self.peer._incoming) - self._link.window_bytes)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not isinstance(data, bytes | bytearray | memoryview):
            msg = f"data argument must be a bytes-like object, not {type(data).__name__}"
            raise TypeError(msg)
        if self._eof_written:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self._closing or not data:
            return
        self._link.network.note(self.name, "write", data)
        if self._reset_comes:
            self._force_close(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))
        elif self.peer._closed:
            # Nobody is there any more, which the peer's system says when the bytes arrive.
            self._reset_comes = True
            self._read_soon()
        else:
            self.peer._incoming += data
            self.written_bytes += len(data)
            self.peer._read_soon()
            self._maybe_pause()
            if self.is_clients and self.is_proxys:
                network = self._link.network
                network.buffered_bytes_most = max(network.buffered_bytes_most, self.get_write_buffer_size())

    def writelines(self, list_of_data: Iterable[bytes]) -> None:
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if not self._closing and not self._eof_written:
            self._eof_written = True
            self._link.network.note(self.name, "eof")
            self.peer._eof_comes = True
            self.peer._read_soon()

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._link.network.note(self.name, "close")
            if not self.get_write_buffer_size():
                self._loop.call_soon(self._lose, None)

    def abort(self) -> None:
        self._force_close(None)

    def reset(self) -> None:
        """Close so that the peer loses what is on its way to it, from some byte on, and gets ECONNRESET."""
        incoming = self.peer._incoming
        del incoming[self._link.rng.randint(0, len(incoming)) :]
        self.peer._reset_comes = True
        self._force_close(None)

    # How it goes on.

    def _tell(self, callback, *arguments) -> Any:
        """Call a protocol; what it raises is said and ends the connection, as asyncio does it."""
        try:
            return callback(*arguments)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - as asyncio does
            self._loop.call_exception_handler(
                {"message": f"{self.name}: {callback.__qualname__} failed", "exception": error}
            )
            self._force_close(error if isinstance(error, Exception) else None)
            return None

    def _maybe_pause(self) -> None:
        if self.get_write_buffer_size() > self._high and not self._protocol_paused and self._protocol:
            self._protocol_paused = True
            self._tell(self._protocol.pause_writing)

    def _taken(self) -> None:
        """Note that the peer has taken some of what was written."""
        size = self.get_write_buffer_size()
        if self._closing:
            if not size:
                self._lose(None)
        elif self._protocol_paused and size <= self._low:
            self._protocol_paused = False
            self._tell(self._protocol.resume_writing)

    def _read_soon(self) -> None:
        if self._pump is None and not self._closed:
            self._pump = self._loop.call_later(self._link.delay_s(), self._read)

    def _read(self) -> None:
        """Give the protocol some of what has come, or the end."""
        self._pump = None
        protocol = self._protocol
        if protocol is None or self._paused or self._closing:
            return
        if self._incoming:
            size = self._link.piece(len(self._incoming))
            data = bytes(self._incoming[:size])
            del self._incoming[:size]
            self.taken_bytes += size
            if self.peer._protocol_paused or (self.peer._closing and not self.peer._closed):
                self._loop.call_soon(self.peer._taken)
            self._link.network.note(self.name, "read", data)
            self._tell(protocol.data_received, data)
            if self._incoming or self._eof_comes or self._reset_comes:
                self._read_soon()
        elif self._reset_comes:
            self._force_close(ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)))
        elif self._eof_comes and not self._eof_told:
            self._eof_told = True
            self._link.network.note(self.name, "end")
            if not self._tell(protocol.eof_received):
                self.close()

    def _force_close(self, error: Exception | None) -> None:
        if self._closed:
            return
        if not self._closing or self.get_write_buffer_size():
            self._loop.call_soon(self._lose, error)
        self._closing = True
        self._link.network.note(self.name, "abort")
        del self.peer._incoming[self._link.window_bytes :]

    def _lose(self, error: Exception | None) -> None:
        if self._closed:
            return
        self._closed = self._closing = True
        if self._pump is not None:
            self._pump.cancel()
        network, peer, protocol = self._link.network, self.peer, self._protocol
        network.open.pop(self, None)
        network.note(self.name, "closed")
        if self._incoming:
            # Bytes that nobody has read: the system resets the connection when it is closed.
            peer._reset_comes = True
        peer._eof_comes = True
        self._incoming.clear()
        if peer._protocol_paused or (peer._closing and not peer._closed):
            # It has more to write, and is told that nobody is there.
            self._loop.call_soon(
                peer._lose, ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            )
        peer._read_soon()
        if protocol is not None:
            self._protocol = None
            self._tell(protocol.connection_lost, error)
