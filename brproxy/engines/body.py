"""A request's JSON body as an object, for work that a client cannot make large. Pure, and never raises.

Ordinary bodies are parsed. One that could hold more values than is good for everybody else who waits is
scanned instead: its small members are parsed one by one, and where the large ones are is told. What engines'
own JSON takes and the fast parser does not (lone surrogates, NaN, a byte order mark, UTF-16) is read by
Python's, which is theirs.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import orjson

from brproxy.engines.rewrite import Member, members

PARSED_BYTES_MAX = 1 << 16
"""Bodies up to here are parsed without a look at them: at worst, empty lists, 4 ms and 2 MB."""

VALUES_MAX = 1 << 17
"""Most values that a larger body may hold to be parsed: at worst 15 ms and 8 MB. Text counts its commas."""

SLOW_BYTES_MAX = 1 << 20
"""Most that is read by the slow parser: some ms. Longer bodies that need it are scanned."""

_MEMBER_BYTES_MAX = 1 << 12
"""Members of a scanned body up to here are parsed: numbers, names, options. And of all of them together:"""
_MEMBERS_BYTES_MAX = 1 << 16

_NOT_JSON = "The request body is not valid JSON"
_EMPTY = "The request body is empty."
_NO_OBJECT = "The request body must be a JSON object."


class JsonBody(NamedTuple):
    """``document`` holds what was parsed. ``large``: members that were not, by their place in the body.

    ``malformed`` says in one line what is wrong with a body that is no JSON object, "" if nothing is.
    ``is_utf8``: bytes may be inserted into it.
    """

    document: dict[str, Any]
    large: tuple[Member, ...] = ()
    malformed: str = ""
    is_utf8: bool = True


def read_json(body: bytes) -> JsonBody:
    """Return what ``body`` holds."""
    if len(body) > PARSED_BYTES_MAX and _values_at_most(body) > VALUES_MAX:
        return _scanned(body)
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return _read_slowly(body)
    return JsonBody(document) if type(document) is dict else JsonBody({}, malformed=_NO_OBJECT)


def _values_at_most(body: bytes) -> int:
    return body.count(b",") + body.count(b"[") + body.count(b"{")


def _read_slowly(body: bytes) -> JsonBody:
    if not body:
        return JsonBody({}, malformed=_EMPTY)
    if len(body) > SLOW_BYTES_MAX:
        return _scanned(body)
    try:
        document = json.loads(body)
    except RecursionError:
        return _scanned(body)
    except ValueError as error:
        return JsonBody({}, malformed=f"{_NOT_JSON}: {_reason(error)}.")
    if type(document) is not dict:
        return JsonBody({}, malformed=_NO_OBJECT)
    return JsonBody(document, is_utf8=json.detect_encoding(body).startswith("utf-8"))


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at line {error.lineno}, column {error.colno}"
    # Of the others the text may hold the body itself.
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else "a number is too long"


def _scanned(body: bytes) -> JsonBody:
    found = members(body)
    if found is None:
        return JsonBody({}, malformed=f"{_NOT_JSON}.")
    document: dict[str, Any] = {}
    large: dict[str, Member] = {}
    bytes_left = _MEMBERS_BYTES_MAX
    for member in found:
        key = parsed(b'"' + member.key + b'"')
        if type(key) is not str:
            continue
        # Of members with one name the last counts, as with every parser.
        document.pop(key, None)
        large.pop(key, None)
        member_bytes = member.end - member.start
        if member_bytes > min(_MEMBER_BYTES_MAX, bytes_left):
            large[key] = Member(key.encode("utf-8", "replace"), member.start, member.end)
        else:
            bytes_left -= member_bytes
            document[key] = parsed(body[member.start : member.end])
    return JsonBody(document, tuple(large.values()))


def parsed(value: bytes) -> Any:
    """Return a JSON value of bounded length, None if it is none."""
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return None
