"""The head of a request to a worker. Pure."""

from __future__ import annotations

from http import HTTPMethod
from urllib.parse import unquote

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
    # The host ends where any of these begins: a query may hold a path, and be the first of them.
    path_at = min((at for at in map(rest.find, "/?#") if at >= 0), default=len(rest))
    path = rest[path_at:].partition("#")[0]
    return path if path.startswith("/") else "/" + path


def path_of(target: str) -> str:
    """Return the path of an origin-form target, decoded."""
    return unquote(target.partition("?")[0])


def body_length(method: str, body: bytes | None) -> bytes:
    """Return the line that frames ``body``; without one, the methods that usually have one say 0."""
    if body is not None:
        return b"Content-Length: %d\r\n" % len(body)
    return b"Content-Length: 0\r\n" if method in _HAS_BODY else b""


UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
"""The lines that ask to go on as a WebSocket."""


def request_head(method: str, target: str, host: bytes, lines: bytes) -> bytes:
    """Return the head; ``host`` is the worker's host and port, ``lines`` are all other fields."""
    start = f"{method} {target} HTTP/1.1\r\nHost: ".encode("utf-8", "surrogateescape")
    return b"".join((start, host, b"\r\n", lines, b"\r\n"))
