"""The connections to one worker over real sockets: which one is used again, and which is closed."""

import asyncio
import resource
import socket

import pytest

from brproxy.relay.endpoint import Endpoint, EndpointSettings, Reach
from brproxy.relay.errors import ShortageError, WorkerFailedError
from tests.brproxy.relay.endpoints import SETTINGS, ask, refusal

BOTH_LOOPS = True


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


async def test_close_closes_what_is_idle_at_once_and_what_is_busy_when_it_is_over(kept, until):
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


async def test_what_goes_to_a_worker_with_a_base_path_and_fields_of_its_own(stack):
    reach = Reach(((b"Authorization", b"Bearer k"), (b"X-A", b"1")))
    endpoint = Endpoint("http://w:1/base", EndpointSettings(**SETTINGS), reach)
    stack.callback(endpoint.close)
    assert not endpoint.is_plain
    assert endpoint.host_field == b"w:1\r\nAuthorization: Bearer k\r\nX-A: 1"
    lines = b"x-a: 2\r\nX-Ab: 3\r\nAUTHORIZATION: no\r\n"
    assert endpoint.adapted("/v1/x?/y", lines) == ("/base/v1/x?/y", b"X-Ab: 3\r\n")
    assert endpoint.adapted("*", b"") == ("*", b""), "the server as a whole"


@pytest.mark.parametrize(
    ("origin", "reach", "is_plain"),
    [
        ("http://w:1", Reach(), True),
        ("http://w:1/b", Reach(), False),
        ("http://w:1", Reach(((b"X", b"y"),)), False),
    ],
)
async def test_who_gets_requests_as_they_are(origin, reach, is_plain, stack):
    endpoint = Endpoint(origin, EndpointSettings(**SETTINGS), reach)
    stack.callback(endpoint.close)
    assert endpoint.is_plain is is_plain
