"""A request's body: read whole where somebody must look into it, passed on as it comes where it is large.

JSON is read whole: the dialect needs the prompt, and a failed worker's request is sent again. Other uploads
(audio, files) are read up to a limit, and beyond it streamed behind what was read; such a request cannot be
sent twice.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from brproxy.proxy import errors
from brproxy.proxy.service import ServiceLimits
from brproxy.relay.client import continue_upload
from brproxy.relay.connection import WorkerConnection
from brproxy.relay.framing import chunk, last_chunk
from brproxy.relay.request import CHUNKED, body_length

READ_BYTES_MAX = 1 << 20
"""What is read of an upload that is passed on before the worker is chosen; the model's name is in it."""

_JSON = "json"


class Upload:
    """The body of one request. ``beginning`` is what was read, the whole if ``is_whole``; None: no body.

    ``is_spent``: more than that has been passed on to a worker, so that the request cannot be repeated.
    """

    def __init__(
        self, request: web.BaseRequest, beginning: bytes | None, *, is_whole: bool, bytes_max: int
    ) -> None:
        self._request = request
        self._bytes_max = bytes_max
        self._length = request.content_length
        self.media_type = request.content_type
        self.beginning = beginning
        self.is_whole = is_whole
        self.is_spent = False

    @property
    def framing(self) -> bytes:
        """The line of the request's head that frames the body."""
        if self.is_whole:
            return body_length(self._request.method, self.beginning)
        return CHUNKED if self._length is None else b"Content-Length: %d\r\n" % self._length

    @property
    def beginning_framed(self) -> bytes:
        """What was read, as it goes out."""
        beginning = self.beginning or b""
        return beginning if self.is_whole else self._framed(beginning)

    def whole(self) -> bytes:
        """Return the whole body; raises ValueError for one that is passed on."""
        if not self.is_whole:
            msg = "the body has not been read as a whole"
            raise ValueError(msg)
        return self.beginning or b""

    def replace(self, body: bytes) -> None:
        """Have ``body`` sent in place of a whole body."""
        self.beginning = body

    async def pass_on(self, connection: WorkerConnection, outcome: asyncio.Future[None]) -> None:
        """Send the rest as the client sends it, no faster than the worker reads; stops at an ``outcome``.

        Raises ProxyError when it is too large.
        """
        self.is_spent = True
        passed_bytes = len(self.beginning or b"")
        async for piece in self._request.content.iter_any():
            passed_bytes += len(piece)
            if passed_bytes > self._bytes_max:
                raise errors.upload_too_large(self._bytes_max)
            if outcome.done():
                return
            connection.write(self._framed(piece))
            await connection.writable()
        if self._length is None:
            connection.write(last_chunk(b""))
        connection.request_is_whole = True

    def _framed(self, piece: bytes) -> bytes:
        return chunk(piece) if self._length is None and piece else piece


async def read_upload(request: web.BaseRequest, limits: ServiceLimits) -> Upload:
    """Read what must be read of the body; raises ProxyError when it is too large."""
    if not request.body_exists:
        return Upload(request, None, is_whole=True, bytes_max=0)
    await continue_upload(request)
    length = request.content_length
    is_json = _JSON in request.content_type or request.content_type == "application/octet-stream"
    if is_json or (length is not None and length <= READ_BYTES_MAX):
        try:
            return Upload(request, await _read(request, limits), is_whole=True, bytes_max=0)
        except web.HTTPRequestEntityTooLarge as error:
            raise errors.body_too_large(limits.body_bytes_max) from error
    if length is not None and length > limits.upload_bytes_max:
        raise errors.upload_too_large(limits.upload_bytes_max)
    beginning = bytearray()
    while len(beginning) < READ_BYTES_MAX and not request.content.at_eof():
        beginning += await request.content.readany()
    is_whole = request.content.at_eof()
    return Upload(request, bytes(beginning), is_whole=is_whole, bytes_max=limits.upload_bytes_max)


async def _read(request: web.BaseRequest, limits: ServiceLimits) -> bytes:
    content = request.content
    # The usual request has come as a whole before its handler runs: there is nothing to wait for.
    if content.is_eof() and content.total_bytes <= limits.body_bytes_max:
        return content.read_nowait()
    return await request.read()
