"""The ordinary read of a chunked stream: whole chunks that hold one plain event each. Pure.

What is done here is done for every token of every user.
"""

from __future__ import annotations

from collections.abc import Callable

from brproxy.engines.plain import PlainEvent
from brproxy.relay.framing import ONE_CHUNK_BYTES_MAX, SIZE_LINES


def plain_chunk_counter(plain: PlainEvent) -> Callable[[bytes], int]:
    """Return a function that tells how many such chunks a read is; 0 if anything else is in it."""
    prefix, prefix_bytes, suffix, _ = plain
    suffix += b"\r\n"
    suffix_bytes = len(suffix)

    def count(data: bytes) -> int:
        chunks = start = 0
        while start < len(data):
            event_starts = data.find(b"\n", start) + 1
            # The suffix begins with the quote behind the text, which is the first: none is in the text.
            text_ends = data.find(b'"', event_starts + prefix_bytes)
            chunk_bytes = text_ends + suffix_bytes - start
            if (
                not data.startswith(suffix, text_ends)
                or not data.startswith(prefix, event_starts)
                or chunk_bytes > ONE_CHUNK_BYTES_MAX
                or not data.startswith(SIZE_LINES[chunk_bytes], start)
            ):
                return 0
            start += chunk_bytes
            chunks += 1
        return chunks

    return count
