"""The top-level members of a JSON object, read, set and taken out by their places in its bytes. Pure.

A body that is changed so stays as its client wrote it but for the members that are meant: numbers keep their
digits, strings their escapes, and no value is made of what is not changed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

from brproxy.engines.body import parsed
from brproxy.engines.rewrite import MEMBERS_MAX, Member, members, object_start, top_level

_ESCAPED_BYTES_MAX: Final = 6
"""Most bytes that one ASCII character of a key takes, written as an escape."""

_LIST_OF_SEVERAL = re.compile(rb'\[[ \t\r\n]*+["\[{]')

NAME_CHARACTERS_MAX = 64
"""Longest key that is told from others; longer ones are none that anybody asks for."""


class JsonObject:
    """An object in UTF-8 of fewer than MEMBERS_MAX members. Of several of one name the last counts."""

    __slots__ = ("_body", "_found", "_last", "_start")

    def __init__(self, body: bytes, start: int, found: list[Member]) -> None:
        self._body = body
        self._start = start + 1
        self._found = [
            (member.key if b"\\" not in member.key else _name(member.key), member) for member in found
        ]
        self._last = dict(self._found)

    def __contains__(self, name: str) -> bool:
        """Tell whether a member has this name."""
        return name.encode() in self._last

    @property
    def names(self) -> Collection[str]:
        """What its members are called; "" for a name that is none of those that are asked for."""
        return [name.decode("utf-8", "replace") for name in self._last]

    def value(self, name: str) -> bytes | None:
        """Return the value of a member as it is written, None where there is no such member."""
        member = self._last.get(name.encode())
        return None if member is None else self._body[member.start : member.end]

    def edited(self, values: Mapping[str, bytes], without: Collection[str] = ()) -> bytes:
        """Return the object with each of ``values`` as the only member of its name, and none of ``without``.

        Names are ASCII without quotes and backslashes, values JSON. All other members keep their bytes and
        their order; those that are set stand before them.
        """
        pieces: list[bytes | memoryview] = []
        body = memoryview(self._body)
        written = [(name.encode(), value) for name, value in values.items()]
        pieces.append(body[: self._start])
        pieces.append(b",".join([b'"%b":%b' % item for item in written]))
        dropped = {name for name, _ in written}.union([name.encode() for name in without])
        is_first = not values
        end = self._start
        for name, member in self._found:
            start, end = end, member.end
            if name in dropped:
                continue
            if start == self._start:
                # Only the first member of all has no comma before it.
                pieces.append(b"" if is_first else b",")
            elif is_first:
                start = self._body.index(b",", start) + 1
            pieces.append(body[start:end])
            is_first = False
        pieces.append(body[end:])
        return b"".join(pieces)


def read_object(body: bytes) -> JsonObject | None:
    """Return the object that ``body`` is, None if it is none, or has too many members to know all."""
    start, found = object_start(body), members(body)
    if start is None or found is None or len(found) >= MEMBERS_MAX:
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
