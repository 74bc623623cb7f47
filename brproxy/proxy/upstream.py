"""Connections to the workers: one request out, one response head back, failures named.

A failure here is always *before the first byte* of a response: the caller may try another worker.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from types import SimpleNamespace

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from brproxy.proxy.headers import Headers
from brproxy.types import BrproxyError

_STALE_MAX = 4
"""Kept connections to one worker that may turn out to be closed before the worker counts as failed."""

# What aiohttp would add by itself: the client's headers are the whole truth.
_NOT_OURS_TO_ADD = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")


class WorkerFailedError(BrproxyError):
    """A worker gave no response; ``unreachable`` when it could not even be connected to."""

    def __init__(self, reason: str, *, unreachable: bool) -> None:
        super().__init__(reason)
        self.unreachable = unreachable


@dataclass(frozen=True, slots=True)
class UpstreamTimeouts:
    """Seconds: to connect, and that an idle connection is kept (engines close theirs after 5 s)."""

    connect_s: float
    keepalive_s: float


@dataclass(frozen=True, slots=True)
class WorkerRequest:
    """What goes to a worker. ``target`` is the raw path and query."""

    origin: str
    method: str
    target: str
    headers: Headers
    body: bytes | None


class _Reuse:
    """Whether a request went out on a connection that was kept from an earlier one."""

    __slots__ = ("reused",)

    def __init__(self) -> None:
        self.reused = False


async def _note_reuse(
    _session: aiohttp.ClientSession, context: SimpleNamespace, _params: aiohttp.TraceConnectionReuseconnParams
) -> None:
    context.trace_request_ctx.reused = True


class Upstream:
    """The proxy's HTTP client: raw paths, no redirects, no cookies, no decompression."""

    def __init__(self, timeouts: UpstreamTimeouts, header_bytes_max: int) -> None:
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_reuseconn.append(_note_reuse)
        self._session = aiohttp.ClientSession(
            trace_configs=[tracing],
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=timeouts.keepalive_s),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeouts.connect_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=_NOT_OURS_TO_ADD,
            max_line_size=header_bytes_max,
            max_field_size=header_bytes_max,
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    async def open(self, outgoing: WorkerRequest) -> aiohttp.ClientResponse:
        """Send a request and return the response once its head is there.

        Raises WorkerFailedError, and TimeoutError when a timeout that the caller set runs out.
        """
        for _ in range(_STALE_MAX):
            reuse = _Reuse()
            try:
                return await self._send(outgoing, reuse)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                # Engines close idle connections when they like: that says nothing of the worker.
                if isinstance(error, aiohttp.ClientConnectorError) or not reuse.reused:
                    raise _failed(outgoing.origin, error) from error
            except aiohttp.ClientError as error:
                raise _failed(outgoing.origin, error) from error
        reason = f"{outgoing.origin} closed {_STALE_MAX} kept connections one after another"
        raise WorkerFailedError(reason, unreachable=False)

    async def _send(self, outgoing: WorkerRequest, reuse: _Reuse) -> aiohttp.ClientResponse:
        return await self._session.request(
            outgoing.method,
            URL(outgoing.origin + outgoing.target, encoded=True),
            headers=outgoing.headers,
            data=outgoing.body,
            allow_redirects=False,
            trace_request_ctx=reuse,
        )

    async def get(
        self, origin: str, path: str, timeout_s: float, headers: Headers | None = None
    ) -> tuple[int, bytes]:
        """Fetch a control page (health, models): status and body; raises WorkerFailedError."""
        outgoing = WorkerRequest(origin, "GET", path, headers or CIMultiDict(), None)
        try:
            async with asyncio.timeout(timeout_s):
                response = await self.open(outgoing)
                async with response:
                    return response.status, await response.read()
        except TimeoutError as error:
            raise WorkerFailedError(
                f"{origin}{path} did not answer within {timeout_s:g} s", unreachable=True
            ) from error
        except aiohttp.ClientError as error:
            raise WorkerFailedError(
                f"{origin}{path} broke off: {_plain(error)}", unreachable=False
            ) from error


def _failed(origin: str, error: aiohttp.ClientError) -> WorkerFailedError:
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return WorkerFailedError(f"cannot connect to {origin} in time", unreachable=True)
    if isinstance(error, aiohttp.ClientConnectorError):
        return WorkerFailedError(f"cannot connect to {origin}: {_plain(error)}", unreachable=True)
    reason = f"{origin} closed the connection without an answer: {_plain(error)}"
    return WorkerFailedError(reason, unreachable=False)


def _plain(error: Exception) -> str:
    """Return what happened in a few words on one line."""
    cause: BaseException = error
    if isinstance(error, aiohttp.ClientConnectorError):
        # The event loop wraps the system's error in one that names the address once more.
        cause = error.os_error
        if error.os_error.errno:
            return os.strerror(error.os_error.errno)
    return " ".join(str(cause).split()) or type(cause).__name__
