"""Which header fields cross the proxy (RFC 9110, section 7.6.1), as the bytes that came. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

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

# Host and Content-Length are the upstream connection's own; Expect has been answered by this proxy.
_NOT_TO_WORKERS = HOP_BY_HOP | {b"host", b"content-length", b"expect", b"trailer"}
# Content-Length goes with the framing that the client gets.
_NOT_TO_CLIENTS = HOP_BY_HOP | {b"content-length"}


class Fields(NamedTuple):
    """Header fields: ``lines`` are those that cross, ready to be sent; ``known`` all, by lower-case name.

    Of a field that came several times ``known`` has the last.
    """

    lines: bytes
    known: dict[bytes, bytes]


def request_fields(fields: Iterable[tuple[bytes, bytes]]) -> Fields:
    """Return what a worker gets of a client's header fields."""
    return _crossing(fields, _NOT_TO_WORKERS)


def response_fields(fields: Iterable[tuple[bytes, bytes]]) -> Fields:
    """Return what a client gets of a worker's header fields, Content-Length apart."""
    return _crossing(fields, _NOT_TO_CLIENTS)


def _crossing(fields: Iterable[tuple[bytes, bytes]], dropped: frozenset[bytes]) -> Fields:
    known: dict[bytes, bytes] = {}
    lines: list[bytes] = []
    named: set[bytes] = set()
    for name, value in fields:
        low = name.lower()
        known[low] = value
        if low not in dropped:
            lines.append(b"%b: %b\r\n" % (name, value))
        elif low == b"connection":
            named.update(token.strip().lower() for token in value.split(b","))
    if named - dropped - {b"close"}:
        # Rare: fields that only concern this connection, named by it.
        lines = [line for line in lines if line.partition(b":")[0].lower() not in named]
    return Fields(b"".join(lines), known)


def crossing_pairs(fields: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return what a worker gets of a client's header fields as text, for an HTTP client that wants that."""
    lines = request_fields(fields).lines.decode("utf-8", "surrogateescape").split("\r\n")[:-1]
    return dict(line.split(": ", 1) for line in lines)
