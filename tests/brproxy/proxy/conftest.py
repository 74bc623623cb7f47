"""Workers and clients that speak HTTP byte by byte."""

import asyncio
import socket

import pytest

from brproxy.proxy.commented import Comments
from brproxy.relay.connection import WorkerConnection
from brproxy.relay.server import ClientProtocol
from tests.brproxy.proxy.waiting_clients import IN_TURN
from tests.brproxy.wire import RawClient


@pytest.fixture
async def raw(stack):
    """Return a function that connects a RawClient to a proxy; at the end no loop may have complained."""
    complaints = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))

    async def connect(proxy, **settings):
        client = await RawClient.connect(proxy.running.port, **settings)
        stack.callback(client.writer.close)
        return client

    yield connect
    assert not complaints


class RawWorker:
    """A worker whose connections are handed to ``script(worker, reader, writer)``; it notes how they end."""

    def __init__(self, script):
        self._script = script
        self.tasks = []
        self.requests = []
        self.ended = 0
        self.url = ""

    async def handle(self, reader, writer):
        self.tasks.append(asyncio.current_task())
        try:
            await self._script(self, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.ended += 1
            writer.close()

    async def read_head(self, reader):
        """Read a request's head, note it and return its length, 0 without one."""
        head = await reader.readuntil(b"\r\n\r\n")
        self.requests.append(head)
        _, found, rest = head.lower().partition(b"\r\ncontent-length:")
        return int(rest.partition(b"\r\n")[0]) if found else 0

    async def read_request(self, reader):
        """Read a request with a Content-Length, or without a body, and return its body."""
        return await reader.readexactly(await self.read_head(reader))

    async def read_chunks(self, reader):
        """Read a chunked request and return its body."""
        await self.read_head(reader)
        body = b""
        while size := int((await reader.readuntil(b"\n")).partition(b";")[0], 16):
            body += await reader.readexactly(size)
            assert await reader.readexactly(2) == b"\r\n"
        while await reader.readuntil(b"\n") != b"\r\n":
            pass
        return body


@pytest.fixture
async def raw_worker(stack):
    """Return a function that starts a RawWorker."""

    async def start(script, **settings):
        worker = RawWorker(script)
        server = await asyncio.start_server(worker.handle, "127.0.0.1", 0, **settings)
        worker.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        server_close = server.close

        async def close():
            server_close()
            for task in worker.tasks:
                task.cancel()
            await asyncio.gather(*worker.tasks, return_exceptions=True)

        stack.push_async_callback(close)
        return worker

    return start


@pytest.fixture
def answering():
    """Return a script for raw_worker: the requests on a connection are answered with ``answers``."""

    def make(*answers, close=False):
        async def script(worker, reader, writer):
            for answer in answers:
                await worker.read_request(reader)
                writer.write(answer)
            if not close:
                await reader.read()

        return script

    return make


@pytest.fixture
def transports(monkeypatch):
    """Return the proxy's transports to clients and to workers, by the class of their protocol.

    The kernel holds a MiB or so of what each has not read: without a word it would hold as much as it
    thinks that this machine can read, which may be tens of them.
    """
    made = {ClientProtocol: [], WorkerConnection: []}
    for protocol, found in made.items():
        original = protocol.connection_made

        def connection_made(self, transport, original=original, found=found):
            found.append(transport)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            original(self, transport)

        monkeypatch.setattr(protocol, "connection_made", connection_made)
    return made


@pytest.fixture
def commented(monkeypatch):
    """Return what would comment, as it begins to."""
    found = []
    comment_later = Comments._comment_later

    def noting(self):
        comment_later(self)
        if self not in found:
            found.append(self)

    monkeypatch.setattr(Comments, "_comment_later", noting)
    return found


@pytest.fixture
def start_commented(raw_worker, start_proxy):
    async def start_commented(*scripts, **tables):
        workers = [await raw_worker(script) for script in scripts]
        return await start_proxy([worker.url for worker in workers], **IN_TURN | tables), workers

    return start_commented
