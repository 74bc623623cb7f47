"""The connections to one worker over real sockets: which one is used again, and which is closed."""

import asyncio
import resource
import socket
import ssl

import pytest
import trustme

from brproxy.relay.connection import Exchange
from brproxy.relay.endpoint import Endpoint, EndpointSettings
from brproxy.relay.errors import ShortageError, WorkerFailedError

BOTH_LOOPS = True
HANG_S = 60.0
SETTINGS = {"connect_s": HANG_S, "keepalive_s": 4.0, "idle_max": 8, "head_bytes_max": 4096}
ASK = b"GET / HTTP/1.1\r\nHost: w\r\n\r\n"


class Asking(Exchange):
    """An exchange that is done when its response is."""

    def __init__(self):
        super().__init__(bodiless=False)
        self.receive = lambda _piece: None
        self.outcome = asyncio.get_running_loop().create_future()

    def interim(self, head):
        raise AssertionError

    upgraded = worker_paused = worker_resumed = interim

    def head(self, head):
        pass

    def end(self, piece, trailers):
        self.outcome.set_result(piece)

    def lost(self, error):
        self.outcome.set_exception(error)

    def crashed(self, error):
        self.outcome.set_exception(error)


async def ask(connection):
    """Send a request on ``connection`` and return the body of the response."""
    exchange = Asking()
    connection.send(exchange, ASK)
    return await asyncio.wait_for(exchange.outcome, HANG_S)


class Worker:
    """Answers every request with the number of its connection."""

    def __init__(self):
        self.writers = []
        self.ended = []
        self.port = 0

    async def handle(self, reader, writer):
        number = len(self.writers)
        self.writers.append(writer)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % number)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.ended.append(number)
        finally:
            writer.close()


@pytest.fixture
async def start(stack):
    """Return a function that starts a worker."""

    async def make(host="127.0.0.1", tls=None):
        worker = Worker()
        server = await asyncio.start_server(worker.handle, host, 0, ssl=tls)
        stack.callback(server.close)
        worker.port = server.sockets[0].getsockname()[1]
        return worker

    return make


@pytest.fixture
async def pool_of(stack):
    """Return a function that makes the pool of an origin; what is idle at the end is closed."""

    def make(origin, **settings):
        pool = Endpoint(origin, EndpointSettings(**(SETTINGS | settings)))
        stack.callback(pool.close)
        return pool

    return make


@pytest.fixture
async def kept(start, pool_of):
    """Return a function that makes a worker and a pool; ``count`` connections answered, one after another."""

    async def make(count, **settings):
        worker = await start()
        pool = pool_of(f"http://127.0.0.1:{worker.port}", **settings)
        connections = [await pool.connect() for _ in range(count)]
        for number, connection in enumerate(connections):
            assert await ask(connection) == b"%d" % number
        return worker, pool, connections

    return make


async def test_the_most_recently_used_comes_first(kept):
    _, pool, connections = await kept(3)
    assert repr(pool).endswith(" idle=3>")
    taken = pool.take_idle()
    assert taken is connections[2]
    # Used again it is the most recent again.
    assert await ask(taken) == b"2"
    assert [pool.take_idle() for _ in range(4)] == [*reversed(connections), None]


async def test_a_connection_that_nobody_used_is_not_in_the_pool(kept):
    _, pool, _ = await kept(0)
    connection = await pool.connect()
    assert connection.is_idle
    assert pool.take_idle() is None
    connection.abandon()


async def test_a_connection_is_used_by_one_request_at_a_time(kept):
    _, pool, connections = await kept(1)
    waiting = asyncio.create_task(ask(pool.take_idle()))
    await asyncio.sleep(0)
    assert not connections[0].is_idle
    assert pool.take_idle() is None
    await waiting
    assert pool.take_idle() is connections[0]


@pytest.mark.parametrize("reset", [True, False])
async def test_what_the_worker_has_closed_is_skipped(reset, kept, until):
    worker, pool, connections = await kept(3)
    for number in (0, 2):
        writer = worker.writers[number]
        writer.transport.abort() if reset else writer.close()
    await until(lambda: not (connections[0].is_idle or connections[2].is_idle))
    assert repr(pool).endswith(" idle=1>")
    assert [pool.take_idle() for _ in range(2)] == [connections[1], None]


async def test_no_more_are_kept_than_may_be(kept, until):
    worker, pool, connections = await kept(4, idle_max=2)
    await until(lambda: worker.ended == [2, 3])
    assert [connection.is_idle for connection in connections] == [True, True, False, False]
    assert [pool.take_idle() for _ in range(3)] == [connections[1], connections[0], None]


async def test_what_was_idle_for_too_long_is_closed(kept, until):
    began_s = asyncio.get_running_loop().time()
    worker, pool, connections = await kept(3, keepalive_s=4.0)
    now_s = asyncio.get_running_loop().time()
    assert all(began_s <= connection.idle_since_s <= now_s for connection in connections)
    for connection, idle_s in zip(connections, (5.0, 4.5, 3.5), strict=True):
        connection.idle_since_s = now_s - idle_s
    pool.expire(now_s)
    await until(lambda: sorted(worker.ended) == [0, 1])
    assert [pool.take_idle() for _ in range(2)] == [connections[2], None]


async def test_what_the_worker_has_closed_makes_room_when_others_expire(kept, until):
    worker, pool, connections = await kept(2, idle_max=2)
    fresh = await pool.connect()
    worker.writers[0].close()
    await until(lambda: not connections[0].is_idle)
    pool.expire(asyncio.get_running_loop().time())
    assert await ask(fresh) == b"2"
    assert [pool.take_idle() for _ in range(3)] == [fresh, connections[1], None]


async def test_close_closes_what_is_idle_and_what_is_in_use_once_it_has_ended(kept, until):
    worker, pool, _ = await kept(3)
    busy = pool.take_idle()
    pool.close()
    await until(lambda: sorted(worker.ended) == [0, 1])
    assert pool.take_idle() is None
    assert await ask(busy) == b"2"
    await until(lambda: sorted(worker.ended) == [0, 1, 2])
    assert pool.take_idle() is None


@pytest.mark.parametrize(
    ("origin", "host_field", "address"),
    [
        ("http://w:8000", b"w:8000", ("w", 8000)),
        ("http://w", b"w", ("w", 80)),
        ("https://w", b"w", ("w", 443)),
        ("https://w:80", b"w:80", ("w", 80)),
        ("http://[::1]:8000", b"[::1]:8000", ("::1", 8000)),
    ],
)
async def test_what_an_origin_means(origin, host_field, address, pool_of):
    pool = pool_of(origin)
    assert (pool.host_field, pool._address) == (host_field, address)
    assert repr(pool) == f"<Endpoint {origin} idle=0>"


@pytest.mark.parametrize(("host", "name"), [("::1", "[::1]"), ("127.0.0.1", "localhost")])
async def test_addresses_of_both_kinds_and_names(host, name, start, pool_of):
    try:
        worker = await start(host)
    except OSError as error:
        pytest.skip(f"this machine does not listen on {host}: {error}")
    pool = pool_of(f"http://{name}:{worker.port}")
    assert await ask(await pool.connect()) == b"0"


async def refusal(pool):
    """Return what connecting fails with."""
    with pytest.raises(WorkerFailedError) as caught:
        await asyncio.wait_for(pool.connect(), HANG_S)
    assert caught.value.unreachable, "it counts against the worker's health"
    return str(caught.value)


async def test_open_files_that_have_run_out_say_nothing_about_a_worker(start, pool_of):
    worker = await start("127.0.0.1")
    pool = pool_of(f"http://127.0.0.1:{worker.port}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as sock:
        next_file = sock.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_file, hard))
    try:
        with pytest.raises(WorkerFailedError, match="Too many open files") as caught:
            await pool.connect()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert isinstance(caught.value, ShortageError)
    assert not caught.value.unreachable


async def test_idle_connections_give_way_when_files_run_out(start, stack):
    workers = [await start() for _ in range(2)]
    settings = EndpointSettings(**SETTINGS)
    first, second = (Endpoint(f"http://127.0.0.1:{worker.port}", settings) for worker in workers)
    alone = Endpoint(f"http://127.0.0.1:{workers[0].port}", EndpointSettings(**SETTINGS))
    for endpoint in (first, second, alone):
        stack.callback(endpoint.close)
    kept = [await first.connect() for _ in range(3)]
    for connection in kept:
        await ask(connection)
    busy = first.take_idle()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as sock:
        next_file = sock.fileno()
    stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_file, hard))
    with pytest.raises(ShortageError):
        await alone.connect()
    connection = await second.connect()
    stack.callback(connection.abandon)
    assert first.take_idle() is None
    assert busy.is_idle, "what has been taken is not idle"


async def test_a_worker_that_does_not_listen_refuses(pool_of):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        origin = f"http://127.0.0.1:{sock.getsockname()[1]}"
        assert await refusal(pool_of(origin)) == f"cannot connect to {origin}: Connection refused"


async def test_a_worker_that_does_not_accept_is_not_waited_for(pool_of):
    with socket.socket() as sock, socket.socket() as first, socket.socket() as second:
        sock.bind(("127.0.0.1", 0))
        sock.listen(0)
        for waiting in (first, second):
            # The kernel lets no more than these wait, and drops what asks beyond.
            waiting.setblocking(False)
            waiting.connect_ex(sock.getsockname())
        origin = f"http://127.0.0.1:{sock.getsockname()[1]}"
        assert await refusal(pool_of(origin, connect_s=0.05)) == f"cannot connect to {origin} in time"


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
