"""HTTP responses read without any of the code under test: slow, strict, and all at once."""

import asyncio
import re
import socket
from typing import NamedTuple

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] [1-9]\d\d(?: [^\r\n]*)?")
_FIELD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\x00-\x08\x0a-\x1f\x7f]*")
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")


class WireError(Exception):
    """The bytes are no response that a client could understand; ``answer`` is what could be read of it."""

    def __init__(self, message, answer=None):
        super().__init__(message)
        self.answer = answer


class Answer(NamedTuple):
    """One response; ``framing`` is "none", "length", "chunked" or "close"; ``chunks`` are their sizes."""

    version: bytes
    status: int
    reason: bytes
    fields: list[tuple[bytes, bytes]]
    body: bytes
    framing: str
    chunks: list[int]
    trailers: list[tuple[bytes, bytes]]

    def all(self, name):
        return [value for key, value in self.fields if key.lower() == name.lower()]

    def one(self, name):
        """Return the only value of a field, None without one."""
        found = self.all(name)
        if len(found) > 1:
            raise WireError(f"{name!r} came {len(found)} times")
        return found[0] if found else None


def read_answer(raw, method="GET", *, closed=False):
    """Return the first response in ``raw`` and what follows it; None while it is not complete.

    ``closed``: the connection has ended behind ``raw``.
    """
    head, found, rest = raw.partition(b"\r\n\r\n")
    if not found:
        if closed and raw:
            raise WireError(f"the connection ended in a head: {raw[:80]!r}")
        return None, raw
    start, *lines = head.split(b"\r\n")
    if not _STATUS_LINE.fullmatch(start):
        raise WireError(f"no status line: {start!r}")
    version, status, reason = [*start.split(b" ", 2), b""][:3]
    answer = Answer(version, int(status), reason, [_field(line) for line in lines], b"", "none", [], [])
    length, coding = answer.one(b"content-length"), answer.one(b"transfer-encoding")
    if method == "HEAD" or answer.status in {204, 304} or answer.status < 200:
        return answer, rest
    if coding is not None:
        if coding != b"chunked" or length is not None:
            raise WireError(f"unclear framing: {coding!r} and {length!r}")
        return _read_chunks(answer, rest, raw, closed)
    if length is not None:
        return _read_length(answer, rest, raw, length, closed)
    return (answer._replace(body=rest, framing="close"), b"") if closed else (None, raw)


def _field(line):
    if not _FIELD.fullmatch(line):
        raise WireError(f"no field: {line!r}")
    name, _, value = line.partition(b":")
    return name, value.strip(b" \t")


def _read_length(answer, rest, raw, length, closed):
    if not length.isdigit():
        raise WireError(f"no length: {length!r}")
    if len(rest) >= int(length):
        return answer._replace(body=rest[: int(length)], framing="length"), rest[int(length) :]
    if closed:
        raise WireError("the connection ended before the body's length", answer._replace(body=rest))
    return None, raw


def _read_chunks(answer, rest, raw, closed):
    body = b""
    while True:
        line, found, rest = rest.partition(b"\r\n")
        digits = line.partition(b";")[0]
        if found and not _CHUNK_SIZE.fullmatch(digits):
            raise WireError(f"no chunk size: {line!r}", answer._replace(body=body))
        size = int(digits, 16) if found else 0
        if not found or (size and len(rest) < size + 2):
            body += rest[:size]
            break
        if not size:
            section, end, after = (b"\r\n" + rest).partition(b"\r\n\r\n")
            if not end:
                break
            trailers = [_field(line) for line in section.split(b"\r\n")[1:]]
            return answer._replace(body=body, framing="chunked", trailers=trailers), after
        body += rest[:size]
        if rest[size : size + 2] != b"\r\n":
            raise WireError("a chunk does not end where its size says", answer._replace(body=body))
        answer.chunks.append(size)
        rest = rest[size + 2 :]
    if closed:
        raise WireError("the connection ended in a chunked body", answer._replace(body=body))
    return None, raw


class RawClient:
    """A client that says exactly what it is told to, and reads with ``read_answer``."""

    def __init__(self, reader, writer):
        self.reader = reader
        self.writer = writer
        self.received = b""

    @classmethod
    async def connect(cls, port, receive_bytes=None):
        """Connect; ``receive_bytes`` is what the kernel holds of what is not read."""
        sock = socket.socket()
        sock.setblocking(False)
        if receive_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        return cls(*await asyncio.open_connection(sock=sock))

    def send(self, *parts):
        self.writer.write(b"".join(parts))

    async def fill(self, bytes_max, piece=bytes(1 << 20), wait_s=0.2):
        """Send until nobody reads any more, or ``bytes_max`` bytes; return how many were sent."""
        sent = 0
        while sent < bytes_max:
            self.writer.write(piece)
            sent += len(piece)
            try:
                await asyncio.wait_for(self.writer.drain(), wait_s)
            except TimeoutError:
                break
        return sent

    async def answer(self, method="GET"):
        """Return the next response; raises WireError when the connection ends before it does."""
        while True:
            answer, rest = read_answer(self.received, method)
            if answer is not None:
                self.received = rest
                return answer
            data = await self.reader.read(1 << 16)
            if not data:
                answer, self.received = read_answer(self.received, method, closed=True)
                if answer is None:
                    raise WireError("the connection ended without a response")
                return answer
            self.received += data

    async def ended(self):
        """Return whether the connection has ended, with nothing more on it; waits for that."""
        return not self.received and not await self.reader.read(1)


def post(path, body, *fields, version="1.1", media_type="application/json"):
    """Return a request as bytes, with a Content-Length."""
    lines = [f"POST {path} HTTP/{version}", "Host: h", f"Content-Length: {len(body)}"]
    lines += [f"Content-Type: {media_type}", *fields]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def get(path, *fields, version="1.1", method="GET"):
    """Return a request without a body as bytes."""
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: h", *fields]).encode() + b"\r\n\r\n"


def as_chunk(payload):
    """Return a payload as one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)
