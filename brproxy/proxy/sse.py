"""Server-sent events (WHATWG HTML, section 9.2), split incrementally and without changing a byte. Pure.

The ordinary chunk is one or several whole events that end in a blank line: it is split by two byte searches.
Line ends may be LF, CR LF or CR, and a chunk may end anywhere, also between CR and LF.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# The groups are atomic: a CR LF that is one line end must not be taken apart to make two of it.
_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_BLANK_LINE_BYTES_MAX = 4
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


class SseEvent(NamedTuple):
    """One event: its bytes with the blank line that ends it, and its data; None without a data field."""

    raw: bytes
    data: bytes | None


class SseSplitter:
    """Cuts a stream into events; the raw bytes of all events plus ``tail`` are the input.

    An event longer than ``event_bytes_max`` is handed out in pieces without data (it passes, unread): the
    buffer never holds more than that and one chunk.
    """

    def __init__(self, event_bytes_max: int) -> None:
        self._event_bytes_max = event_bytes_max
        self._oversized = False
        self._first = True
        self.tail = b""

    def feed(self, chunk: bytes) -> list[SseEvent]:
        """Return the events that ``chunk`` completes."""
        buffer = self.tail + chunk if self.tail else chunk
        if buffer.endswith(b"\n\n") and b"\r" not in buffer:
            self.tail = b""
            return [self._event(body + b"\n\n") for body in buffer[:-2].split(b"\n\n")]
        return self._feed_any(buffer, searched=len(self.tail))

    def _feed_any(self, buffer: bytes, searched: int) -> list[SseEvent]:
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
            events.append(SseEvent(self.tail, None))
            self.tail, self._oversized = b"", True
        return events

    def _event(self, raw: bytes) -> SseEvent:
        if self._oversized or len(raw) > self._event_bytes_max:
            self._oversized = False
            return SseEvent(raw, None)
        if self._first:
            self._first = False
            return SseEvent(raw, event_data(raw.removeprefix(_BOM)))
        return SseEvent(raw, event_data(raw))


def event_data(raw: bytes) -> bytes | None:
    """Return the data of one event: the values of its data fields, joined by LF; None without any."""
    if raw.startswith(b"data: ") and raw.find(b"\n") == len(raw) - 2 and b"\r" not in raw:
        return raw[6:-2]
    values = []
    for line in _LINE_END.split(raw):
        name, _, value = line.partition(b":")
        if name == b"data":
            values.append(value.removeprefix(b" "))
    return b"\n".join(values) if values else None
