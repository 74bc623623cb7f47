"""The ordinary event of a stream, recognised without parsing it. Pure.

The events of one stream differ in nothing but the text that they carry: same id, same model, same keys. So an
event that was read exactly and carries plain output gives a pattern: everything before that text and
everything behind it. An event that begins and ends alike, with no quote in between, is the same JSON document
but for the content of one string, and says the same. Whatever differs in any other way is read exactly.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_TEXT = re.compile(rb'"(?:content|text|reasoning_content|reasoning)": ?"([^"\\]*)"')


class PlainEvent(NamedTuple):
    """``prefix`` and ``suffix`` around the text, the blank line included, and their lengths in bytes."""

    prefix: bytes
    prefix_bytes: int
    suffix: bytes
    suffix_bytes: int

    @classmethod
    def learn(cls, raw: bytes) -> PlainEvent | None:
        """Return the pattern of ``raw``, an event with its blank line; None if it has none."""
        found = _TEXT.search(raw)
        if found is None or not raw.endswith(b"\n\n"):
            return None
        start, end = found.span(1)
        return cls(raw[:start], start, raw[end:], len(raw) - end)

    def matches(self, raw: bytes) -> bool:
        """Tell whether ``raw`` is one event of this pattern."""
        middle_ends = len(raw) - self.suffix_bytes
        return (
            middle_ends >= self.prefix_bytes
            and raw.startswith(self.prefix)
            and raw.endswith(self.suffix)
            and raw.find(b'"', self.prefix_bytes, middle_ends) < 0
        )

    def count(self, raw: bytes) -> int:
        """Return how many events ``raw`` is, all of this pattern; 0 if anything else is in it."""
        if not raw.endswith(b"\n\n"):
            return 0
        if self.matches(raw):
            return 1
        events = raw[:-2].split(b"\n\n")
        return len(events) if all(self.matches(event + b"\n\n") for event in events) else 0
