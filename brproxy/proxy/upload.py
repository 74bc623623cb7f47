"""A request's body: read whole where somebody must look into it, passed on as it comes where it is large.

JSON is read whole: the dialect needs the prompt, and a failed worker's request is sent again. Other uploads
(audio, files) are read up to a limit, and beyond it streamed behind what was read; such a request cannot be
sent twice. Clients have limited time for every piece and for the whole, and all bodies together limited room.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from aiohttp import web
from aiohttp.streams import StreamReader

from brproxy.engines.edits import JsonObject
from brproxy.engines.multipart import FormScanner
from brproxy.proxy import errors
from brproxy.proxy.body_room import BodyRoom
from brproxy.proxy.service import BodyLimits
from brproxy.relay.client import body_so_far, continue_upload, forget_body
from brproxy.relay.connection import WorkerConnection
from brproxy.relay.framing import chunk, last_chunk
from brproxy.relay.request import CHUNKED, body_length

READ_BYTES_MAX = 1 << 20
"""What is read of an upload that is passed on before the worker is chosen; the model's name is in it."""


class Progressing(Protocol):
    """What times out unless something happens."""

    progressed: bool


class Upload:
    """The body of one request. ``beginning`` is what was read, the whole if ``is_whole``; None: no body.

    ``is_spent``: the request cannot be sent again, since more than the beginning has been passed on to a
    worker, or the body was let go of. ``document`` is what a transfer has read of it.
    """

    __slots__ = (
        "_content",
        "_length",
        "_limits",
        "_request",
        "_room",
        "_room_bytes",
        "beginning",
        "document",
        "is_spent",
        "is_whole",
    )

    def __init__(self, request: web.BaseRequest, limits: BodyLimits, room: BodyRoom) -> None:
        self._request = request
        self._limits = limits
        self._room = room
        self._room_bytes = 0
        self._content: StreamReader | None = None
        self._length: int | None = None
        self.beginning: bytes | None = None
        self.document: JsonObject | None = None
        self.is_whole = True
        self.is_spent = False

    def framed(self, method: str) -> tuple[bytes, bytes]:
        """Return the line of the request's head that frames the body, and what was read as it goes out."""
        beginning = self.beginning
        if beginning is None:
            beginning = b""
            if self.is_whole:
                return body_length(method, None), beginning
        elif self.is_whole:
            return b"Content-Length: %d\r\n" % len(beginning), beginning
        framing = CHUNKED if self._length is None else b"Content-Length: %d\r\n" % self._length
        return framing, self._framed(beginning)

    def forget(self) -> None:
        """Let go of a body that is not sent again: a prompt may be large, and its stream take minutes."""
        if self.is_whole:
            self.is_spent = True
            self.beginning = self.document = None
            forget_body(self._request)
            self.give_back()

    def give_back(self) -> None:
        """Return the room that the body has taken; more than once does nothing."""
        if self._room_bytes:
            self._room.give_back(self._room_bytes)
            self._room_bytes = 0

    # How it comes.

    def take_whole(self) -> bool:
        """Take the body if it has come as a whole already, as that of the usual request has; tell whether.

        Raises ProxyError when there is no room.
        """
        if not self._request.body_exists:
            return True
        body = body_so_far(self._request)
        if body is None or len(body) > self._limits.bytes_max:
            return False
        self._room.take(len(body))
        self._room_bytes = len(body)
        self.beginning = body
        return True

    async def read(self, media_type: str, *, names_group: bool) -> None:
        """Read what must be read; raises ProxyError when it is too large or too slow.

        ``names_group``: a form must be read as far as the model that it names.
        """
        limits, length = self._limits, self._request.content_length
        if not media_type or "json" in media_type or (length is not None and length <= READ_BYTES_MAX):
            if length is not None and length > limits.bytes_max:
                raise errors.body_too_large(limits.bytes_max)
            await continue_upload(self._request)
            self.beginning, _ = await self._read_up_to(limits.bytes_max)
            if len(self.beginning) > limits.bytes_max:
                raise errors.body_too_large(limits.bytes_max)
            return
        if length is not None and length > limits.upload_bytes_max:
            raise errors.upload_too_large(limits.upload_bytes_max)
        await continue_upload(self._request)
        self._content, self._length = self._request.content, length
        form = FormScanner() if names_group and media_type == "multipart/form-data" else None
        self.beginning, self.is_whole = await self._read_up_to(READ_BYTES_MAX, form)

    async def _read_up_to(self, bytes_max: int, form: FormScanner | None = None) -> tuple[bytes, bool]:
        """Return what has come once that is all or over ``bytes_max``, and whether it is all.

        Of a ``form`` more is read, up to the limit of a body that is read whole, until its model is known.
        """
        content, read = self._request.content, bytearray()
        try:
            async with asyncio.timeout(self._limits.whole_s):
                while not content.at_eof() and (
                    len(read) <= bytes_max
                    or (form is not None and not form.is_done and len(read) < self._limits.bytes_max)
                ):
                    piece = await self._next(content)
                    self._take_room(len(piece))
                    read += piece
                    if form is not None:
                        form.feed(piece)
        except TimeoutError as error:
            raise errors.body_too_slow(self._limits.whole_s) from error
        return bytes(read), content.at_eof()

    async def _next(self, content: StreamReader) -> bytes:
        try:
            async with asyncio.timeout(self._limits.stall_s):
                return await content.readany()
        except TimeoutError as error:
            raise errors.body_stalled(self._limits.stall_s) from error

    def _take_room(self, more_bytes: int) -> None:
        self._room.take(more_bytes)
        self._room_bytes += more_bytes

    # How the rest of it goes on.

    async def pass_on(
        self, connection: WorkerConnection, answer: Progressing, outcome: asyncio.Future[Any]
    ) -> None:
        """Send the rest as the client sends it, no faster than the worker reads; stops at an outcome.

        Raises ProxyError when it is too large or too slow.
        """
        content = self._content
        if content is None:
            return
        self.is_spent = True
        # A client may wait for the answer before it sends more: one that has it need not send the rest.
        passing = asyncio.create_task(self._pass_rest(content, connection, answer, outcome))
        try:
            await asyncio.wait(
                (passing, outcome), timeout=self._limits.whole_s, return_when=asyncio.FIRST_COMPLETED
            )
            if passing.done():
                passing.result()
            elif not outcome.done():
                raise errors.body_too_slow(self._limits.whole_s)
        finally:
            if not passing.cancel() and not passing.cancelled():
                # Seen, whoever asks.
                passing.exception()

    async def _pass_rest(
        self,
        content: StreamReader,
        connection: WorkerConnection,
        answer: Progressing,
        outcome: asyncio.Future[Any],
    ) -> None:
        passed_bytes = len(self.beginning or b"")
        while not content.at_eof():
            piece = await self._next(content)
            passed_bytes += len(piece)
            if passed_bytes > self._limits.upload_bytes_max:
                raise errors.upload_too_large(self._limits.upload_bytes_max)
            if outcome.done():
                return
            answer.progressed = True
            connection.write(self._framed(piece))
            await connection.writable()
        if outcome.done():
            return
        if self._length is None:
            connection.write(last_chunk(b""))
        connection.request_is_whole = True

    def _framed(self, piece: bytes) -> bytes:
        return chunk(piece) if self._length is None and piece else piece
