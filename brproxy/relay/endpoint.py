"""Where workers are reached: connections to one origin, kept as long as it keeps them and a little less.

Several workers may be behind one origin and share its endpoint. Whoever connects (requests, health checks,
questions for models) does it here, so that in one place it is told whose fault it is when that fails.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial

from brproxy.origins import read_worker_url
from brproxy.relay.connection import WorkerConnection
from brproxy.relay.errors import ShortageError, WorkerFailedError
from brproxy.relay.fields import lines_named
from brproxy.relay.tls import TlsFiles, client_context

OUR_OWN = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
"""Errors of this machine: out of files, memory or ports. They say nothing about a worker."""

_OUR_OWN_LOOKUPS = frozenset({socket.EAI_MEMORY, socket.EAI_SYSTEM})
"""The same, when it is the host's name that could not be looked up."""


class Shared:
    """What all endpoints of a proxy have together: TLS contexts, and files that idle connections hold."""

    __slots__ = ("_tls", "endpoints")

    def __init__(self) -> None:
        self._tls: dict[TlsFiles, ssl.SSLContext] = {}
        # In order, so that a simulation closes the same connections each time.
        self.endpoints: dict[Endpoint, None] = {}

    def tls(self, files: TlsFiles) -> ssl.SSLContext:
        """Return the context with these files; raises TlsFileError."""
        context = self._tls.get(files)
        if context is None:
            # Once: it reads the system's certificates, which takes 33 ms.
            context = self._tls[files] = client_context(files)
        return context

    def close_idle(self) -> bool:
        """Close every idle connection of every endpoint; return whether there were any."""
        closed = [endpoint.close_idle() for endpoint in self.endpoints]
        return any(closed)


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """Seconds to connect, and that an idle connection is kept (engines close theirs after 5); limits.

    ``idle_max`` connections are kept; ``head_bytes_max`` is the longest response head. Endpoints that are
    ``shared`` help each other out of a shortage of files.
    """

    connect_s: float
    keepalive_s: float
    idle_max: int
    head_bytes_max: int
    shared: Shared = field(default_factory=Shared)


_NO_FILES = TlsFiles()


@dataclass(frozen=True, slots=True)
class Reach:
    """How a worker is reached, besides its URL.

    ``fields`` are header fields that it gets in place of a client's of the same names.
    """

    fields: tuple[tuple[bytes, bytes], ...] = ()
    tls: TlsFiles = _NO_FILES


NOTHING_ELSE = Reach()
"""How a worker is reached of which nothing but its URL matters."""


class Endpoint:
    """Hands out connections to ``origin`` ("http://host:port"), the most recently used first.

    With a base path ("http://host:port/base") all that is asked for is below that. ``host_field`` is the
    value of Host, and behind it are the worker's own header lines. ``is_plain``: a client's target and lines
    go there as they are; else ``adapted``. Needs a running event loop; raises InvalidInputError for what is
    no such URL, and for files that cannot be used.
    """

    def __init__(self, origin: str, settings: EndpointSettings, reach: Reach = NOTHING_ELSE) -> None:
        parts, self._base = read_worker_url(origin)
        self.origin = origin
        self._authority = parts.authority.encode("ascii")
        self._is_tls = parts.scheme == "https"
        self._tls: ssl.SSLContext | None = None
        self._address = (parts.host, parts.port)
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._idle: deque[WorkerConnection] = deque()
        self._is_closed = False
        self.reach_by(reach)
        settings.shared.endpoints[self] = None

    def __repr__(self) -> str:
        """Show the state in one line, for tests and logs."""
        return f"<Endpoint {self.origin} idle={sum(c.is_idle for c in self._idle)}>"

    @property
    def is_closed(self) -> bool:
        """Whether it was closed for good: nobody is behind it any more."""
        return self._is_closed

    def reach_by(self, reach: Reach) -> None:
        """Be reached by ``reach`` from the next request on; raises TlsFileError, and has changed nothing.

        Connections that were made with other files of TLS are used for what they are used for now only.
        """
        # Now, not with the first request: nobody waits for it yet.
        tls = self._settings.shared.tls(reach.tls) if self._is_tls else None
        own = b"".join(b"\r\n%b: %b" % field for field in reach.fields)
        self.host_field = self._authority + own
        self._replaced = lines_named(name for name, _ in reach.fields) if reach.fields else None
        self.is_plain = not self._base and self._replaced is None
        if tls is not self._tls:
            self._tls = tls
            self.close_idle()

    def adapted(self, target: str, lines: bytes) -> tuple[str, bytes]:
        """Return a target and header lines as they go there: below its base, without what it replaces."""
        if target != "*":
            target = self._base + target
        return target, lines if self._replaced is None else self._replaced.sub(b"", lines)

    def take_idle(self) -> WorkerConnection | None:
        """Return a kept connection, None when there is none."""
        while self._idle:
            connection = self._idle.pop()
            # The worker may have closed it since.
            if connection.is_idle:
                return connection
        return None

    async def connect(self) -> WorkerConnection:
        """Open a new connection; raises WorkerFailedError, ShortageError where it is this machine's fault.

        In a shortage idle connections, to whomever, give way.
        """
        try:
            async with asyncio.timeout(self._settings.connect_s):
                try:
                    connection = await self._open()
                except ShortageError:
                    if not self._settings.shared.close_idle():
                        raise
                    # A loop closes what is abandoned in its next turn.
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                    connection = await self._open()
        except TimeoutError as error:
            msg = f"cannot connect to {self.origin} in time"
            raise WorkerFailedError(msg, unreachable=True) from error
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
        """Close every idle connection, for good; what is in use is closed when it is over."""
        self._is_closed = True
        self._settings.shared.endpoints.pop(self, None)
        self._settings = replace(self._settings, idle_max=0)
        self.close_idle()

    def close_idle(self) -> bool:
        """Close every idle connection; return whether there was one."""
        closed = False
        while (connection := self.take_idle()) is not None:
            connection.abandon()
            closed = True
        return closed

    async def _open(self) -> WorkerConnection:
        try:
            _, connection = await self._loop.create_connection(self._protocol, *self._address, ssl=self._tls)
        except TimeoutError:
            # Of the system, which waits longer: an OSError too.
            raise
        except OSError as error:
            raise connect_failure(self.origin, error) from error
        return connection

    def _protocol(self) -> WorkerConnection:
        keep = partial(self._keep, self._tls)
        return WorkerConnection(self.origin, self._settings.head_bytes_max, keep, self._loop)

    def _keep(self, tls: ssl.SSLContext | None, connection: WorkerConnection) -> None:
        # Nobody looks after what a closed one keeps.
        if self._is_closed or tls is not self._tls or len(self._idle) >= self._settings.idle_max:
            connection.abandon()
            return
        # Not get_running_loop: it asks the system for the process id, each time.
        connection.idle_since_s = self._loop.time()
        self._idle.append(connection)


def connect_failure(origin: str, error: OSError) -> WorkerFailedError:
    """Return what ``error``, met when connecting to ``origin``, means: theirs, or a shortage of ours."""
    if isinstance(error, ssl.SSLError):
        # TLS has numbers of its own: a certificate that is not trusted was "Operation not permitted".
        return _unreachable(origin, str(error))
    if isinstance(error, socket.gaierror):
        if error.errno in _OUR_OWN_LOOKUPS or _is_out_of_files():
            return ShortageError(f"cannot look up {origin}: {error.strerror}")
        return _unreachable(origin, error.strerror or str(error))
    number = error.errno or 0
    reason = os.strerror(number) if number > 0 else str(error)
    if number in OUR_OWN:
        return ShortageError(f"cannot connect to {origin}: {reason}")
    return _unreachable(origin, reason, refused=number == errno.ECONNREFUSED)


def _unreachable(origin: str, reason: str, *, refused: bool = False) -> WorkerFailedError:
    # Errors of TLS and of resolvers may have several lines.
    text = f"cannot connect to {origin}: {' '.join(reason.split())}"
    return WorkerFailedError(text, unreachable=True, refused=refused)


def _is_out_of_files() -> bool:
    """Tell whether no socket can be opened: then a resolver says that its server does not answer."""
    try:
        socket.socket().close()
    except OSError:
        return True
    return False
