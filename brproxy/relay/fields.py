"""Which header fields cross the proxy (RFC 9110, section 7.6.1), as the bytes that came. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from brproxy.relay.hops import FORWARDED_FOR, FORWARDED_PROTO, VIA

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"transfer-encoding",
        b"upgrade",
    }
)
REQUEST_ID = b"x-request-id"
SESSION_ID = b"x-session-id"

NOT_IN_TRAILERS = HOP_BY_HOP | {
    b"authorization",
    b"cache-control",
    b"content-encoding",
    b"content-length",
    b"content-range",
    b"content-type",
    b"cookie",
    b"host",
    b"location",
    b"set-cookie",
    b"trailer",
    b"vary",
    b"www-authenticate",
}
"""Fields about framing, routing, authentication or the content, which no trailer section may bring in behind
the head's back (RFC 9110, section 6.5.1)."""

# Which of several workers behind one server it is: that is decided here, and by no client.
_RANKS = frozenset(
    {b"x-data-parallel-rank", b"x-override-routed-dp-rank", b"x-override-disagg-prefill-dp-rank"}
)
# Host and Content-Length are the upstream connection's own; Expect has been answered by this proxy, which
# decides on Accept-Encoding as well.
NOT_TO_WORKERS = HOP_BY_HOP | _RANKS | {b"accept-encoding", b"host", b"content-length", b"expect", b"trailer"}
"""Fields of a client that no worker gets."""

# Content-Length goes with the framing that the client gets.
_NOT_TO_CLIENTS = HOP_BY_HOP | {b"content-length"}
# Lists that may come in several fields, all of which count.
_OF_HOPS = frozenset({FORWARDED_FOR, FORWARDED_PROTO, VIA})
_LISTS = frozenset({b"accept-encoding", b"connection", b"transfer-encoding", b"upgrade"}) | _OF_HOPS
_ORDINARY = frozenset({b"keep-alive", b"close", b"upgrade"})
# What the proxy itself looks at, besides what it drops.
_LOOKED_AT = frozenset(
    {
        *(b"content-type", b"content-encoding", b"content-length", b"content-location", b"location"),
        *(REQUEST_ID, SESSION_ID),
    }
)


class Fields(NamedTuple):
    """Header fields: ``lines`` are those that cross, ready to be sent; ``known`` some, by lower-case name.

    Known are those that the proxy looks at, and what it drops. Of a field that came several times ``known``
    has the last, of those about the connection the whole list.
    """

    lines: bytes
    known: dict[bytes, bytes]

    @property
    def media_type(self) -> str:
        """The content type without parameters, in lower case; empty without one."""
        content_type = self.known.get(b"content-type", b"")
        # The usual one, as it comes.
        if content_type == b"application/json":
            return "application/json"
        return content_type.partition(b";")[0].strip().lower().decode("latin-1")


def not_to_workers(more: frozenset[bytes] = frozenset()) -> frozenset[bytes]:
    """Return the names, in lower case, of what a worker does not get of a client's, ``more`` among them."""
    return NOT_TO_WORKERS | more


def is_read_or_dropped(name: bytes) -> bool:
    """Tell whether a field of requests (in lower case) means something to the proxy, or is of the connection.

    Also those about the client and the content, which workers need as they are.
    """
    return name in NOT_TO_WORKERS | NOT_IN_TRAILERS | _LOOKED_AT | _OF_HOPS


def request_fields(
    fields: Sequence[tuple[bytes, bytes]], dropped: frozenset[bytes] = NOT_TO_WORKERS
) -> Fields:
    """Return what a worker gets of a client's header fields, without ``dropped`` (of ``not_to_workers``)."""
    return _crossing(fields, dropped)


def response_fields(fields: Sequence[tuple[bytes, bytes]]) -> Fields:
    """Return what a client gets of a worker's header fields, Content-Length apart."""
    return _crossing(fields, _NOT_TO_CLIENTS)


def _crossing(fields: Sequence[tuple[bytes, bytes]], dropped: frozenset[bytes]) -> Fields:
    known: dict[bytes, bytes] = {}
    parts: list[bytes] = []
    for name, value in fields:
        low = name.lower()
        if low not in dropped:
            parts += (name, b": ", value, b"\r\n")
            if low not in _LOOKED_AT:
                continue
        if low in _LISTS and low in known:
            known[low] += b"," + value
        else:
            known[low] = value
    connection = known.get(b"connection")
    if connection is not None and connection.lower() not in _ORDINARY:
        # Rare: fields that only concern this connection, named by it.
        named = {token.strip().lower() for token in connection.split(b",")} - {b"connection"}
        others = [(name, value) for name, value in fields if name.lower() not in named]
        if len(others) < len(fields):
            # What is told of hops goes on behind what came, so it is gone as well.
            left = {name: value for name, value in known.items() if name not in named & _OF_HOPS}
            return Fields(_crossing(others, dropped).lines, left)
    return Fields(b"".join(parts), known)


_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(rb"[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?")


def is_field(name: bytes, value: bytes) -> bool:
    """Tell whether this can be a header field (RFC 9110, section 5), with a value that is not empty."""
    return _NAME.fullmatch(name) is not None and _VALUE.fullmatch(value) is not None


def lines_named(names: Iterable[bytes]) -> re.Pattern[bytes]:
    """Return what finds header lines with one of ``names`` (at least one), whatever their case."""
    return re.compile(rb"(?im)^(?:%b):[^\n]*\n" % b"|".join(map(re.escape, names)))
