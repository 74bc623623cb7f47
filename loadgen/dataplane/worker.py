"""A mock worker, a process of its own: ``python -m loadgen.dataplane.worker --port 9101``.

It answers like a vLLM server, at once, and spends as little as it can on it: what is measured is the proxy in
front of it. All streams advance together, a token each, on one timer, as in an engine that decodes a batch.

``POST /control`` with ``{"interval_ms": …}`` sets the time between two tokens, 0: as fast as the receiver
takes them. ``GET /stats`` says whether the worker kept up since then.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import time
import uuid
from collections.abc import Callable
from typing import cast

import orjson
import uvloop

from loadgen.dataplane.message import Message, MessageError
from loadgen.dataplane.tokens import TokenStream, number, stamp
from loadgen.emulator.handover_wire import PARAMS, params_of, reply_params
from loadgen.emulator.settings import Transfer
from loadgen.emulator.wire import Answer, GenerationRequest, RequestError, error_body, read_request

READY = "mock worker {pid} listens on port {port}"
MODEL = "mock-model"
BACKLOG = 4096
BATCH_STREAMS = 32
"""Tokens that are sent in one go. The time they carry is taken once for them: it is exact to about 0.2 ms."""

_NOWHERE = ("127.0.0.1", 9)
"""Where a decode worker would fetch KV, if one did."""

_MODELS = orjson.dumps(
    {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1760000000, "owned_by": "vllm"}]}
)
_HEAD = b"HTTP/1.1 %d -\r\nserver: uvicorn\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Mon, 06 Oct 2025 00:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


def _handles(request: GenerationRequest, request_id: str) -> dict[str, object]:
    """Return what the answer to a prefill leg (nixl) says besides; nothing is kept."""
    if not params_of(request.handles).get("do_remote_decode"):
        return {}
    params = reply_params(Transfer.NIXL, _NOWHERE, "mock", request_id, request.prompt_tokens)
    return {PARAMS: params}


class Stream:
    """One streamed answer on its way out. Its receiver may be slow: then it holds while others go on."""

    __slots__ = ("_body", "_head", "_on_end", "_sent", "_tokens", "_write", "held")

    def __init__(
        self,
        request: GenerationRequest,
        write: Callable[[bytes], None],
        on_end: Callable[[], None],
    ) -> None:
        self._body = TokenStream(request, uuid.uuid4().hex, int(time.time()))
        self._head = self._body.head
        self._tokens = request.output_tokens
        self._write = write
        self._on_end = on_end
        self._sent = 0
        self.held = False

    def open(self) -> None:
        """Send the head and the role, and the first token as an engine does after a prefill."""
        self._write(_STREAM_HEAD + self._body.opening())
        now = stamp(time.monotonic())
        self.advance(now, now + TokenStream.TAIL)

    def advance(self, now: bytes, now_and_tail: bytes) -> None:
        """Send the next token."""
        if self.held:
            return
        index = self._sent
        self._sent = index + 1
        if self._sent < self._tokens:
            self._write(self._head + number(index) + now_and_tail)
        else:
            self._write(self._body.last(now))
            self._on_end()


class Engine:
    """The streams of a worker and the timer that advances them.

    Ticks are on a grid of the machine's monotonic clock; ``offset`` (share of an interval) shifts it, so that
    several workers on one core take turns. A tick that cannot be kept is skipped and counted.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, offset: float) -> None:
        self._loop = loop
        self._offset = offset
        self._streams: dict[Stream, None] = {}
        self._interval_s = 0.0
        self._running = False
        self._due_s = 0.0
        self.ticks = 0
        self.skipped = 0

    def set_interval(self, interval_s: float) -> None:
        """Set the time between two tokens of a stream (0: none) and forget the statistics."""
        self._interval_s = interval_s
        self._align()
        self.ticks = self.skipped = 0

    def add(self, stream: Stream) -> None:
        """Let a stream advance from the next tick on."""
        self._streams[stream] = None
        if not self._running:
            self._running = True
            self._align()
            self._wait()

    def _align(self) -> None:
        """Make the next tick the next point of the grid."""
        now_s = self._loop.time()
        if self._interval_s:
            shift_s = self._offset * self._interval_s
            self._due_s = now_s + self._interval_s - (now_s - shift_s) % self._interval_s

    def remove(self, stream: Stream) -> None:
        """Forget a stream that has ended or whose receiver has left."""
        self._streams.pop(stream, None)

    def _wait(self) -> None:
        if self._interval_s:
            self._loop.call_at(self._due_s, self._tick)
        else:
            self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        self.ticks += 1
        self._advance(list(self._streams), 0)

    def _advance(self, streams: list[Stream], begin: int) -> None:
        now = stamp(time.monotonic())
        now_and_tail = now + TokenStream.TAIL
        end = begin + BATCH_STREAMS
        for stream in streams[begin:end]:
            stream.advance(now, now_and_tail)
        if end < len(streams):
            # Writes leave when control returns to the loop: the next batch gets its own time.
            self._loop.call_soon(self._advance, streams, end)
        else:
            self._next_tick()

    def _next_tick(self) -> None:
        if not self._streams:
            self._running = False
            return
        if self._interval_s:
            self._due_s += self._interval_s
            late = int((self._loop.time() - self._due_s) // self._interval_s) + 1
            if late > 0:
                self.skipped += late
                self._due_s += late * self._interval_s
        self._wait()


class Connection(asyncio.Protocol):
    """A connection to the worker: one request after the other."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._message = Message(until_close=False)
        self._content = b""
        self._stream: Stream | None = None
        self._waiting = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a connection."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, _error: Exception | None) -> None:
        """Forget what was being answered."""
        if self._stream is not None:
            # The tick that is going on may still have it in its list.
            self._stream.held = True
            self._engine.remove(self._stream)

    def pause_writing(self) -> None:
        """Hold the stream: its receiver does not keep up."""
        if self._stream is not None:
            self._stream.held = True

    def resume_writing(self) -> None:
        """Go on with the stream."""
        if self._stream is not None:
            self._stream.held = False

    def data_received(self, data: bytes) -> None:
        """Take a part of a request; a request that comes while another is answered waits."""
        self._waiting += data
        try:
            while self._waiting and self._stream is None:
                self._content += self._message.feed(self._waiting)
                self._waiting = self._message.rest
                if self._message.complete:
                    self._answer()
        except MessageError:
            self._transport.close()

    def _answer(self) -> None:
        head, content = self._message.head, self._content
        self._message, self._content = Message(until_close=False), b""
        method, _, rest = (head.start_line if head else b"").partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method == b"POST" and path.startswith(b"/v1/"):
            self._generate(content, chat=b"/chat/" in path)
        elif method == b"POST" and path == b"/control":
            self._engine.set_interval(orjson.loads(content)["interval_ms"] / 1000)
            self._send(200, b"{}")
        elif path == b"/stats":
            self._send(200, orjson.dumps({"ticks": self._engine.ticks, "skipped": self._engine.skipped}))
        elif path == b"/health":
            self._send(200, b"")
        elif path == b"/v1/models":
            self._send(200, _MODELS)
        else:
            self._send(404, error_body(404, "NotFoundError", "Not Found"))

    def _generate(self, content: bytes, *, chat: bool) -> None:
        try:
            request = read_request(content, chat=chat, length_header=None)
        except RequestError as error:
            self._send(400, error_body(400, "BadRequestError", str(error), error.param))
            return
        if not request.stream:
            request_id = uuid.uuid4().hex
            answer = Answer(request, request_id, int(time.time()))
            self._send(200, answer.complete(_handles(request, request_id)))
            return
        self._stream = stream = Stream(request, self._transport.write, self._ended)
        self._engine.add(stream)
        stream.open()

    def _ended(self) -> None:
        if self._stream is not None:
            self._engine.remove(self._stream)
        self._stream = None
        if self._waiting:
            self.data_received(b"")

    def _send(self, status: int, content: bytes) -> None:
        self._transport.write(_HEAD % (status, len(content)) + content)


async def serve(port: int, offset: float) -> None:
    """Serve on 127.0.0.1 until SIGTERM or SIGINT; says on standard output when it listens."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stop.set)
    engine = Engine(loop, offset)
    server = await loop.create_server(lambda: Connection(engine), "127.0.0.1", port, backlog=BACKLOG)
    print(READY.format(pid=os.getpid(), port=port), flush=True)
    # Nothing here makes cycles: a collection would only be a pause in the load.
    gc.freeze()
    gc.disable()
    await stop.wait()
    server.close()


def main() -> None:
    """Run a worker."""
    parser = argparse.ArgumentParser(description="A mock worker of loadgen bench-proxy.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--offset", type=float, default=0.0, help="Share of an interval that ticks shift by.")
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.offset))


if __name__ == "__main__":
    main()
