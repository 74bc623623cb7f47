"""Small posts to the proxy's own pages, read as a whole."""

from __future__ import annotations

import asyncio

from aiohttp import web

from brproxy.proxy import errors


async def read_post(request: web.BaseRequest, bytes_max: int, timeout_s: float) -> bytes:
    """Return the body of ``request``; raises ProxyError.

    400 without a length or for one above ``bytes_max``, 408 for one that takes longer than ``timeout_s``.
    """
    length = request.content_length
    if length is None or length > bytes_max:
        raise errors.bad_request(f"The body must have a length, of {bytes_max} bytes at most.")
    try:
        async with asyncio.timeout(timeout_s):
            return await request.read()
    except TimeoutError:
        raise errors.body_too_slow(timeout_s) from None
