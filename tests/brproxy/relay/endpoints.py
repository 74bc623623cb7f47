"""A worker that answers, and pools of connections to it."""

import asyncio

import pytest

from brproxy.relay.connection import Exchange
from brproxy.relay.errors import WorkerFailedError

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


async def refusal(pool):
    """Return what connecting fails with."""
    with pytest.raises(WorkerFailedError) as caught:
        await asyncio.wait_for(pool.connect(), HANG_S)
    assert caught.value.unreachable, "it counts against the worker's health"
    return str(caught.value)
