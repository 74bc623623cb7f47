"""A request's body: read whole where somebody must look into it, passed on as it comes where it is large.

JSON is read whole: the dialect needs the prompt, and a failed worker's request is sent again. Other uploads
(audio, files) are read up to a limit, and beyond it streamed behind what was read; such a request cannot be
sent twice.
"""

from __future__ import annotations

import asyncio

from aiohttp import web
from aiohttp.streams import StreamReader

from brproxy.proxy import errors
from brproxy.proxy.forwarding import Forwarding
from brproxy.proxy.service import ServiceLimits
from brproxy.relay.client import body_so_far, continue_upload, forget_body
from brproxy.relay.connection import WorkerConnection
from brproxy.relay.framing import chunk, last_chunk
from brproxy.relay.request import CHUNKED, body_length

READ_BYTES_MAX = 1 << 20
"""What is read of an upload that is passed on before the worker is chosen; the model's name is in it."""


class Upload:
    """The body of one request. ``beginning`` is what was read, the whole if ``is_whole``; None: no body.

    ``length`` is the Content-Length, None without one. ``is_spent``: more than the beginning has been passed
    on to a worker, so that the request cannot be repeated.
    """

    __slots__ = ("_bytes_max", "_content", "_length", "_request", "beginning", "is_spent", "is_whole")

    def __init__(
        self,
        request: web.BaseRequest,
        beginning: bytes | None,
        *,
        is_whole: bool = True,
        content: StreamReader | None = None,
        length: int | None = None,
        bytes_max: int = 0,
    ) -> None:
        self._request = request
        self.beginning = beginning
        self.is_whole = is_whole
        self.is_spent = False
        self._content = content
        self._length = length
        self._bytes_max = bytes_max

    def framing(self, method: str) -> bytes:
        """Return the line of the request's head that frames the body."""
        if self.is_whole:
            return body_length(method, self.beginning)
        return CHUNKED if self._length is None else b"Content-Length: %d\r\n" % self._length

    def framed_beginning(self) -> bytes:
        """Return what was read, as it goes out."""
        beginning = self.beginning or b""
        return beginning if self.is_whole else self._framed(beginning)

    def forget(self) -> None:
        """Let go of a body that is not sent again: a prompt may be large, and its stream take minutes."""
        if self.is_whole:
            self.is_spent = True
            self.beginning = None
            forget_body(self._request)

    async def pass_on(self, connection: WorkerConnection, exchange: Forwarding) -> None:
        """Send the rest as the client sends it, no faster than the worker reads; stops at an outcome.

        Raises ProxyError when it is too large.
        """
        content = self._content
        if content is None:
            return
        self.is_spent = True
        # A client may wait for the answer before it sends more: one that has it need not send the rest.
        passing = asyncio.create_task(self._pass_rest(content, connection, exchange))
        try:
            await asyncio.wait((passing, exchange.outcome), return_when=asyncio.FIRST_COMPLETED)
            if passing.done():
                passing.result()
        finally:
            if not passing.cancel() and not passing.cancelled():
                # Seen, whoever asks.
                passing.exception()

    async def _pass_rest(
        self, content: StreamReader, connection: WorkerConnection, exchange: Forwarding
    ) -> None:
        outcome = exchange.outcome
        passed_bytes = len(self.beginning or b"")
        async for piece in content.iter_any():
            passed_bytes += len(piece)
            if passed_bytes > self._bytes_max:
                raise errors.upload_too_large(self._bytes_max)
            if outcome.done():
                return
            exchange.progressed = True
            connection.write(self._framed(piece))
            await connection.writable()
        if outcome.done():
            return
        if self._length is None:
            connection.write(last_chunk(b""))
        connection.request_is_whole = True

    def _framed(self, piece: bytes) -> bytes:
        return chunk(piece) if self._length is None and piece else piece


def whole_upload(request: web.BaseRequest, limits: ServiceLimits) -> Upload | None:
    """Return the body if it has come as a whole already, as that of the usual request has; else None."""
    if not request.body_exists:
        return Upload(request, None)
    body = body_so_far(request)
    return None if body is None or len(body) > limits.body_bytes_max else Upload(request, body)


async def read_upload(request: web.BaseRequest, media_type: str, limits: ServiceLimits) -> Upload:
    """Read what must be read of the body; raises ProxyError when it is too large."""
    await continue_upload(request)
    length = request.content_length
    may_be_json = not media_type or "json" in media_type
    if may_be_json or (length is not None and length <= READ_BYTES_MAX):
        try:
            return Upload(request, await request.read())
        except web.HTTPRequestEntityTooLarge as error:
            raise errors.body_too_large(limits.body_bytes_max) from error
    if length is not None and length > limits.upload_bytes_max:
        raise errors.upload_too_large(limits.upload_bytes_max)
    content = request.content
    beginning = bytearray()
    while len(beginning) < READ_BYTES_MAX and not content.at_eof():
        beginning += await content.readany()
    return Upload(
        request,
        bytes(beginning),
        is_whole=content.at_eof(),
        content=content,
        length=length,
        bytes_max=limits.upload_bytes_max,
    )
