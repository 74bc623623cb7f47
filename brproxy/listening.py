"""The sockets that clients connect to."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import ssl
from collections.abc import Iterable
from typing import NamedTuple

from aiohttp import web

from brproxy.config_sections import Listen
from brproxy.types import InvalidInputError

log = logging.getLogger(__name__)

_ALL = ("0.0.0.0", "::")  # noqa: S104 - only where the configuration asks for it
_PORT_TRIES = 64
"""Ports that the system gives for one address until one is free on all others as well."""
# What binding says of an address that a name has and this machine has not.
_NOT_HERE = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})


class ListenError(InvalidInputError):
    """The address or the certificate to listen with cannot be used."""


class _Address(NamedTuple):
    """One address to listen on; ``may_be_missing``: its host has others, so the machine need not have it."""

    family: socket.AddressFamily
    host: str
    scope: tuple[int, ...]
    may_be_missing: bool


async def start_listening(runner: web.ServerRunner, listen: Listen) -> int:
    """Have ``runner``, which is set up, accept connections; return the port. Raises ListenError.

    The port is the same on all addresses. uvloop (libuv from 1.45 on) accepts one connection for each
    listening descriptor and turn of the loop. A busy proxy has some forty turns a second, and clients would
    wait for seconds to be accepted: so every address is listened on by ``accepts_per_turn`` descriptors of
    one socket. asyncio's own loop accepts as many as may wait, before anybody hears of the first: it is told
    of one, the system of all.
    """
    context = _tls_context(listen)
    bound = _bind_all(await _addresses(listen), listen)
    try:
        for address in bound:
            for _ in range(listen.accepts_per_turn):
                listener = socket.fromfd(address.fileno(), address.family, address.type)
                await web.SockSite(runner, listener, backlog=1, ssl_context=context).start()
                listener.listen(listen.backlog)
    except OSError as error:
        raise _error(listen.hosts[0], listen.port, error) from error
    finally:
        _close(bound)
    port: int = runner.addresses[0][1]
    return port


def urls_of(listen: Listen, port: int) -> list[str]:
    """Return where clients find the proxy, which listens on ``port``."""
    scheme = "https" if listen.tls_certificate_file else "http"
    return [f"{scheme}://{_authority(host, port)}" for host in _hosts(listen)]


def _hosts(listen: Listen) -> list[str]:
    """Return the hosts, each once; what stands for all addresses as what that is in both families."""
    hosts = [one for host in listen.hosts for one in (_ALL if host in {"", "::"} else (host,))]
    return list(dict.fromkeys(hosts))


async def _addresses(listen: Listen) -> list[_Address]:
    """Return the addresses of all hosts; raises ListenError for a host that has none."""
    addresses: dict[tuple[str, tuple[int, ...]], _Address] = {}
    for host in _hosts(listen):
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except (OSError, ValueError) as error:
            raise _error(host, listen.port, error) from error
        # All addresses of a family are those that it has here, which may be none.
        lenient = len(found) > 1 or (host in _ALL and set(_ALL) <= set(_hosts(listen)))
        for family, _, _, _, (name, _, *scope) in found:
            address = _Address(family, str(name), tuple(scope), lenient)
            addresses.setdefault((address.host, address.scope[1:]), address)
    whole = {address.family for address in addresses.values() if address.host in _ALL}
    # One that is among all of its family would be listened on twice.
    return [one for one in addresses.values() if one.family not in whole or one.host in _ALL]


def _bind_all(addresses: list[_Address], listen: Listen) -> list[socket.socket]:
    """Return a socket for each address that the machine has, all on one port; raises ListenError."""
    tries_left = 0 if listen.port else _PORT_TRIES
    while True:
        try:
            return _bind_each(addresses, listen)
        except ListenError as error:
            # What the system gave for one address may be taken on another: it gives another one.
            is_taken = isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE
            if not (is_taken and tries_left):
                raise
            tries_left -= 1


def _bind_each(addresses: list[_Address], listen: Listen) -> list[socket.socket]:
    bound: list[socket.socket] = []
    missing: list[ListenError] = []
    port = listen.port
    try:
        for address in addresses:
            try:
                bound.append(_bind(address, port, listen.backlog))
            except OSError as error:
                missing.append(_error(address.host, port, error))
                if not (address.may_be_missing and error.errno in _NOT_HERE):
                    raise missing[-1] from error
            port = bound[-1].getsockname()[1] if bound else port
        if not bound:
            raise missing[0]
    except ListenError:
        _close(bound)
        raise
    for told in missing:
        log.warning("%s", told)
    return bound


def _bind(address: _Address, port: int, backlog: int) -> socket.socket:
    """Return a socket that listens, so that nobody else can; raises OSError."""
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.family == socket.AF_INET6:
            # IPv4 has a socket of its own, and clients the addresses that they have.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address.host, port, *address.scope))
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def _close(sockets: Iterable[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def _error(host: str, port: int, error: OSError | ValueError) -> ListenError:
    number = error.errno or 0 if isinstance(error, OSError) else 0
    # Of an address that no name server knows the number is not the system's; a name that DNS cannot have has
    # none at all.
    said = error.strerror if isinstance(error, OSError) else "no name that DNS can have"
    reason = os.strerror(number) if number > 0 else said
    advice = "; choose a free port" if number == errno.EADDRINUSE else ""
    return ListenError(f"listen: cannot listen on {_authority(host, port)}: {reason}{advice}")


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _tls_context(listen: Listen) -> ssl.SSLContext | None:
    """Return what HTTPS needs, None for plain HTTP; raises ListenError."""
    if not listen.tls_certificate_file:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(listen.tls_certificate_file, listen.tls_key_file or None)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or error
        chain = listen.tls_certificate_file
        msg = f"listen.tls_certificate_file: {chain!r} or its key cannot be used: {reason}"
        raise ListenError(msg) from error
    return context
