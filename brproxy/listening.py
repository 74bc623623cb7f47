"""The sockets that clients connect to."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl

from aiohttp import web

from brproxy.config_sections import Listen
from brproxy.types import InvalidInputError


class ListenError(InvalidInputError):
    """The address or the certificate to listen with cannot be used."""


async def start_listening(runner: web.ServerRunner, listen: Listen) -> int:
    """Have ``runner``, which is set up, accept connections; return the port. Raises ListenError.

    uvloop (libuv from 1.45 on) accepts one connection for each listening descriptor and turn of the loop. A
    busy proxy has some forty turns a second, and clients would wait for seconds to be accepted: so every
    address is listened on by ``accepts_per_turn`` descriptors of one socket. asyncio's own loop accepts as
    many as may wait, before anybody hears of the first: it is told of one, the system of all.
    """
    context = _tls_context(listen)
    loop = asyncio.get_running_loop()
    try:
        # Finds the addresses of the host and binds to them, no more.
        bound = await loop.create_server(asyncio.Protocol, listen.host, listen.port, start_serving=False)
        try:
            for address in bound.sockets:
                for _ in range(listen.accepts_per_turn):
                    listener = socket.fromfd(address.fileno(), address.family, address.type)
                    await web.SockSite(runner, listener, backlog=1, ssl_context=context).start()
                    listener.listen(listen.backlog)
        finally:
            bound.close()
    except OSError as error:
        number = error.errno or 0
        # Of an address that no name server knows the number is not the system's.
        reason = os.strerror(number) if number > 0 else error.strerror
        advice = "; choose a free port" if number == errno.EADDRINUSE else ""
        msg = f"listen: cannot listen on {_authority(listen.host, listen.port)}: {reason}{advice}"
        raise ListenError(msg) from error
    port: int = runner.addresses[0][1]
    return port


def url_of(listen: Listen, port: int) -> str:
    """Return where clients find the proxy, which listens on ``port``."""
    scheme = "https" if listen.tls_certificate_file else "http"
    return f"{scheme}://{_authority(listen.host, port)}"


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
