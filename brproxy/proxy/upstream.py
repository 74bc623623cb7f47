"""Connections to the workers: one request out, one response head back, failures named.

A failure here is always *before the first byte* of a response: the caller may try another worker.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from brproxy.proxy.headers import Headers
from brproxy.types import BrproxyError

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


class Upstream:
    """The proxy's HTTP client: raw paths, no redirects, no cookies, no decompression."""

    def __init__(self, timeouts: UpstreamTimeouts, header_bytes_max: int) -> None:
        self._session = aiohttp.ClientSession(
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
        origin = outgoing.origin
        url = URL(origin + outgoing.target, encoded=True)
        try:
            return await self._session.request(
                outgoing.method, url, headers=outgoing.headers, data=outgoing.body, allow_redirects=False
            )
        except aiohttp.ClientConnectorError as error:
            raise WorkerFailedError(
                f"cannot connect to {origin}: {_plain(error)}", unreachable=True
            ) from error
        except aiohttp.ConnectionTimeoutError as error:
            raise WorkerFailedError(f"cannot connect to {origin} in time", unreachable=True) from error
        except aiohttp.ClientError as error:
            reason = f"{origin} closed the connection without an answer: {_plain(error)}"
            raise WorkerFailedError(reason, unreachable=False) from error

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


def _plain(error: Exception) -> str:
    """Return what happened in a few words on one line."""
    cause: BaseException = error
    if isinstance(error, aiohttp.ClientConnectorError):
        # The event loop wraps the system's error in one that names the address once more.
        cause = error.os_error
        if error.os_error.errno:
            return os.strerror(error.os_error.errno)
    return " ".join(str(cause).split()) or type(cause).__name__
