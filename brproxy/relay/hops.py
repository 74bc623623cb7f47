"""What a worker is told of the hops that a request has passed: X-Forwarded-For and -Proto, Via. Pure.

A client's connection has one address and one scheme, so what is added is put together once for each; a
request that names no hops itself, as most do, gets it as it is. What a client says of hops before it is kept
in front, and nobody checks it: there are no trusted proxies here.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv6Address, ip_address
from typing import Literal

FORWARDED_FOR, FORWARDED_PROTO, VIA = b"x-forwarded-for", b"x-forwarded-proto", b"via"

XForwarded = Literal["append", "replace", "off"]

# What else would tell a worker of hops that nobody has checked.
_UNCHECKED = frozenset({b"x-forwarded-host", b"x-forwarded-port", b"forwarded"})
_NAMES = {
    "append": frozenset({FORWARDED_FOR, FORWARDED_PROTO}),
    "replace": frozenset({FORWARDED_FOR, FORWARDED_PROTO}) | _UNCHECKED,
    "off": frozenset[bytes](),
}
_VIA = b"%b brproxy"


class Hops:
    """Makes the Hop of a connection, as configured.

    ``x_forwarded``: "append" keeps what a client says in front, "replace" does not, "off" adds nothing and
    lets all pass. ``via``: whether the proxy names itself. ``names`` are the fields, in lower case, that do
    not cross by themselves: what is to come of them is in a Hop's lines.
    """

    def __init__(self, x_forwarded: XForwarded, *, via: bool) -> None:
        self.x_forwarded: XForwarded = x_forwarded
        self.via = via
        self.names = _NAMES[x_forwarded] | ({VIA} if via else set())

    def of(self, host: str | None, *, is_tls: bool) -> Hop:
        """Return what is added for a client at ``host`` (None: nobody knows), which speaks HTTPS or not."""
        return Hop(self, _address(host), b"https" if is_tls else b"http")


class Hop:
    """What is added to the requests of one client connection; ``names`` as Hops has them.

    ``lines`` are for a request in HTTP/1.1 that has none of ``names``.
    """

    __slots__ = ("_hops", "_host", "_scheme", "lines", "names")

    def __init__(self, hops: Hops, host: bytes, scheme: bytes) -> None:
        self._hops = hops
        self._host = host
        self._scheme = scheme
        self.names = hops.names
        self.lines = self.behind({}, b"1.1")

    def behind(self, known: Mapping[bytes, bytes], version: bytes) -> bytes:
        """Return the lines for a request that came in HTTP/``version`` with the fields in ``known``."""
        lines = []
        if self._hops.x_forwarded != "off":
            keeps = self._hops.x_forwarded == "append"
            before = known.get(FORWARDED_FOR, b"") if keeps else b""
            scheme = known.get(FORWARDED_PROTO, b"") if keeps else b""
            lines.append(b"X-Forwarded-For: %b\r\n" % _listed(before, self._host))
            # The scheme of the first hop is what the client sees; of the others nobody asks.
            lines.append(b"X-Forwarded-Proto: %b\r\n" % (scheme or self._scheme))
        if self._hops.via:
            lines.append(b"Via: %b\r\n" % _listed(known.get(VIA, b""), _VIA % version))
        return b"".join(lines)


def _listed(before: bytes, own: bytes) -> bytes:
    """Return a list with one entry more."""
    before = before.strip(b", \t")
    return b"%b, %b" % (before, own) if before else own


def _address(host: str | None) -> bytes:
    """Return an address as others write it: no zone, which means something on this machine only."""
    try:
        address = ip_address((host or "").partition("%")[0])
    except ValueError:
        return b"unknown"
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address).encode()
