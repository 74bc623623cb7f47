"""HTTP responses read without any of the code under test, and strictly."""

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


class AnswerReader:
    """Reads the response to a request of ``method`` as it comes, and nothing of it twice."""

    def __init__(self, method="GET"):
        self._method = method
        self._answer = None
        # Of a chunked body: its chunks so far, and where behind the head the next one begins.
        self._body = bytearray()
        self._at = 0

    def read(self, raw, *, closed=False):
        """Return the response that ``raw`` begins with and what follows it; None while it is not complete.

        ``raw`` is all that has come, each time. ``closed``: the connection has ended behind it.
        """
        if self._answer is None:
            head, found, _ = raw.partition(b"\r\n\r\n")
            if not found:
                if closed and raw:
                    raise WireError(f"the connection ended in a head: {bytes(raw[:80])!r}")
                return None, raw
            self._answer = _read_head(bytes(head))
            self._at = len(head) + 4
        answer, rest_at = self._read_body(raw, closed)
        return answer, (raw if answer is None else raw[rest_at:])

    def _read_body(self, raw, closed):
        """Return the response with its body and where it ends; None and anything while it is not complete."""
        answer, begin = self._answer, self._at
        length, coding = answer.one(b"content-length"), answer.one(b"transfer-encoding")
        if self._method == "HEAD" or answer.status in {204, 304} or answer.status < 200:
            return answer, begin
        if coding is not None:
            if coding != b"chunked" or length is not None:
                raise WireError(f"unclear framing: {coding!r} and {length!r}")
            return self._read_chunks(raw, closed)
        if length is not None:
            return _read_length(answer, raw, begin, length, closed)
        return (answer._replace(body=bytes(raw[begin:]), framing="close") if closed else None), len(raw)

    def _read_chunks(self, raw, closed):
        answer, body = self._answer, self._body
        while (line_end := raw.find(b"\r\n", self._at)) >= 0:
            line, begin = raw[self._at : line_end], line_end + 2
            digits = line.partition(b";")[0]
            if not _CHUNK_SIZE.fullmatch(digits):
                raise WireError(f"no chunk size: {bytes(line)!r}", answer._replace(body=bytes(body)))
            size = int(digits, 16)
            end = begin + size
            if not size:
                section_end = raw.find(b"\r\n\r\n", line_end)
                if section_end < 0:
                    break
                lines = bytes(raw[begin:section_end]).split(b"\r\n") if section_end > line_end else []
                trailers = [_field(line) for line in lines]
                return answer._replace(
                    body=bytes(body), framing="chunked", trailers=trailers
                ), section_end + 4
            if len(raw) < end + 2:
                if closed:
                    body += raw[begin:end]
                break
            body += raw[begin:end]
            if raw[end : end + 2] != b"\r\n":
                raise WireError("a chunk does not end where its size says", answer._replace(body=bytes(body)))
            answer.chunks.append(size)
            self._at = end + 2
        if closed:
            raise WireError("the connection ended in a chunked body", answer._replace(body=bytes(body)))
        return None, 0


def read_answer(raw, method="GET", *, closed=False):
    """Return the first response in ``raw`` and what follows it, as AnswerReader.read does."""
    return AnswerReader(method).read(raw, closed=closed)


def _read_head(head):
    start, *lines = head.split(b"\r\n")
    if not _STATUS_LINE.fullmatch(start):
        raise WireError(f"no status line: {start!r}")
    version, status, reason = [*start.split(b" ", 2), b""][:3]
    return Answer(version, int(status), reason, [_field(line) for line in lines], b"", "none", [], [])


def _field(line):
    if not _FIELD.fullmatch(line):
        raise WireError(f"no field: {line!r}")
    name, _, value = line.partition(b":")
    return name, value.strip(b" \t")


def _read_length(answer, raw, begin, length, closed):
    if not length.isdigit():
        raise WireError(f"no length: {length!r}")
    end = begin + int(length)
    if len(raw) >= end:
        return answer._replace(body=bytes(raw[begin:end]), framing="length"), end
    if closed:
        raise WireError(
            "the connection ended before the body's length", answer._replace(body=bytes(raw[begin:]))
        )
    return None, end


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
        reader = AnswerReader(method)
        while True:
            answer, rest = reader.read(self.received)
            if answer is not None:
                self.received = rest
                return answer
            data = await self.reader.read(1 << 16)
            if not data:
                answer, self.received = reader.read(self.received, closed=True)
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
