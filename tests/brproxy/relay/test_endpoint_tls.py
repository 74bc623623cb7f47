"""Endpoints that speak TLS: whom they trust, and what is said of whom they do not."""

import asyncio
import ssl

import pytest
import trustme

from brproxy.relay.endpoint import Endpoint, EndpointSettings, Reach
from brproxy.relay.errors import WorkerFailedError
from brproxy.relay.tls import TlsFileError, TlsFiles
from tests.brproxy.relay.endpoints import SETTINGS, ask, refusal

BOTH_LOOPS = True


@pytest.fixture
def authority():
    return trustme.CA()


@pytest.fixture
def server_tls(authority):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.fixture
def trusted(authority, tmp_path, monkeypatch):
    """Have this process trust the authority, as a deployment would."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))


@pytest.mark.usefixtures("trusted")
async def test_tls(start, pool_of, server_tls):
    worker = await start(tls=server_tls)
    pool = pool_of(f"https://127.0.0.1:{worker.port}")
    connection = await pool.connect()
    for _ in range(2):
        assert await ask(connection) == b"0"
        assert pool.take_idle() is connection
    connection.abandon()


@pytest.mark.usefixtures("trusted")
async def test_the_tls_context_is_made_once_and_not_by_a_request(start, server_tls, stack, monkeypatch):
    made = []
    original = ssl.create_default_context

    def create(*arguments, **keywords):
        made.append(arguments)
        return original(*arguments, **keywords)

    worker = await start(tls=server_tls)
    monkeypatch.setattr(ssl, "create_default_context", create)
    settings = EndpointSettings(**SETTINGS)
    Endpoint("http://127.0.0.1:1", settings)
    assert not made, "nobody speaks TLS"
    endpoints = [Endpoint(f"https://127.0.0.1:{worker.port}", settings) for _ in range(3)]
    assert len(made) == 1
    for endpoint in endpoints:
        for _ in range(2):
            stack.callback((await endpoint.connect()).abandon)
    assert len(made) == 1


async def test_a_certificate_that_nobody_vouches_for_is_named(start, pool_of, server_tls):
    worker = await start(tls=server_tls)
    origin = f"https://127.0.0.1:{worker.port}"
    told = await refusal(pool_of(origin))
    assert told.startswith(f"cannot connect to {origin}: ")
    assert "certificate verify failed" in told


@pytest.mark.usefixtures("trusted")
async def test_a_certificate_for_another_name_is_named(start, pool_of, server_tls):
    worker = await start(tls=server_tls)
    told = await refusal(pool_of(f"https://localhost:{worker.port}"))
    assert "certificate is not valid for 'localhost'" in told


async def test_tls_with_a_worker_that_speaks_none(start, pool_of):
    worker = await start()
    told = await refusal(pool_of(f"https://127.0.0.1:{worker.port}", connect_s=0.05))
    assert told.endswith(" in time"), "it waits for the end of a request's head"


@pytest.mark.usefixtures("trusted")
async def test_a_worker_that_closes_at_once(pool_of, server_tls, stack):
    class Closing(asyncio.Protocol):
        def connection_made(self, transport):
            transport.write(b"nobody has asked")
            transport.close()

    # With TLS 1.2 the worker can speak last, so that this comes with the end of the handshake.
    server_tls.maximum_version = ssl.TLSVersion.TLSv1_2
    server = await asyncio.get_running_loop().create_server(Closing, "127.0.0.1", 0, ssl=server_tls)
    stack.callback(server.close)
    origin = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    pool = pool_of(origin)
    with pytest.raises(WorkerFailedError) as caught:
        # uvloop reads only when the connection is handed out already; then the request on it fails.
        await ask(await pool.connect())
    assert type(caught.value) is WorkerFailedError, "a new connection is never stale"
    if isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop):
        assert str(caught.value) == f"{origin} closed the connection at once"
        assert caught.value.unreachable
    assert pool.take_idle() is None


@pytest.mark.parametrize("missing", ["authorities", "certificate"])
async def test_files_of_tls_that_cannot_be_used_are_named(missing):
    reach = Reach(tls=TlsFiles(**{missing: "/nowhere/x.pem"}))
    with pytest.raises(TlsFileError, match=r"^'/nowhere/x.pem' .*No such file or directory$") as caught:
        Endpoint("https://w:1", EndpointSettings(**SETTINGS), reach)
    assert caught.value.name == missing
