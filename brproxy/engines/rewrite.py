"""Where the top-level members of a JSON object are in its bytes, found in one scan. Pure, and never raises.

A parser makes an object of every value, which for ``[[],[],…]`` costs 60 ms and 30 MB for each MiB. The scan
makes none: it looks at blocks of bytes as arrays, so that its cost (2 to 10 ms for each MiB) depends on the
length of a body alone. Where a long string begins it goes straight to its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from operator import itemgetter, methodcaller
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 1 << 16
"""What is looked at together: small enough for the cache, large enough that calls cost nothing."""

MEMBERS_MAX = 1024
"""Members that are noted; requests have some thirty. Those behind count as if they were not there."""

TOKENS_BYTES_MAX = 1 << 13
"""Bodies to which tokens are looked at one by one: whatever is in them, that takes a millisecond at most."""

# The last: outside of strings no JSON escapes anything, and what does is read as in blocks.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|\[[^\[\]{}"\\]*+\]|[\[\]{}:,]|\\["\\]', re.DOTALL)


def _nested(depth: int) -> str:
    """Return a pattern of what is between two brackets, with brackets in it to that depth."""
    inside = rf"|[\[{{]{_nested(depth - 1)}[\]}}]" if depth else ""
    return rf"(?:[^\[\]{{}}\"]++|{_STRING}{inside})*+"


_CHARACTERS: Final = r'(?:[^"\\]++|\\.)*+'
_STRING: Final = f'"{_CHARACTERS}"'
_DEPTH_MAX: Final = 6
_MEMBER = re.compile(
    rf'[ \t\r\n]*+"({_CHARACTERS})"[ \t\r\n]*+:[ \t\r\n]*+'
    rf"({_STRING}|[\[{{]{_nested(_DEPTH_MAX)}[\]}}]|[^ \t\r\n,:\[\]{{}}\"]++)[ \t\r\n]*+(?:,|(?=\}}))"
    rf"|.++".encode(),
    re.DOTALL,
)
"""A whole member of ordinary JSON, with the comma behind it, or else all the rest.

Nothing is tried twice, so that it costs what its length costs.
"""
_key, _span = itemgetter(1), methodcaller("span", 2)

_COMMA: Final = ord(",")
_OPENING: Final = b"[{"
_CLOSING: Final = b"]}"
_SEPARATING: Final = b":,"
_WHITESPACE: Final = b" \t\r\n"
_LEADING_WHITESPACE = re.compile(rb"[ \t\r\n]*+")
_DEPTH_CHANGES = np.zeros(256, np.int8)
_DEPTH_CHANGES[[ord("{"), ord("[")]] = 1
_DEPTH_CHANGES[[ord("}"), ord("]")]] = -1

Flags = NDArray[np.bool_]


class Member(NamedTuple):
    """One top-level member: its key as it stands between the quotes, and where its value is in the body."""

    key: bytes
    start: int
    end: int


Places = tuple[list[bytes], list[tuple[int, int]]]
"""Of each member its key, and in the other list where its value is: for whoever needs few of them."""


class Block(NamedTuple):
    """Some bytes of a body from ``start`` on. Escaped ones are replaced by letters.

    ``is_quote``: the byte opens or closes a string. ``is_inside``: it is in one, or opens it.
    """

    start: int
    characters: NDArray[np.uint8]
    is_quote: Flags
    is_inside: Flags


def blocks(body: bytes, start: int = 0, end: int | None = None) -> Iterator[Block]:
    """Yield ``body[start:end]``, which begins outside of a string, but for what is only text."""
    end = len(body) if end is None else end
    in_string = is_escaped = False
    while start < end:
        if in_string and not is_escaped:
            start = _skip_text(body, start, end)
            if start == end:
                return
        block = body[start : min(start + BLOCK_BYTES, end)]
        if is_escaped or b"\\" in block:
            block, is_escaped = _without_escapes(block, is_escaped=is_escaped)
        characters = np.frombuffer(block, np.uint8)
        is_quote = characters == ord('"')
        if b'"' in block:
            is_inside = np.bitwise_xor.accumulate(is_quote.view(np.uint8)).view(np.bool_)
            if in_string:
                is_inside = ~is_inside
        else:
            is_inside = np.full(len(block), in_string)
        yield Block(start, characters, is_quote, is_inside)
        in_string = bool(is_inside[-1])
        start += len(block)


def _skip_text(body: bytes, start: int, end: int) -> int:
    """Return where to go on inside of a string: past the blocks that neither end nor escape anything."""
    while start < end:
        block_end = start + BLOCK_BYTES
        if body.find(b'"', start, block_end) >= 0 or body.find(b"\\", start, block_end) >= 0:
            break
        start = block_end
    return min(start, end)


def _without_escapes(block: bytes, *, is_escaped: bool) -> tuple[bytes, bool]:
    """Return ``block`` with letters for escaped bytes, and whether the byte behind it is escaped.

    ``is_escaped``: the first byte is.
    """
    if is_escaped:
        block = b"x" + block[1:]
    # From left to right: of a run of backslashes every other one escapes what is behind it.
    block = block.replace(b"\\\\", b"xx")
    return block.replace(b'\\"', b"xx"), block.endswith(b"\\")


def members(body: bytes) -> list[Member] | None:
    """Return the members of the object that ``body`` is, in order and with duplicates; None if it is none.

    What is inside of values is not checked, nor is what stands behind the object.
    """
    opening = object_start(body)
    found = None if opening is None else places(body, opening)
    return None if found is None else [Member(key, *span) for key, span in zip(*found, strict=True)]


def places(body: bytes, opening: int) -> Places | None:
    """As ``members``, of the object that opens at ``opening``."""
    found = _ordinary(body, opening + 1) if len(body) - opening <= TOKENS_BYTES_MAX else None
    return _scanned(body, opening) if found is None else found


def _scanned(body: bytes, opening: int) -> Places | None:
    """See places: whatever the body may be."""
    keys: list[bytes] = []
    spans: list[tuple[int, int]] = []
    key_start, colon = opening + 1, -1
    for position, character in top_level(body, opening):
        if character == b":":
            if colon < 0:
                colon = position
            continue
        if colon >= 0:
            key = body[key_start:colon].strip(_WHITESPACE)
            if len(key) < 2 or key[:1] != b'"' or key[-1:] != b'"':
                return None
            keys.append(key[1:-1])
            spans.append(_trimmed(body, colon + 1, position))
        elif character == b"," or keys or body[key_start:position].strip(_WHITESPACE):
            return None
        if character != b"," or len(keys) == MEMBERS_MAX:
            return keys, spans
        key_start, colon = position + 1, -1
    return None


def _ordinary(body: bytes, start: int) -> Places | None:
    """Return the members from ``start`` on, the first one's; None for what only the scan can tell."""
    # One after the other, by the interpreter's own loop: there is always one, and the last is the rest.
    found = list(_MEMBER.finditer(body, start))
    rest = found.pop().start() if found else start
    if body[rest : rest + 1] != b"}" or (found and body[rest - 1] == _COMMA):
        return None
    del found[MEMBERS_MAX:]
    return list(map(_key, found)), list(map(_span, found))


def object_start(body: bytes) -> int | None:
    """Return where the opening brace is: behind nothing but whitespace and a byte order mark."""
    if body.startswith(b"{"):
        return 0
    start = 3 if body.startswith(b"\xef\xbb\xbf") else 0
    # Whitespace may be megabytes: look for what ends it without copying them.
    brace = body.find(b"{", start)
    if brace < 0 or body[start:brace].strip(_WHITESPACE):
        return None
    return brace


def top_level(body: bytes, opening: int) -> Iterator[tuple[int, bytes]]:
    """Return colons and commas of the object that opens at ``opening``, and its closing brace last."""
    by = _by_tokens if len(body) - opening <= TOKENS_BYTES_MAX else _by_blocks
    return by(body, opening)


def _by_tokens(body: bytes, opening: int) -> Iterator[tuple[int, bytes]]:
    """See top_level: one token after the other, of which a list of numbers is one.

    A call on an array takes as long as twenty of them: below some KiB this is several times as fast.
    """
    depth = 1
    for token in _TOKEN.finditer(body, opening + 1):
        character = body[token.start()]
        if character in _OPENING:
            depth += token.end() == token.start() + 1
        elif character in _CLOSING:
            depth -= 1
            if depth == 0:
                yield token.start(), b"}"
                return
        elif depth == 1 and character in _SEPARATING:
            yield token.start(), token[0]


def _by_blocks(body: bytes, opening: int) -> Iterator[tuple[int, bytes]]:
    """See top_level: in arrays, whose cost does not depend on what is in them."""
    depth = 0
    for start, characters, _, is_inside in blocks(body, opening):
        changes = _DEPTH_CHANGES.take(characters)
        changes *= ~is_inside
        depths = np.cumsum(changes, dtype=np.int32)
        depths += depth
        separates = (characters == ord(",")) | (characters == ord(":"))
        separates &= (depths == 1) & ~is_inside
        closing = -1
        if depths.min() <= 0:
            closing = int(np.argmax(depths <= 0))
            separates = separates[:closing]
        for index in np.flatnonzero(separates).tolist():
            yield start + index, bytes(characters[index : index + 1])
        if closing >= 0:
            yield start + closing, b"}"
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
