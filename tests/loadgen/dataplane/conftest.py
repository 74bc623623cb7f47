"""Mock workers in this process."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from loadgen.dataplane.worker import Connection, Engine


@pytest.fixture
async def stack():
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def serve(stack):
    """Return a function that serves a protocol on a free port and returns the port."""

    async def start(factory):
        server = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", 0)
        stack.callback(server.close)
        return server.sockets[0].getsockname()[1]

    return start


@pytest.fixture
async def worker(serve):
    """Return an engine, and the port of the worker whose streams it advances."""
    engine = Engine(asyncio.get_running_loop(), 0.0)
    return engine, await serve(lambda: Connection(engine))
