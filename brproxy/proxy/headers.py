"""Which headers cross the proxy (RFC 9110, section 7.6.1), and the request id."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from multidict import CIMultiDict, CIMultiDictProxy

REQUEST_ID = "X-Request-Id"

HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)

Headers = CIMultiDict[str]


def _end_to_end(headers: CIMultiDictProxy[str], also_dropped: Iterable[str] = ()) -> Headers:
    """Return the headers that may cross: all but hop-by-hop ones and those that Connection names."""
    dropped = HOP_BY_HOP.union(also_dropped)
    named = {
        token.strip().lower() for value in headers.getall("Connection", ()) for token in value.split(",")
    }
    return CIMultiDict(
        (k, v) for k, v in headers.items() if (low := k.lower()) not in dropped and low not in named
    )


def request_headers(headers: CIMultiDictProxy[str]) -> Headers:
    """Return what the worker gets of the client's headers.

    Host and Content-Length are the upstream connection's own, Expect has been answered by this proxy, and a
    request id is made where the client sent none.
    """
    crossing = _end_to_end(headers, also_dropped=("host", "content-length", "expect"))
    if not crossing.get(REQUEST_ID):
        crossing[REQUEST_ID] = uuid.uuid4().hex
    return crossing


def response_headers(headers: CIMultiDictProxy[str], request_id: str) -> Headers:
    """Return what the client gets of the worker's headers; the request id is added if it is missing."""
    crossing = _end_to_end(headers)
    crossing.setdefault(REQUEST_ID, request_id)
    return crossing
