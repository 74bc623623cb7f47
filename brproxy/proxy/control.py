"""What the proxy itself asks workers: health and models. Plain aiohttp; clients' requests go another way."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping

import aiohttp
from yarl import URL

from brproxy.relay.errors import WorkerFailedError

# What aiohttp would add by itself: a client's fields are passed as they are.
_NOT_OURS_TO_ADD = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")


class ControlClient:
    """An HTTP client for control pages: no redirects, no cookies, no decompression."""

    def __init__(self, connect_s: float, keepalive_s: float, header_bytes_max: int) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=keepalive_s),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=_NOT_OURS_TO_ADD,
            max_line_size=header_bytes_max,
            max_field_size=header_bytes_max,
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    async def get(
        self, origin: str, path: str, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Fetch ``path`` of the worker at ``origin``: status and body; raises WorkerFailedError."""
        url = URL(origin + path, encoded=True)
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.get(url, headers=headers, allow_redirects=False) as response,
            ):
                return response.status, await response.read()
        except TimeoutError as error:
            msg = f"{origin}{path} did not answer within {timeout_s:g} s"
            raise WorkerFailedError(msg, unreachable=True) from error
        except aiohttp.ClientConnectorError as error:
            msg = f"cannot connect to {origin}: {_plain(error.os_error)}"
            raise WorkerFailedError(msg, unreachable=True) from error
        except aiohttp.ClientError as error:
            msg = f"{origin}{path} broke off: {_plain(error)}"
            raise WorkerFailedError(msg) from error


def _plain(error: Exception) -> str:
    """Return what happened in a few words on one line."""
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        # The event loop wraps the system's error in one that names the address once more.
        return os.strerror(error.errno)
    return " ".join(str(error).split()) or type(error).__name__
