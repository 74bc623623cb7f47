"""Where the top-level members of a JSON object are in its bytes, found in one scan. Pure, and never raises.

A parser makes an object of every value, which for ``[[],[],…]`` costs 60 ms and 30 MB for each MiB. The scan
makes none: it looks at blocks of bytes as arrays, so that its cost (4 to 16 ms for each MiB) depends on the
length of a body alone. Where a long string begins it goes straight to its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 1 << 16
"""What is looked at together: small enough for the cache, large enough that calls cost nothing."""

MEMBERS_MAX = 1024
"""Members that are noted; requests have some thirty. Those behind count as if they were not there."""

_QUOTE: Final = ord('"')
_BACKSLASH: Final = ord("\\")
_WHITESPACE: Final = b" \t\r\n"
_LEADING_WHITESPACE = re.compile(rb"[ \t\r\n]*+")
_DEPTH_CHANGES = np.zeros(256, np.int8)
_DEPTH_CHANGES[[ord("{"), ord("[")]] = 1
_DEPTH_CHANGES[[ord("}"), ord("]")]] = -1
_IS_STRUCTURAL = _DEPTH_CHANGES != 0
_IS_STRUCTURAL[[_QUOTE, ord(","), ord(":")]] = True

Positions = NDArray[np.intp]


class Member(NamedTuple):
    """One top-level member: its key as it stands between the quotes, and where its value is in the body."""

    key: bytes
    start: int
    end: int


class Marks(NamedTuple):
    """What structures a piece of JSON: positions in the body in ascending order, and the bytes there.

    ``is_quote``: the byte opens or closes a string. ``is_outside``: it belongs to no string.
    """

    positions: Positions
    characters: NDArray[np.uint8]
    is_quote: NDArray[np.bool_]
    is_outside: NDArray[np.bool_]


def marks(body: bytes, start: int = 0, end: int | None = None) -> Iterator[Marks]:
    """Yield what structures ``body[start:end]``, which begins outside of a string, block by block."""
    end = len(body) if end is None else end
    in_string = is_escaped = False
    while start < end:
        if in_string and not is_escaped:
            start = _skip_text(body, start, end)
            if start == end:
                return
        block = np.frombuffer(body, np.uint8, min(BLOCK_BYTES, end - start), start)
        candidates = np.flatnonzero(_IS_STRUCTURAL[block])
        characters = block[candidates]
        is_quote = characters == _QUOTE
        # Only where there is one: most text has none.
        escaped, is_escaped = _escaped_in(body, start, block, is_escaped=is_escaped)
        if escaped.size:
            is_free = np.ones(block.size + 1, np.bool_)
            is_free[escaped] = False
            is_quote &= is_free[candidates]
        after = np.bitwise_xor.accumulate(is_quote.view(np.uint8)).view(np.bool_) ^ in_string
        yield Marks(candidates + start, characters, is_quote, ~(after | is_quote))
        if after.size:
            in_string = bool(after[-1])
        start += block.size


def _skip_text(body: bytes, start: int, end: int) -> int:
    """Return where to go on inside of a string: past the blocks that neither end nor escape anything."""
    while start < end:
        block_end = start + BLOCK_BYTES
        if body.find(b'"', start, block_end) >= 0 or body.find(b"\\", start, block_end) >= 0:
            break
        start = block_end
    return min(start, end)


def _escaped_in(
    body: bytes, start: int, block: NDArray[np.uint8], *, is_escaped: bool
) -> tuple[Positions, bool]:
    """Return which bytes of ``block`` a backslash escapes, and whether the byte behind it is escaped.

    Of a run of backslashes every other one escapes what is behind it. ``is_escaped``: the first byte is.
    """
    if not is_escaped and body.find(b"\\", start, start + block.size) < 0:
        return np.empty(0, np.intp), False
    backslashes = np.flatnonzero(block == _BACKSLASH)
    if is_escaped and backslashes.size and backslashes[0] == 0:
        # It is what was escaped, and escapes nothing itself.
        backslashes = backslashes[1:]
    begins_run = np.ones(backslashes.size, np.bool_)
    begins_run[1:] = np.diff(backslashes) != 1
    run_starts = backslashes[begins_run][np.cumsum(begins_run) - 1]
    escaped = backslashes[(backslashes - run_starts) % 2 == 0] + 1
    next_is_escaped = bool(escaped.size) and int(escaped[-1]) == block.size
    if is_escaped:
        escaped = np.concatenate((np.zeros(1, np.intp), escaped))
    return escaped, next_is_escaped


def members(body: bytes) -> list[Member] | None:
    """Return the members of the object that ``body`` is, in order and with duplicates; None if it is none.

    What is inside of values is not checked, nor is what stands behind the object.
    """
    opening = _object_start(body)
    if opening is None:
        return None
    found: list[Member] = []
    key_start, colon = opening + 1, -1
    for position, character in _top_level(body, opening):
        if character == b":":
            if colon < 0:
                colon = position
            continue
        if colon >= 0:
            key = body[key_start:colon].strip(_WHITESPACE)
            if len(key) < 2 or key[:1] != b'"' or key[-1:] != b'"':
                return None
            found.append(Member(key[1:-1], *_trimmed(body, colon + 1, position)))
        elif character == b"," or found or body[key_start:position].strip(_WHITESPACE):
            return None
        if character != b"," or len(found) == MEMBERS_MAX:
            return found
        key_start, colon = position + 1, -1
    return None


def _object_start(body: bytes) -> int | None:
    """Return where the opening brace is: behind nothing but whitespace and a byte order mark."""
    start = 3 if body.startswith(b"\xef\xbb\xbf") else 0
    # Whitespace may be megabytes: look for what ends it without copying them.
    brace = body.find(b"{", start)
    if brace < 0 or body[start:brace].strip(_WHITESPACE):
        return None
    return brace


def _top_level(body: bytes, opening: int) -> Iterator[tuple[int, bytes]]:
    """Yield colons and commas of the object that opens at ``opening``, and its closing brace last."""
    depth = 0
    for positions, characters, _, is_outside in marks(body, opening):
        changes = _DEPTH_CHANGES[characters]
        changes[~is_outside] = 0
        depths = np.cumsum(changes, dtype=np.intp) + depth
        if not depths.size:
            continue
        ends = np.flatnonzero(depths <= 0)
        last = int(ends[0]) if ends.size else depths.size
        wanted = np.flatnonzero(is_outside[:last] & (depths[:last] == 1) & (changes[:last] == 0))
        for index in wanted.tolist():
            yield int(positions[index]), bytes(characters[index : index + 1])
        if ends.size:
            yield int(positions[last]), b"}"
            return
        depth = int(depths[-1])


def _trimmed(body: bytes, start: int, end: int) -> tuple[int, int]:
    """Return where the value between ``start`` and ``end`` is without whitespace around it."""
    leading = _LEADING_WHITESPACE.match(body, start, end)
    start = start if leading is None else leading.end()
    while start < end:
        # In windows: the value may be megabytes, and is not copied.
        window = body[max(start, end - 4096) : end]
        stripped = len(window.rstrip(_WHITESPACE))
        end -= len(window) - stripped
        if stripped:
            break
    return start, end


def insert_member(body: bytes, member: bytes) -> bytes:
    """Return ``body``, an object in UTF-8 that has members, with ``member`` before them.

    All other bytes stay as they are. A member of the same name behind it would win.
    """
    after_brace = body.index(b"{") + 1
    return body[:after_brace] + member + b"," + body[after_brace:]
