"""Where a worker listens: "http://host:port" read once, for whoever checks, connects or names it. Pure.

A worker behind a gateway may have a base path as well: all its paths begin with that.
"""

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
_BASE_CHARS_MAX = 1024
# Of a path (RFC 3986, section 3.3), without empty segments.
_SEGMENT = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})+")
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


class WorkerUrl(NamedTuple):
    """A worker's origin, and its base path: "" or "/base", without a slash behind it."""

    origin: Origin
    base: str

    def __str__(self) -> str:
        """Return the whole as it is written, "http://host:port/base"."""
        return self.origin.url + self.base


def read_worker_url(url: str) -> WorkerUrl:
    """Read ``url``, "http://host:port" or "http://host:port/base"; raises InvalidInputError."""
    scheme, separator, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    if "?" in authority or "#" in authority:
        slash = path = ""
    else:
        rest = authority
    origin = read_origin(scheme + separator + rest)
    base = (slash + path).rstrip("/")
    segments = base.split("/")[1:]
    if any(segment in {".", ".."} or not _SEGMENT.fullmatch(segment) for segment in segments):
        msg = 'must be like "http://host:port/base", with a plain path and no query'
        raise InvalidInputError(msg)
    if len(base) > _BASE_CHARS_MAX:
        msg = f"has a path of {len(base)} characters; at most {_BASE_CHARS_MAX} are allowed"
        raise InvalidInputError(msg)
    if segments and segments[-1] == "v1":
        msg = 'must not end in "/v1", with which the paths of requests begin'
        raise InvalidInputError(msg)
    return WorkerUrl(origin, base)


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
