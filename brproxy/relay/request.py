"""The head of a request to a worker. Pure."""

from __future__ import annotations

from http import HTTPMethod

from brproxy.relay.fields import Fields
from brproxy.types import InvalidInputError

CHUNKED = b"Transfer-Encoding: chunked\r\n"
_HAS_BODY = frozenset({HTTPMethod.POST, HTTPMethod.PUT, HTTPMethod.PATCH})


def origin_form(target: str) -> str:
    """Return a request target as an origin server wants it (RFC 9112, section 3.2).

    A client may name the proxy's host in it as well. Raises InvalidInputError for a target that is no path.
    """
    if target.startswith("/") or target == "*":
        return target
    scheme, separator, rest = target.partition("://")
    if not separator or scheme.lower() not in {"http", "https"}:
        msg = f"the request target {target[:80]!r} is no path"
        raise InvalidInputError(msg)
    slash = rest.find("/")
    return "/" if slash < 0 else rest[slash:]


def body_length(method: str, body: bytes | None) -> bytes:
    """Return the line that frames ``body``; without one, the methods that usually have one say 0."""
    if body is not None:
        return b"Content-Length: %d\r\n" % len(body)
    return b"Content-Length: 0\r\n" if method in _HAS_BODY else b""


def upgrade_lines(fields: Fields) -> bytes:
    """Return the lines that ask to go on in the protocol that the client named."""
    return b"Connection: Upgrade\r\nUpgrade: %b\r\n" % fields.known.get(b"upgrade", b"")


def request_head(method: str, target: str, host: bytes, lines: bytes) -> bytes:
    """Return the head; ``host`` is the worker's host and port, ``lines`` are all other fields."""
    start = f"{method} {target} HTTP/1.1\r\nHost: ".encode("utf-8", "surrogateescape")
    return b"%b%b\r\n%b\r\n" % (start, host, lines)
