"""What a text is made of, by classes of its bytes that differ in how many of them a token has. Pure.

Everything is counted by the interpreter's own loops. Of a long text windows are looked at, spread over it.
"""

from __future__ import annotations

from typing import AnyStr, Final

from brproxy.types import TextCounts

COUNTED_BYTES_MAX: Final = 1536
"""What of a text is looked at, in two or three microseconds."""

_WINDOW = 128
_DIGIT, _BLANK, _OTHER = b"0", b" ", b"."
_TWO, _THREE, _FOUR = b"2", b"3", b"4"


def _kind(byte: int) -> bytes:
    if byte == ord(" "):
        return _BLANK
    if ord("0") <= byte <= ord("9"):
        return _DIGIT
    if byte >= 0xC0:
        return _TWO if byte < 0xE0 else _THREE if byte < 0xF0 else _FOUR
    return _OTHER


_KINDS = b"".join(map(_kind, range(256)))
# What most of a text is: letters, and all bytes of a character but the first.
_FREQUENT = bytes(byte for byte in range(256) if 0x80 <= byte < 0xC0 or (byte < 0x80 and chr(byte).isalpha()))


def text_counts(text: str, messages: int) -> TextCounts:
    """Return what ``text`` of so many messages is made of, by its bytes in UTF-8."""
    if text.isascii():
        seen = (text if len(text) <= COUNTED_BYTES_MAX else spread(text)).encode()
        return _ascii_counts(seen, len(text), messages)
    encoded = text.encode("utf-8", "surrogatepass")
    return counts_like(encoded, len(encoded), messages)


def counts_like(seen: bytes, text_bytes: int, messages: int) -> TextCounts:
    """Return what a text of ``text_bytes`` is made of if ``seen`` is what it is like."""
    if len(seen) > COUNTED_BYTES_MAX:
        seen = spread(seen)
    if seen.isascii():
        return _ascii_counts(seen, text_bytes, messages)
    kinds = seen.translate(_KINDS, _FREQUENT)
    blanks, digits, others = kinds.count(_BLANK), kinds.count(_DIGIT), kinds.count(_OTHER)
    wide = 2 * kinds.count(_TWO) + 4 * kinds.count(_FOUR)
    three = 3 * kinds.count(_THREE)
    if len(seen) != text_bytes or blanks + digits + others + wide + three > text_bytes:
        # Windows may cut characters, and hold more first bytes than there is room for.
        known = blanks, digits, others, wide, three
        whole = max(len(seen), sum(known))
        blanks, digits, others, wide, three = (share * text_bytes // whole for share in known)
    letters = text_bytes - blanks - digits - others - wide - three
    return letters, blanks, digits, others, wide, three, messages, 1 if messages else 0


def _ascii_counts(seen: bytes, text_bytes: int, messages: int) -> TextCounts:
    kinds = seen.translate(_KINDS, _FREQUENT)
    blanks, digits, others = kinds.count(_BLANK), kinds.count(_DIGIT), len(kinds)
    others -= blanks + digits
    if len(seen) != text_bytes and seen:
        whole = len(seen)
        blanks = blanks * text_bytes // whole
        digits = digits * text_bytes // whole
        others = others * text_bytes // whole
    letters = text_bytes - blanks - digits - others
    return letters, blanks, digits, others, 0, 0, messages, 1 if messages else 0


def spread(text: AnyStr) -> AnyStr:
    """Return windows of a long text, as many as are looked at."""
    step = -(-len(text) * _WINDOW // COUNTED_BYTES_MAX)
    windows = [text[start : start + _WINDOW] for start in range(0, len(text), step)]
    return text[:0].join(windows)


def bytes_of(text: TextCounts) -> int:
    """Return the length in UTF-8 of what is counted."""
    return sum(text[:-2])


def joined(one: TextCounts, other: TextCounts) -> TextCounts:
    """Return what two texts of one prompt are made of."""
    l1, b1, d1, o1, w1, t1, m1, c1 = one
    l2, b2, d2, o2, w2, t2, m2, c2 = other
    return l1 + l2, b1 + b2, d1 + d2, o1 + o2, w1 + w2, t1 + t2, m1 + m2, c1 or c2
