"""From the worker's response to the client's: bytes pass unchanged, counting tokens only looks.

Two ways through. A *stream* of server-sent events is split at event boundaries: its first event is held until
it shows whether the worker took the request (an engine may refuse with status 200), an incomplete event is
held until it is whole, and a stream that breaks off ends with an error event and no clean end. Everything
else is a *reply*: its bytes pass as they come, and a copy of a JSON reply is read for usage at the end.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

import aiohttp
from aiohttp import web

from brproxy.proxy.accounting import Account
from brproxy.proxy.errors import ClientGoneError, ProxyError, stream_broke_off, worker_silent
from brproxy.proxy.headers import Headers, response_headers
from brproxy.proxy.sse import SseEvent, SseSplitter, event_data
from brproxy.proxy.upstream import Upstream, WorkerFailedError, WorkerRequest
from brproxy.types import BrproxyError

_REFUSAL_BYTES_MAX = 1 << 20
_LAST_WORDS_S = 1.0


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """Limits of one response: seconds of silence, bytes of an event looked into and of a reply kept."""

    first_byte_s: float
    stall_s: float
    event_bytes_max: int
    response_parse_bytes_max: int


class WorkerResponse(web.Response):
    """A complete response in a worker's own words; ``worker_headers`` are all it is to have."""

    def __init__(self, status: int, reason: str | None, worker_headers: Headers, body: bytes) -> None:
        super().__init__(status=status, reason=reason, headers=worker_headers, body=body)
        self.worker_headers = worker_headers


class WorkerStream(web.StreamResponse):
    """A response in a worker's own words, sent as it comes."""

    def __init__(self, status: int, reason: str | None, worker_headers: Headers) -> None:
        super().__init__(status=status, reason=reason, headers=worker_headers)
        self.worker_headers = worker_headers


class WorkerRefusedError(BrproxyError):
    """The worker's queue is full: it said so instead of taking the request.

    Keeps what the worker answered, which the client gets unchanged if no other worker takes the request.
    """

    def __init__(self, head: aiohttp.ClientResponse, headers: Headers, body: bytes) -> None:
        super().__init__(f"the worker refused the request with status {head.status}")
        self._status = head.status
        self._reason = head.reason
        self._headers = headers
        self._body = body

    def response(self) -> web.Response:
        """Return the worker's answer."""
        headers = self._headers.copy()
        headers.pop("Content-Length", None)
        return WorkerResponse(self._status, self._reason, headers, self._body)


async def keep_worker_headers(_request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Take back the headers that aiohttp adds to a worker's response; an ``on_response_prepare`` signal."""
    if isinstance(response, WorkerResponse | WorkerStream):
        for name in ("Content-Type", "Date", "Server"):
            if name not in response.worker_headers:
                response.headers.pop(name, None)


class Deadline:
    """A timeout that moves on with every byte, rescheduled at most once a second.

    Rescheduling for each chunk would cost as much as relaying it; a second of slack on a stall timeout of
    minutes costs nothing.
    """

    SLACK_S = 1.0

    def __init__(self, timeout: asyncio.Timeout, stall_s: float) -> None:
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._stall_s = stall_s
        self._scheduled_s = 0.0

    def progress(self) -> None:
        """Note that the worker sent something."""
        now_s = self._loop.time()
        if now_s - self._scheduled_s >= self.SLACK_S:
            self._scheduled_s = now_s
            self._timeout.reschedule(now_s + self._stall_s + self.SLACK_S)


class Relay:
    """One request to one worker, and that worker's response to the client."""

    def __init__(self, request: web.Request, account: Account, limits: RelayLimits, request_id: str) -> None:
        self._request = request
        self._account = account
        self._limits = limits
        self._request_id = request_id
        self._client: WorkerStream | None = None
        self._writing = False
        self._is_stream = False

    async def run(self, upstream: Upstream, outgoing: WorkerRequest) -> web.StreamResponse:
        """Forward the request and its response.

        Raises WorkerFailedError or WorkerRefusedError while the client has seen nothing, ProxyError when the
        worker stayed silent or broke off (an error event has then been sent to a client that has seen
        something), ClientGoneError when the client left.
        """
        try:
            async with asyncio.timeout(self._limits.first_byte_s) as timeout:
                response = await upstream.open(outgoing)
                try:
                    return await self._relay(response, Deadline(timeout, self._limits.stall_s))
                finally:
                    # After a complete body this does nothing; else the connection must not be used again.
                    response.close()
        except TimeoutError as error:
            if self._writing:
                self._abort_client()
                msg = f"the client has not read anything for {self._limits.stall_s:g} s"
                raise ClientGoneError(msg) from error
            silence_s = self._limits.stall_s if self._client else self._limits.first_byte_s
            raise await self._break_off(worker_silent(silence_s)) from error
        except aiohttp.ClientError as error:
            if self._client is None:
                msg = f"{outgoing.origin} broke off before the first byte of its response"
                raise WorkerFailedError(msg, unreachable=False) from error
            raise await self._break_off(stream_broke_off()) from error

    async def _relay(self, response: aiohttp.ClientResponse, deadline: Deadline) -> web.StreamResponse:
        readable = response.headers.get("Content-Encoding", "identity") == "identity"
        self._is_stream = response.content_type == "text/event-stream" and readable
        if self._account.dialect.is_refusal(response.status):
            raise WorkerRefusedError(
                response, self._headers(response), await response.content.read(_REFUSAL_BYTES_MAX)
            )
        if self._is_stream:
            client = await self._stream(response, deadline)
        else:
            client = await self._reply(response, deadline, readable=readable)
        self._account.learn()
        return client

    async def _stream(self, response: aiohttp.ClientResponse, deadline: Deadline) -> WorkerStream:
        splitter = SseSplitter(self._limits.event_bytes_max)
        held = b""
        async for chunk in response.content.iter_any():
            deadline.progress()
            for event in splitter.feed(chunk):
                facts = self._account.look(event)
                if self._client is None and facts.refused:
                    rest = splitter.tail + await response.content.read(_REFUSAL_BYTES_MAX)
                    raise WorkerRefusedError(response, self._headers(response), held + event.raw + rest)
                if not self._account.hides(facts):
                    held += event.raw
                # Comments may come before the first data, which alone tells if it was taken.
                if self._client is None and (event.data is not None or len(held) > _REFUSAL_BYTES_MAX):
                    self._client = await self._commit(response)
            if held and self._client is not None:
                await self._write(self._client, held)
                held = b""
        self._account.look(SseEvent(splitter.tail, event_data(splitter.tail)))
        if self._must_end_with_done(response) and not self._account.done:
            msg = "the stream ended without [DONE]"
            raise aiohttp.ClientPayloadError(msg)
        client = self._client or await self._commit(response)
        await self._write(client, held + splitter.tail)
        return client

    def _must_end_with_done(self, response: aiohttp.ClientResponse) -> bool:
        """Tell whether only [DONE] shows that the stream is whole: the connection's end frames it."""
        framed = response.headers.get("Content-Length") or "Transfer-Encoding" in response.headers
        return not framed and self._account.dialect.ends_with_done(self._request.path)

    async def _reply(
        self, response: aiohttp.ClientResponse, deadline: Deadline, *, readable: bool
    ) -> WorkerStream:
        copy: bytearray | None = bytearray()
        if not readable or response.content_type != "application/json" or response.status >= 300:
            copy = None
        async for chunk in response.content.iter_any():
            deadline.progress()
            if self._client is None:
                self._client = await self._commit(response)
            if copy is not None:
                copy += chunk
                copy = copy if len(copy) <= self._limits.response_parse_bytes_max else None
            await self._write(self._client, chunk)
        if copy:
            self._account.reply(bytes(copy))
        return self._client or await self._commit(response)

    def _headers(self, response: aiohttp.ClientResponse) -> Headers:
        return response_headers(response.headers, self._request_id)

    async def _commit(self, response: aiohttp.ClientResponse) -> WorkerStream:
        """Send the worker's response head to the client: from here on nothing can be retried."""
        headers = self._headers(response)
        if self._is_stream and self._account.usage_was_added:
            # An event will be taken out: the length that the worker gave no longer holds.
            headers.pop("Content-Length", None)
        client = WorkerStream(response.status, response.reason, headers)
        try:
            await client.prepare(self._request)
        except ConnectionError as error:
            raise ClientGoneError("the client left before the response began") from error
        return client

    async def _write(self, client: WorkerStream, data: bytes) -> None:
        self._writing = True
        try:
            await client.write(data)
        except ConnectionError as error:
            raise ClientGoneError("the client left while it was being written to") from error
        self._writing = False

    async def _break_off(self, error: ProxyError) -> ProxyError:
        """Tell a client that has seen part of a response that there is no more, and return ``error``."""
        if self._client is None:
            return error
        if self._is_stream:
            # A client that does not read either must not hold this up.
            with suppress(TimeoutError, ClientGoneError):
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self._write(self._client, error.event())
        # Closing without the framing's end: a client that ignores the event still sees a broken response.
        self._abort_client()
        return error

    def _abort_client(self) -> None:
        if self._request.transport is None:
            return
        if self._writing:
            self._request.transport.abort()
        else:
            self._request.transport.close()
