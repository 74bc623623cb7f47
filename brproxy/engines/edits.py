"""The top-level members of a JSON object, read, set and taken out by their places in its bytes. Pure.

A body that is changed so stays as its client wrote it but for the members that are meant: numbers keep their
digits, strings their escapes, and no value is made of what is not changed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

from brproxy.engines.body import parsed
from brproxy.engines.rewrite import MEMBERS_MAX, Places, object_start, places, top_level

_ESCAPED_BYTES_MAX: Final = 6
"""Most bytes that one ASCII character of a key takes, written as an escape."""

_MEMBER: Final = b'"%b":%b'

_LIST_OF_SEVERAL = re.compile(rb'\[[ \t\r\n]*+["\[{]')

NAME_CHARACTERS_MAX = 64
"""Longest key that is told from others; longer ones are none that anybody asks for."""


class JsonObject:
    """The object in UTF-8 that ``body`` is, of fewer than MEMBERS_MAX members.

    Of several of one name the last counts.
    """

    __slots__ = ("_last", "_names", "_spans", "_start", "body")

    def __init__(self, body: bytes, start: int, found: Places) -> None:
        self.body = body
        self._start = start + 1
        self._names, self._spans = found
        if b"\\" in b"".join(self._names):
            self._names = [name if b"\\" not in name else _name(name) for name in self._names]
        self._last = dict(zip(self._names, self._spans, strict=True))

    def __contains__(self, name: str) -> bool:
        """Tell whether a member has this name."""
        return name.encode() in self._last

    @property
    def names(self) -> Collection[str]:
        """What its members are called; "" for a name that is none of those that are asked for."""
        return [name.decode("utf-8", "replace") for name in self._last]

    def has_none_of(self, names: frozenset[bytes]) -> bool:
        """Tell whether no member has one of ``names`` (ASCII)."""
        return names.isdisjoint(self._last)

    def value(self, name: str) -> bytes | None:
        """Return the value of a member as it is written, None where there is no such member."""
        span = self._last.get(name.encode())
        return None if span is None else self.body[span[0] : span[1]]

    def edited(self, values: Mapping[str, bytes], without: Collection[str] = ()) -> bytes:
        """Return the object with each of ``values`` as the only member of its name, and none of ``without``.

        Names are ASCII without quotes and backslashes, values JSON. All other members keep their bytes and
        their order; those that are set stand before them.
        """
        written = list(map(str.encode, values))
        dropped = {*written, *map(str.encode, without)}
        body, spans, end = memoryview(self.body), self._spans, self._start
        new = b",".join(map(_MEMBER.__mod__, zip(written, values.values(), strict=True)))
        pieces: list[bytes | memoryview] = [body[:end], new]
        if dropped.isdisjoint(self._last):
            # As for most decode legs.
            pieces += (b"," if new and spans else b"", body[end:])
            return b"".join(pieces)
        leaving = [at for at, name in enumerate(self._names) if name in dropped]
        # Those that stay are copied in runs, each from behind the one before it: mostly few are dropped.
        is_first, first = not written, 0
        for at in (*leaving, len(spans)):
            if at > first:
                start = spans[first - 1][1] if first else end
                if not first:
                    # Only the first member of all has no comma before it.
                    pieces.append(b"" if is_first else b",")
                elif is_first:
                    start = self.body.index(b",", start) + 1
                pieces.append(body[start : spans[at - 1][1]])
                is_first = False
            first = at + 1
        pieces.append(body[spans[-1][1] :])
        return b"".join(pieces)


def read_object(body: bytes) -> JsonObject | None:
    """Return the object that ``body`` is, None if it is none, or has too many members to know all."""
    start = object_start(body)
    found = None if start is None else places(body, start)
    if start is None or found is None or len(found[0]) >= MEMBERS_MAX:
        return None
    return JsonObject(body, start, found)


def _name(key: bytes) -> bytes:
    """Return what a key with escapes says; nothing for one that is none of those that are asked for."""
    if len(key) > _ESCAPED_BYTES_MAX * NAME_CHARACTERS_MAX:
        return b""
    name = parsed(b'"' + key + b'"')
    return name.encode("utf-8", "replace") if type(name) is str else b""


def elements(value: bytes, most: int) -> int | None:
    """Return how many strings or lists the list ``value`` holds, counted to ``most``; None for anything else.

    A list of numbers is token ids: one thing.
    """
    if _LIST_OF_SEVERAL.match(value) is None:
        return None
    count = 0
    for _, character in top_level(value, 0):
        count += character != b":"
        if count == most:
            break
    return count
