"""Random exchanges over real sockets, directly and through the proxy: aiohttp's client must see the same.

    python -m tests.brproxy.proxy.differential --cases 20000 --seed 1 [--uvloop]

A worker gives the same bytes in the same pieces whoever asks. A response that breaks when it is fetched
directly must not look complete through the proxy. What may differ, and why, has a name (ALLOWED); the
command says how often each occurred. Failures name their seeds.
"""

import argparse
import asyncio
import logging
import socket
import struct
import sys
import time
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from contextvars import ContextVar
from functools import partial

import aiohttp
import uvloop
from aiohttp.client_proto import ResponseHandler
from yarl import URL

from brproxy.app import running_proxy
from brproxy.config import parse_config
from tests.brproxy.proxy.comparison import (
    ALLOWED,
    FRAMING,
    NOT_FORWARDED,
    Seen,
    compare,
    compare_requests,
    end_to_end,
)
from tests.brproxy.proxy.exchanges import Exchange

AT_ONCE = 16
LIMIT_S = 300.0
TAP = ContextVar("TAP")


class TappedHandler(ResponseHandler):
    """aiohttp's client protocol, which keeps the bytes: they have trailers, and what came before an error."""

    def set_response_params(self, **settings):
        self.tap = TAP.get()
        self.tap.clear()
        super().set_response_params(**settings)

    def data_received(self, data):
        self.tap += data
        super().data_received(data)

    def set_exception(self, exc, *cause):
        super().set_exception(exc, *cause)
        # Where a body's framing breaks aiohttp may leave its reader waiting for ever: only an end wakes it.
        if self._payload is not None and not self._payload.is_eof():
            self._payload.set_exception(aiohttp.ClientPayloadError(repr(exc)))
            self._payload.feed_eof()


class Worker:
    """Answers the exchange that a request's target names, and notes what it was asked."""

    def __init__(self):
        self.exchanges = {}
        self.asked = {}
        self._connections = {}

    async def handle(self, reader, writer):
        self._connections[writer] = asyncio.current_task()
        with suppress(OSError, asyncio.IncompleteReadError):
            while await self._serve(reader, writer):
                pass
        writer.close()
        del self._connections[writer]

    async def close(self):
        """End all connections, without a word."""
        tasks = list(self._connections.values())
        for writer in self._connections:
            writer.transport.abort()
        await asyncio.gather(*tasks)

    async def _serve(self, reader, writer):
        line, *lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[:-2]
        method, target, _ = line.split(b" ")
        fields = [tuple(line.split(b": ", 1)) for line in lines]
        known = {name.lower(): value for name, value in fields}
        if b"expect" in known:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = b""
        if known.get(b"transfer-encoding") == b"chunked":
            while size := int(await reader.readuntil(b"\r\n"), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readexactly(2)
        else:
            body = await reader.readexactly(int(known.get(b"content-length", 0)))
        number = int(target.rpartition(b"=")[2])
        self.asked[number].append((method, target, end_to_end(fields, NOT_FORWARDED | FRAMING), body))
        return await self._answer(self.exchanges[number], writer)

    async def _answer(self, exchange, writer):
        for piece in exchange.sends:
            if writer.is_closing():
                return False
            writer.write(piece)
            # Whoever reads gets it before the next one is there.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        if exchange.end == "reset" and not writer.is_closing():
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        return exchange.end == "keep"


class Bench:
    """A worker, two proxies in front of it, and clients."""

    def __init__(self, worker, session, url, proxies):
        self._worker = worker
        self._session = session
        self._url = url
        self._proxies = proxies
        self.allowed = Counter()
        self.failures = []

    async def run(self, seed):
        """Run one exchange, and note what differs."""
        exchange = Exchange(seed)
        asked = self._worker.asked[seed] = []
        self._worker.exchanges[seed] = exchange
        # What follows damage would spoil the next response on a kept connection, whoever keeps it.
        proxy = self._proxies[exchange.harm == "damage"]
        try:
            direct = await self._fetch(exchange, self._url, "direct")
            asked_directly = len(asked)
            proxied = await self._fetch(exchange, f"http://127.0.0.1:{proxy.port}", "proxied")
            compare_requests(exchange, asked[:asked_directly], asked[asked_directly:])
            allowed = compare(exchange, direct, proxied)
            self.allowed[allowed] += 1
        except (AssertionError, TimeoutError) as error:
            self.failures.append(f"seed {seed} ({exchange.harm or 'intact'}): {error!r}")
        finally:
            del self._worker.asked[seed], self._worker.exchanges[seed]

    async def _fetch(self, exchange, url, which):
        tap, body = bytearray(), bytearray()
        TAP.set(tap)
        fields = list(exchange.fields)
        if exchange.upload is not None and not exchange.uploads_chunked:
            fields.append(("Content-Length", str(sum(map(len, exchange.upload)))))
        status, reason, received = 0, "", ()
        failure = ""
        try:
            async with self._session[which, exchange.http10].request(
                exchange.method,
                URL(f"{url}{exchange.path}?case={exchange.seed}", encoded=True),
                headers=fields,
                data=None if exchange.upload is None else pieces(exchange.upload),
                expect100=exchange.expects,
                allow_redirects=False,
            ) as response:
                status, reason, received = response.status, response.reason, response.raw_headers
                async for piece in response.content.iter_any():
                    body += piece
                if error := response.content.exception():
                    raise error
        except aiohttp.ClientError as error:
            failure = repr(error)
        return Seen(status, reason, list(received), bytes(body), failure, bytes(tap))

    def check_idle(self):
        """Note load that is booked for no request."""
        for proxy in self._proxies.values():
            for group in proxy.service.fleet.groups:
                ledger, waiting = group.dispatcher.ledger, group.dispatcher.waiting
                if ledger.bound or len(waiting) or any(ledger.kv_tokens):
                    self.failures.append(f"not idle: {ledger.bound} bound, {len(waiting)} waiting")


async def pieces(parts):
    for part in parts:
        if part:
            yield part
        await asyncio.sleep(0)


@asynccontextmanager
async def running_bench():
    """Start everything, on 127.0.0.1 only."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        worker = Worker()
        stack.push_async_callback(worker.close)
        urls = []
        for _ in range(2):
            server = await asyncio.start_server(worker.handle, "127.0.0.1", 0, limit=1 << 20)
            stack.callback(server.close)
            urls.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        proxies = {}
        for is_damaged in (False, True):
            document = {
                "listen": {"port": 0},
                "health": {"enabled": False},
                "telemetry": {"enabled": False},
                "worker": [{"url": url} for url in urls],
                "limits": {"idle_connections_max": 0} if is_damaged else {},
            }
            config = parse_config(document, "differential")
            proxies[is_damaged] = await stack.enter_async_context(running_proxy(config))
        sessions = {}
        for which in ("direct", "proxied"):
            for http10 in (False, True):
                # The worker closes connections without saying so, which the proxy must not.
                connector = aiohttp.TCPConnector(force_close=which == "direct", limit=0)
                connector._factory = partial(TappedHandler, loop=loop)
                sessions[which, http10] = await stack.enter_async_context(
                    aiohttp.ClientSession(
                        connector=connector,
                        auto_decompress=False,
                        cookie_jar=aiohttp.DummyCookieJar(),
                        timeout=aiohttp.ClientTimeout(total=LIMIT_S),
                        version=aiohttp.HttpVersion10 if http10 else aiohttp.HttpVersion11,
                    )
                )
        yield Bench(worker, sessions, urls[0], proxies)


async def differ(seeds, report=lambda _done: None):
    """Run the exchanges of ``seeds``, some at once; return which differences were allowed, and failures."""
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(str(context)))
    numbered = enumerate(seeds, 1)

    async def run_some(bench):
        for number, seed in numbered:
            await bench.run(seed)
            if number % 100 == 0:
                report(number)

    async with running_bench() as bench:
        await asyncio.gather(*(run_some(bench) for _ in range(AT_ONCE)))
        bench.check_idle()
    return bench.allowed, bench.failures + complaints


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--uvloop", action="store_true")
    options = parser.parse_args()
    # Failed workers are what this is about: a line for each would be thousands.
    logging.disable(logging.WARNING)
    started_s = time.perf_counter()

    def report(done):
        rate = done / (time.perf_counter() - started_s)
        sys.stderr.write(f"\r{done:,} of {options.cases:,} cases, {rate:,.0f} a second")

    seeds = range(options.seed, options.seed + options.cases)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if options.uvloop else None) as runner:
        allowed, failures = runner.run(differ(seeds, report))
    for failure in failures:
        sys.stderr.write(f"\n{failure}\n")
    sys.stderr.write(f"\n{options.cases:,} cases from seed {options.seed}: {len(failures)} differ\n")
    for name, reason in ALLOWED.items():
        sys.stderr.write(f"{allowed[name]:7,} allowed, {name}: {reason}\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
