"""The client's side of the relay on a real socket, without a proxy behind it."""

import asyncio

import pytest

from brproxy.relay.endpoint import Endpoint, EndpointSettings
from brproxy.relay.server import RelayServer
from tests.brproxy.relay.endpoints import SETTINGS, Worker
from tests.brproxy.wire import RawClient, WireError


@pytest.fixture
async def serve(stack):
    """Return a function that serves a handler and returns how to connect; no loop may have complained."""
    complaints = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))

    async def start(handler, body_bytes_max=1 << 20, **settings):
        relay = RelayServer(handler, body_bytes_max, access_log=None, auto_decompress=False, **settings)
        server = await loop.create_server(relay, "127.0.0.1", 0)
        stack.push_async_callback(relay.shutdown, 0.1)
        stack.callback(server.close)

        async def connect(**settings):
            client = await RawClient.connect(server.sockets[0].getsockname()[1], **settings)
            stack.callback(client.writer.close)
            return client

        return connect

    yield start
    assert not complaints


@pytest.fixture
def within():
    """Return a function that waits for something, and fails with a sentence when it does not come."""

    async def wait(awaitable, otherwise):
        try:
            return await asyncio.wait_for(awaitable, 60.0)
        except (TimeoutError, WireError, AssertionError, ConnectionError) as error:
            pytest.fail(f"{otherwise} ({error!r})")

    return wait


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
