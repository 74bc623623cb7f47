"""Where a worker listens: "http://host:port" read once, for whoever checks, connects or names it. Pure."""

from __future__ import annotations

import re
from ipaddress import IPv6Address
from typing import NamedTuple
from urllib.parse import urlsplit

import idna

from brproxy.types import InvalidInputError

_LABEL_BYTES_MAX = 63
_NAME_BYTES_MAX = 253
# Underscores are no letters of host names, but names of containers and services have them.
_LABEL = re.compile(r"[0-9a-z_](?:[0-9a-z_-]*[0-9a-z_])?")
_PORTS = {"http": 80, "https": 443}


class Origin(NamedTuple):
    """An origin (RFC 6454): scheme, and the host as resolvers and certificates have it, in ASCII; TCP port.

    ``authority`` is host and port as the Host field has them, the port only where it was given; ``url`` is
    the whole as it is written, "http://host:port".
    """

    scheme: str
    host: str
    port: int
    authority: str
    url: str


def read_origin(url: str) -> Origin:
    """Read ``url``; raises InvalidInputError, whose text says what is wrong with it.

    A name in another script becomes what DNS has for it (IDNA 2008): every resolver takes that, and one that
    DNS cannot have is known before anybody connects.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme not in _PORTS or not parts.hostname or port == 0:
        msg = 'must be like "http://host:port"'
        raise InvalidInputError(msg)
    if parts.path not in {"", "/"} or parts.query or parts.fragment or "@" in parts.netloc:
        msg = 'must be only "http://host:port", without path, query or user'
        raise InvalidInputError(msg)
    is_address = parts.netloc.startswith("[")
    host = _address(parts.hostname) if is_address else _name(parts.hostname)
    written = f"[{host}]" if is_address else host
    end = "" if port is None else f":{port}"
    # The zone is this machine's own name for an interface.
    authority = f"[{host.partition('%')[0]}]{end}" if is_address else written + end
    url = f"{parts.scheme}://{written}{end}"
    return Origin(parts.scheme, host, port or _PORTS[parts.scheme], authority, url)


def _address(text: str) -> str:
    """Return the IPv6 address between brackets, its zone (RFC 4007) included."""
    try:
        return str(IPv6Address(text))
    except ValueError as error:
        msg = f"the host [{text}] is no IPv6 address"
        raise InvalidInputError(msg) from error


def _name(text: str) -> str:
    """Return a host's name, or its IPv4 address, in ASCII."""
    name = text
    if not text.isascii():
        try:
            name = idna.encode(text, uts46=True).decode("ascii")
        except (idna.IDNAError, UnicodeError) as error:
            msg = f"the host {text[:80]!r} is no name that DNS can have: {error}"
            raise InvalidInputError(msg) from error
    for label in name.removesuffix(".").split("."):
        if len(label) > _LABEL_BYTES_MAX:
            msg = f"the host's part {label[:16]!r}... has {len(label)} characters; DNS allows 63"
            raise InvalidInputError(msg)
        if not _LABEL.fullmatch(label):
            msg = f"the host {text[:80]!r} has the part {label!r}; letters, digits, - and _ are allowed"
            raise InvalidInputError(msg)
    if len(name) > _NAME_BYTES_MAX:
        msg = f"the host has {len(name)} characters; DNS allows {_NAME_BYTES_MAX}"
        raise InvalidInputError(msg)
    return name
