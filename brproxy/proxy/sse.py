"""Server-sent events (WHATWG HTML, section 9.2), split incrementally and without changing a byte. Pure.

The ordinary chunk is one or several whole events that end in a blank line: it is split by two byte searches.
Line ends may be LF, CR LF or CR, and a chunk may end anywhere, also between CR and LF.
"""

from __future__ import annotations

import re

# The groups are atomic: a CR LF that is one line end must not be taken apart to make two of it.
_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_BLANK_LINE_BYTES_MAX = 4
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


class Unread(bytes):
    """A piece of an event that is too long to look into."""


class SseSplitter:
    """Cuts a stream into events, each with the blank line that ends it; together with ``tail`` the input.

    An event longer than ``event_bytes_max`` is handed out in pieces that are Unread: the buffer never holds
    more than that and one chunk.
    """

    __slots__ = ("_event_bytes_max", "_oversized", "tail")

    def __init__(self, event_bytes_max: int) -> None:
        self._event_bytes_max = event_bytes_max
        self._oversized = False
        self.tail = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the events that ``chunk`` completes."""
        buffer = self.tail + chunk if self.tail else chunk
        if (
            buffer.endswith(b"\n\n")
            and b"\r" not in buffer
            and len(buffer) <= self._event_bytes_max
            and not self._oversized
        ):
            self.tail = b""
            return [body + b"\n\n" for body in buffer[:-2].split(b"\n\n")]
        return self._feed_any(buffer, searched=len(self.tail))

    def _feed_any(self, buffer: bytes, searched: int) -> list[bytes]:
        events = []
        start = 0
        # The first ``searched`` bytes hold no blank line: only one that the new bytes complete can be new.
        for match in _BLANK_LINE.finditer(buffer, max(0, searched - _BLANK_LINE_BYTES_MAX + 1)):
            # A CR at the very end may be half of a CR LF: wait for the next byte.
            if match.end() == len(buffer) and buffer.endswith(b"\r"):
                break
            events.append(self._event(buffer[start : match.end()]))
            start = match.end()
        self.tail = buffer[start:]
        if len(self.tail) > self._event_bytes_max:
            events.append(Unread(self.tail))
            self.tail, self._oversized = b"", True
        return events

    def _event(self, raw: bytes) -> bytes:
        if self._oversized or len(raw) > self._event_bytes_max:
            self._oversized = False
            return Unread(raw)
        return raw


def event_data(raw: bytes) -> bytes | None:
    """Return the data of one event: the values of its data fields, joined by LF; None without any.

    A byte order mark before the event is no part of it: it can only be the stream's.
    """
    if type(raw) is Unread:
        return None
    if raw.startswith(b"data: ") and raw.find(b"\n") == len(raw) - 2 and b"\r" not in raw:
        return raw[6:-2]
    values = []
    for line in _LINE_END.split(raw.removeprefix(_BOM)):
        name, _, value = line.partition(b":")
        if name == b"data":
            values.append(value.removeprefix(b" "))
    return b"\n".join(values) if values else None
