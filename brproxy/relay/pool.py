"""The connections to one worker: kept for as long as the worker keeps them, and a little less."""

from __future__ import annotations

import asyncio
import errno
import os
import ssl
from collections import deque
from dataclasses import dataclass
from urllib.parse import urlsplit

from brproxy.relay.connection import WorkerConnection
from brproxy.relay.errors import WorkerFailedError

_OUR_OWN = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
"""Errors of this machine, which say nothing about a worker."""


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Seconds to connect, and that an idle connection is kept (engines close theirs after 5); limits.

    ``idle_max`` connections are kept; ``head_bytes_max`` is the longest response head.
    """

    connect_s: float
    keepalive_s: float
    idle_max: int
    head_bytes_max: int


class WorkerPool:
    """Hands out connections to ``origin`` ("http://host:port"), the most recently used first.

    Needs a running event loop.
    """

    def __init__(self, origin: str, settings: PoolSettings) -> None:
        parts = urlsplit(origin)
        self.origin = origin
        self.host_field = parts.netloc.encode("ascii")
        self._is_tls = parts.scheme == "https"
        self._address = (parts.hostname or "", parts.port or (443 if self._is_tls else 80))
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._idle: deque[WorkerConnection] = deque()

    def __repr__(self) -> str:
        """Show the state in one line, for tests and logs."""
        return f"<WorkerPool {self.origin} idle={sum(c.is_idle for c in self._idle)}>"

    def take_idle(self) -> WorkerConnection | None:
        """Return a kept connection, None when there is none."""
        while self._idle:
            connection = self._idle.pop()
            # The worker may have closed it since.
            if connection.is_idle:
                return connection
        return None

    async def connect(self) -> WorkerConnection:
        """Open a new connection; raises WorkerFailedError."""
        context = ssl.create_default_context() if self._is_tls else None
        try:
            async with asyncio.timeout(self._settings.connect_s):
                _, connection = await self._loop.create_connection(
                    self._protocol, *self._address, ssl=context
                )
        except TimeoutError as error:
            msg = f"cannot connect to {self.origin} in time"
            raise WorkerFailedError(msg, unreachable=True) from error
        except OSError as error:
            # TLS has numbers of its own: a certificate that is not trusted was "Operation not permitted".
            number = 0 if isinstance(error, ssl.SSLError) else error.errno or 0
            reason = os.strerror(number) if number > 0 else str(error)
            msg = f"cannot connect to {self.origin}: {reason}"
            raise WorkerFailedError(msg, unreachable=number not in _OUR_OWN) from error
        if not connection.is_idle:
            msg = f"{self.origin} closed the connection at once"
            raise WorkerFailedError(msg, unreachable=True)
        return connection

    def expire(self, now_s: float) -> None:
        """Close what has been idle for too long; to be called about once a second."""
        oldest_s = now_s - self._settings.keepalive_s
        while self._idle and (not self._idle[0].is_idle or self._idle[0].idle_since_s < oldest_s):
            connection = self._idle.popleft()
            if connection.is_idle:
                connection.abandon()

    def close(self) -> None:
        """Close every idle connection."""
        while (connection := self.take_idle()) is not None:
            connection.abandon()

    def _protocol(self) -> WorkerConnection:
        return WorkerConnection(self.origin, self._settings.head_bytes_max, self._keep, self._loop)

    def _keep(self, connection: WorkerConnection) -> None:
        if len(self._idle) >= self._settings.idle_max:
            connection.abandon()
            return
        # Not get_running_loop: it asks the system for the process id, each time.
        connection.idle_since_s = self._loop.time()
        self._idle.append(connection)
