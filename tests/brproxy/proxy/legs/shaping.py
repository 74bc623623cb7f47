"""Stands before an emulated worker: that does what it is asked for, and a test says what is answered.

Between the two workers KV moves as ever. Only the answer's bytes, and the pieces in which they come, are the
test's own: so that they may be what no emulated engine says.
"""

import asyncio
import json
from contextlib import suppress

OK, ERROR = b"HTTP/1.1 200", b'"error"'
TURNS = 3
"""Turns of the loop within which what was written has been read: all that talk here live in it."""


class Shaper:
    """Passes requests on to ``origin``; ``pieces`` of a request's headers and document is what it answers.

    None of them: the worker's own answer. After the last the connection is closed, as it must say: KV of a
    request that goes to a worker by a stale connection is held until its lease ends.
    """

    def __init__(self, origin, pieces):
        self._origin = origin
        self._pieces = pieces

    async def handle(self, reader, writer):
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._serve(reader, writer)
        finally:
            writer.close()

    async def _serve(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        line, *fields = head.decode("latin-1").split("\r\n")[:-2]
        headers = {name.lower(): value.strip() for name, _, value in (f.partition(":") for f in fields)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        document = json.loads(body) if body else {}
        answering = asyncio.create_task(self._answer(writer, line, headers, document))
        leaving = asyncio.create_task(reader.read(1))
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _answer(self, writer, line, headers, document):
        raw = await self._passed_on(line, headers, document)
        is_own = not document or document.get("max_tokens") == 1 or not raw.startswith(OK) or ERROR in raw
        pieces = None if is_own else self._pieces(headers, document)
        for piece in [raw] if pieces is None else pieces:
            writer.write(piece)
            await writer.drain()
            for _ in range(TURNS):
                await asyncio.sleep(0)

    async def _passed_on(self, line, headers, document):
        """Return all that the worker answers; it is asked for one sequence, as it knows no more."""
        known = {name: value for name, value in document.items() if name != "n"}
        body = json.dumps(known).encode() if document else b""
        headers = headers | {"content-length": str(len(body)), "connection": "close"}
        fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        reader, writer = await asyncio.open_connection(*self._origin)
        try:
            writer.write(f"{line}\r\n{fields}\r\n".encode("latin-1") + body)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()


def chunk(*parts):
    data = b"".join(parts)
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(document):
    return b"data: " + json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
STREAM = HEAD + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def stream(events):
    """Return a stream as a worker sends it, a chunk for each event."""
    return STREAM + b"".join(map(chunk, events)) + b"0\r\n\r\n"


def reply(document):
    """Return an answer in one piece, and its body."""
    body = json.dumps(document).encode()
    fields = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    return HEAD + fields + body, body
