"""Event loops and real sockets: emulated and scripted workers, and a proxy in front of them."""

import asyncio
from contextlib import AsyncExitStack

import aiohttp
import pytest
import uvloop

from brproxy.app import running_proxy
from brproxy.config import parse_config
from loadgen.cluster import ClusterSettings
from loadgen.emulator.server import EmulatorSettings, running_emulator

HANG_S = 60.0
"""What takes longer hangs (seconds); less than the time-outs below, so that none of them brings it about."""
PATIENT = {"connect_s": 600, "first_byte_s": 600, "stall_s": 600, "keepalive_s": 600}


def pytest_asyncio_loop_factories(config, item):
    """Run the tests of a module that sets BOTH_LOOPS on uvloop as well, which differs in awkward moments."""
    if getattr(item.module, "BOTH_LOOPS", False):
        return {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.SelectorEventLoop}


@pytest.fixture
async def stack():
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def client(stack):
    """Return an HTTP client that neither reuses connections nor hides anything."""
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    return await stack.enter_async_context(aiohttp.ClientSession(connector=connector, auto_decompress=False))


@pytest.fixture
def start_emulator(stack):
    async def start(workers=2, slots=8, speed=20.0, **settings):
        cluster = ClusterSettings(workers=workers, slots=slots, step_base_s=settings.pop("step_base_s", 0.02))
        return await stack.enter_async_context(
            running_emulator(EmulatorSettings(cluster, speed=speed, **settings))
        )

    return start


class Proxy:
    """A running proxy, and what tests want to know of it."""

    def __init__(self, running):
        self.running = running
        self.url = f"http://127.0.0.1:{running.port}"

    @property
    def groups(self):
        return self.running.service.fleet.groups

    @property
    def ledger(self):
        return self.groups[0].dispatcher.ledger

    @property
    def waiting(self):
        return len(self.groups[0].dispatcher.waiting)

    async def idle(self):
        """Wait until nothing is booked anywhere; fails by timeout if that never comes."""
        await until(
            lambda: not any(g.dispatcher.ledger.bound + len(g.dispatcher.waiting) for g in self.groups)
        )
        for group in self.groups:
            assert not any(group.dispatcher.ledger.kv_tokens)
            assert not any(group.dispatcher.ledger.requests)


async def until(condition):
    """Wait for a condition; it takes as long as it takes, and only what never comes fails."""
    async with asyncio.timeout(HANG_S):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture(name="until")
def until_fixture():
    return until


async def settled(value, turns=100):
    """Wait until ``value()`` stays the same for so many turns of the loop, and return it.

    Whoever could change it lives in this loop too: a slow machine makes the turns longer, not fewer.
    """
    last, same = value(), 0
    while same < turns:
        await asyncio.sleep(0.001)
        now = value()
        last, same = now, same + 1 if now == last else 0
    return last


@pytest.fixture(name="settled")
def settled_fixture():
    return settled


@pytest.fixture
def start_proxy(stack):
    async def start(urls, *, health=False, worker=None, health_table=None, workers=None, **tables):
        document = {
            "listen": {"port": 0},
            # Only where a test is about it: it would ask scripted workers what they do not expect.
            "telemetry": {"enabled": False},
            "discovery": {"enabled": False},
            "health": {"enabled": health, "interval_s": 0.05, "timeout_s": HANG_S} | (health_table or {}),
            "worker": workers or [{"url": url} | (worker or {}) for url in urls],
        }
        document |= tables
        # Of the time-outs only those pass that a test is about: a slow machine is no slow worker.
        document["timeouts"] = PATIENT | document.get("timeouts", {})
        document["limits"] = {"pool_wait_s_max": 600} | document.get("limits", {})
        return Proxy(await stack.enter_async_context(running_proxy(parse_config(document, "test"))))

    return start


class ScriptedWorker:
    """A raw TCP worker: plays what its script writes, notes what it received and when clients left."""

    def __init__(self, script):
        self.script = script
        self.requests = []
        self.left = asyncio.Event()
        self.connections = 0
        self.url = ""

    async def handle(self, reader, writer):
        self.connections += 1
        try:
            while await self.serve_one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            self.left.set()
        finally:
            writer.close()

    async def serve_one(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        line, *fields = head.decode("latin-1").split("\r\n")[:-2]
        headers = {name.lower(): value.strip() for name, _, value in (f.partition(":") for f in fields)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.requests.append((line, headers, body))
        script = asyncio.create_task(self.script(writer))
        gone = asyncio.create_task(reader.read(1))
        await asyncio.wait((script, gone), return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            script.cancel()
            self.left.set()
            return False
        gone.cancel()
        await asyncio.wait((gone,))
        return await script


@pytest.fixture
def start_worker(stack):
    """Return a function that starts a worker; its script returns whether the connection is kept."""

    async def start(script):
        worker = ScriptedWorker(script)
        server = await asyncio.start_server(worker.handle, "127.0.0.1", 0)
        stack.push_async_callback(server.wait_closed)
        stack.callback(server.close)
        worker.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return worker

    return start


@pytest.fixture
def answer():
    """Return a function that makes a script from raw bytes: sent at once, then the connection is closed."""

    def make(*parts, keep=False, pause_s=0.0):
        async def script(writer):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause_s)
            return keep

        return script

    return make


@pytest.fixture
def silence():
    """Return a script that writes what it is given and then nothing, for ever."""

    def make(*parts):
        async def script(writer):
            for part in parts:
                writer.write(part)
            await writer.drain()
            await asyncio.Event().wait()

        return script

    return make


@pytest.fixture
def reset():
    """Return a script that writes what it is given and resets the connection."""

    def make(*parts):
        async def script(writer):
            for part in parts:
                writer.write(part)
            await writer.drain()
            if parts:
                await asyncio.sleep(0.02)
            writer.transport.abort()
            return False

        return script

    return make


@pytest.fixture
def chunked():
    """Return a function that frames a response with chunked encoding, one chunk for each part."""

    def make(*parts, status="200 OK", content_type="text/event-stream", headers="", end=True):
        framing = "Transfer-Encoding: chunked"
        head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n{framing}\r\n{headers}\r\n"
        body = [b"%x\r\n%s\r\n" % (len(part), part) for part in parts]
        return [head.encode(), *body, *([b"0\r\n\r\n"] if end else [])]

    return make


@pytest.fixture
def fixed():
    """Return a function that frames a response with Content-Length."""

    def make(body, status="200 OK", content_type="application/json", headers=""):
        framing = f"Content-Length: {len(body)}"
        head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n{framing}\r\n{headers}\r\n"
        return head.encode() + body

    return make
