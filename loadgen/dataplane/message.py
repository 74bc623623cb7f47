"""HTTP/1.1 messages as they arrive, piece by piece. Pure; no more of it than a benchmark's two ends need."""

from __future__ import annotations

from dataclasses import dataclass

HEAD_BYTES_MAX = 1 << 16
_CRLF = b"\r\n"


class MessageError(Exception):
    """The bytes are no HTTP message, or end before it does."""


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a message: its first line, how its body ends, and whether the connection ends with it."""

    start_line: bytes
    length: int | None
    chunked: bool
    close: bool


def parse_head(head: bytes) -> Head:
    """Parse a head, without the empty line that ends it; raises MessageError."""
    lines = head.split(_CRLF)
    length, chunked, close = None, False, lines[0].startswith(b"HTTP/1.0")
    for line in lines[1:]:
        name, _, value = line.partition(b":")
        match name.lower():
            case b"content-length":
                length = _integer(value, 10)
            case b"transfer-encoding":
                chunked = b"chunked" in value.lower()
            case b"connection":
                close = b"close" in value.lower()
    return Head(lines[0], length, chunked, close)


def _integer(text: bytes, base: int) -> int:
    try:
        return int(text, base)
    except ValueError:
        raise MessageError(f"not a size: {text[:40]!r}") from None


class Message:
    """One message; ``rest`` is what followed its end.

    ``until_close``: a body whose length is not given ends with the connection (responses), instead of being
    empty (requests).
    """

    __slots__ = ("_after_data", "_left", "_pending", "_trailer", "_until_close", "complete", "head", "rest")

    def __init__(self, *, until_close: bool) -> None:
        self._until_close = until_close
        self._pending = b""
        self._left = 0
        self._after_data = False
        self._trailer = False
        self.head: Head | None = None
        self.complete = False
        self.rest = b""

    @property
    def at_boundary(self) -> bool:
        """Whether the last bytes were the end of a chunk of a chunked body."""
        whole = not self._pending and not self._left and not self._after_data and not self._trailer
        return whole and self.head is not None and self.head.chunked

    @property
    def closes(self) -> bool:
        """Whether no other message may follow on the connection."""
        return self.head is not None and (self.head.close or self._ends_with_connection)

    @property
    def _ends_with_connection(self) -> bool:
        head = self.head
        return self._until_close and head is not None and head.length is None and not head.chunked

    def feed(self, data: bytes) -> bytes:
        """Take what has arrived and return the bytes of the body in it; raises MessageError."""
        if self.head is None:
            data = self._pending + data
            before, found, data = data.partition(b"\r\n\r\n")
            if not found:
                self._pending = before
                if len(before) > HEAD_BYTES_MAX:
                    raise MessageError(f"a head of more than {HEAD_BYTES_MAX} bytes")
                return b""
            self._pending = b""
            self.head = parse_head(before)
            self._left = self.head.length or 0
        if self.head.chunked:
            return self._feed_chunks(data)
        if self._ends_with_connection:
            return data
        body, self.rest = data[: self._left], data[self._left :]
        self._left -= len(body)
        self.complete = not self._left
        return body

    def _feed_chunks(self, data: bytes) -> bytes:
        data = self._pending + data
        self._pending = b""
        at = 0
        parts = []
        while at < len(data) and not self.complete:
            if self._left:
                part = data[at : at + self._left]
                parts.append(part)
                self._left -= len(part)
                at += len(part)
                continue
            end = data.find(_CRLF, at)
            if end < 0:
                self._pending = data[at:]
                if len(self._pending) > HEAD_BYTES_MAX:
                    raise MessageError("a chunk's size line does not end")
                return b"".join(parts)
            self._line(data[at:end])
            at = end + 2
        if self.complete:
            self.rest = data[at:]
        return b"".join(parts)

    def _line(self, line: bytes) -> None:
        """Take a line between the data of two chunks, or of the trailer."""
        if self._after_data:
            if line:
                raise MessageError(f"{line[:40]!r} where a chunk ends")
            self._after_data = False
        elif self._trailer:
            self.complete = not line
        else:
            self._left = _integer(line.partition(b";")[0], 16)
            self._after_data = self._left > 0
            self._trailer = not self._left

    def end(self) -> None:
        """Take the end of the connection; raises MessageError when the message was not over."""
        if not self.complete and not self._ends_with_connection:
            raise MessageError("the connection ended before the message")
        self.complete = True
