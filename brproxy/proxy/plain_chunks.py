"""The ordinary read of a chunked stream: whole chunks that hold one plain event each. Pure.

What is done here is done for every token of every user.
"""

from __future__ import annotations

from collections.abc import Callable

from brproxy.engines.plain import PlainEvent
from brproxy.relay.framing import ONE_CHUNK_BYTES_MAX, SIZE_LINES


def plain_chunk_taker(plain: PlainEvent, took: Callable[[bytes, int], None]) -> Callable[[bytes], bool]:
    """Return a function that hands a read of such chunks to ``took``, with their number.

    It returns False, and does nothing, if anything else is in the read.
    """
    prefix, _, suffix, _ = plain
    suffix += b"\r\n"
    suffix_bytes = len(suffix)

    def take(data: bytes) -> bool:
        # Nearly always it is one chunk: then its length tells what it must begin with.
        read_bytes = len(data)
        if read_bytes <= ONE_CHUNK_BYTES_MAX:
            head = SIZE_LINES[read_bytes] + prefix
            if (
                data.startswith(head)
                # The suffix begins with the quote behind the text, which is the first: none is in the text.
                and data.find(b'"', len(head)) == read_bytes - suffix_bytes
                and data.endswith(suffix)
            ):
                took(data, 1)
                return True
        chunks = _count(data, prefix, suffix)
        if chunks:
            took(data, chunks)
        return chunks > 0

    return take


def _count(data: bytes, prefix: bytes, suffix: bytes) -> int:
    """Return how many such chunks a read is; 0 if anything else is in it."""
    prefix_bytes, suffix_bytes = len(prefix), len(suffix)
    chunks = start = 0
    while start < len(data):
        event_starts = data.find(b"\n", start) + 1
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
