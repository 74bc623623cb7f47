"""The size of a prompt that is not parsed, from where its members are in the body. Pure, and never raises.

Token ids are counted exactly. Anything else is a guess by the bytes of its strings.
"""

from __future__ import annotations

import re
from typing import Final

import numpy as np

from brproxy.engines.prompt import PromptSize
from brproxy.engines.rewrite import BLOCK_BYTES, Member, blocks
from brproxy.engines.text import counts_like
from brproxy.types import SEQUENCES_MAX, TextCounts

MEASURED_BYTES_MAX = 1 << 23
"""Bytes of one member whose strings are told apart, in some 50 ms at worst; what is behind counts as text."""

_DATA_BYTES_MIN: Final = 1 << 10
_TOKEN_LISTS = b"0123456789,[] \t\r\n"
_WORDS_END = b" \n\t"

_WINDOW = 512
_WINDOWS = 32
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=-_"
# What a character is that stands as an escape in a body; of pairs of backslashes the first is none.
_ESCAPES: Final = (
    (re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"), "\U0001f600".encode()),
    (re.compile(rb"\\u00[0-7][0-9a-fA-F]"), b"."),
    (re.compile(rb"\\u0[0-7][0-9a-fA-F]{2}"), "é".encode()),
    (re.compile(rb"\\u[0-9a-fA-F]{4}"), "中".encode()),
    (re.compile(rb"\\[^u]"), b"."),
)
_MESSAGE = b'"role"'


def member_size(body: bytes, member: Member) -> PromptSize:
    """Return the size of the prompt that ``member`` of ``body`` is."""
    if _is_token_lists(body, member):
        return _token_lists(body, member)
    text_bytes, strings = _text(body, member)
    several = body[member.start : member.start + 1] == b"[" and member.key in {b"prompt", b"text"}
    return PromptSize(
        text=_counts(body, member, text_bytes),
        prompts=max(1, min(strings, SEQUENCES_MAX)) if several else 1,
        is_all=False,
    )


def _is_token_lists(body: bytes, member: Member) -> bool:
    """Tell whether the value is lists of natural numbers; text shows in the first block that it is not."""
    return not any(
        body[start : min(start + BLOCK_BYTES, member.end)].translate(None, _TOKEN_LISTS)
        for start in range(member.start, member.end, BLOCK_BYTES)
    )


def _token_lists(body: bytes, member: Member) -> PromptSize:
    """Count runs of digits; one list of them is one prompt."""
    tokens = 0
    was_digit = False
    for start in range(member.start, member.end, BLOCK_BYTES):
        block = np.frombuffer(body, np.uint8, min(BLOCK_BYTES, member.end - start), start)
        is_digit = (block >= ord("0")) & (block <= ord("9"))
        tokens += int(np.count_nonzero(is_digit[1:] & ~is_digit[:-1])) + bool(is_digit[0] and not was_digit)
        was_digit = bool(is_digit[-1])
    lists = body.count(b"[", member.start, member.end)
    return PromptSize(
        tokens=tokens,
        prompts=max(1, min(lists - 1, SEQUENCES_MAX)),
        is_all=lists >= 1,
    )


def _text(body: bytes, member: Member) -> tuple[int, int]:
    """Return the bytes of the strings that are no data, and how many strings there are."""
    measured_end = min(member.end, member.start + MEASURED_BYTES_MAX)
    text_bytes = member.end - measured_end
    strings = 0
    opened: int | None = None
    for block in blocks(body, member.start, measured_end):
        quotes = np.flatnonzero(block.is_quote) + block.start
        if opened is not None and quotes.size:
            quotes = np.concatenate((np.array([opened], np.intp), quotes))
            opened = None
        if quotes.size % 2:
            opened = int(quotes[-1])
            quotes = quotes[:-1]
        lengths = quotes[1::2] - quotes[::2] - 1
        strings += lengths.size
        text_bytes += int(lengths.sum())
        for long in np.flatnonzero(lengths >= _DATA_BYTES_MIN).tolist():
            if _is_data(body, int(quotes[2 * long]) + 1):
                text_bytes -= int(lengths[long])
    if opened is not None:
        text_bytes += measured_end - opened - 1
    return text_bytes, strings


def _counts(body: bytes, member: Member, text_bytes: int) -> TextCounts:
    """Return what ``text_bytes`` of strings, counted as they stand in the body, are made of."""
    window_step = max(_WINDOW, (member.end - member.start) // _WINDOWS)
    seen = b"".join(
        window
        for start in range(member.start, member.end, window_step)
        if (window := body[start : min(start + _WINDOW, member.end)]).translate(None, _BASE64)
    )
    seen_bytes = len(seen)
    seen = seen.replace(b"\\\\", b".")
    for escape, character in _ESCAPES:
        seen = escape.sub(character, seen)
    messages = min(body.count(_MESSAGE, member.start, member.end), SEQUENCES_MAX)
    return counts_like(seen, text_bytes * len(seen) // seen_bytes if seen else text_bytes, messages)


def _is_data(body: bytes, start: int) -> bool:
    """Tell whether a long string is an image or the like: text has blanks."""
    beginning = body[start : start + _DATA_BYTES_MIN]
    return not any(end in beginning for end in _WORDS_END)
