"""The load client, a process of its own: ``python -m loadgen.dataplane.client SPEC``, both sides in JSON.

It spends as little as it can for each read, checks every answer, and reads the CPU time of proxy and workers
at the two ends of the measured part, in the same breath as its own counters.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import cast

import orjson
import uvloop

from loadgen.client import Failure
from loadgen.dataplane.check import AnswerCheck, PlainCheck, StreamCheck, Tally, WrongAnswerError
from loadgen.dataplane.cpu import CpuTime, peak_rss_bytes, read_cpu, spent_s
from loadgen.dataplane.loads import DRAIN_S_MAX, LoadResult, LoadSpec
from loadgen.report.schema import Percentiles
from loadgen.report.statistics import percentiles

RETRY_S = 0.05
"""Before a connection is opened again after a failure: a proxy that fails is not hammered."""

_PROMPT = " ".join(f"word{number:03}" for number in range(64))


def request_bytes(spec: LoadSpec) -> bytes:
    """Return the request that all connections of a load send."""
    document: dict[str, object] = {
        "model": spec.model,
        "messages": [{"role": "user", "content": _PROMPT}],
        "max_tokens": spec.phase.tokens,
    }
    if spec.phase.stream:
        document |= {"stream": True, "stream_options": {"include_usage": True}}
    body = orjson.dumps(document)
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\n"
        b"Content-Type: application/json\r\nAuthorization: Bearer sk-loadgen\r\nUser-Agent: loadgen\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )


@dataclass(frozen=True, slots=True)
class _Cut:
    """All that is counted, at one instant."""

    at_s: float
    proxy: CpuTime
    workers: CpuTime
    client: CpuTime
    reads: int
    first: int
    whole: int
    delays: int
    gaps: int


class Load:
    """One load on its way."""

    def __init__(self, spec: LoadSpec) -> None:
        self.spec = spec
        self.request = request_bytes(spec)
        self.tally = Tally()
        self.reads = 0
        self.stopping = False
        self._open: set[_Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._failures: Counter[str] = Counter()
        self._first_failure = ""

    def begin(self, connection: _Connection) -> AnswerCheck:
        """Note that a connection sends a request; returns what checks the answer."""
        self._open.add(connection)
        self._idle.clear()
        kind = StreamCheck if self.spec.phase.stream else PlainCheck
        return kind(self.spec.phase.tokens, self.tally, time.monotonic())

    def end(self, connection: _Connection) -> None:
        """Note that the request of a connection has ended."""
        self._open.discard(connection)
        if not self._open:
            self._idle.set()

    def failed(self, failure: Failure, detail: str) -> None:
        """Count a request that did not end as it should have."""
        self._first_failure = self._first_failure or f"{failure.value}: {detail}"
        self._failures[failure.value] += 1

    def connect(self, port: int) -> None:
        """Open a connection, which sends requests as soon as it stands."""
        if not self.stopping:
            task = asyncio.create_task(self._connect(port))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: _Connection(self, port), "127.0.0.1", port)
        except OSError as error:
            self.failed(Failure.CONNECT, str(error))
            self.retry(port)

    def retry(self, port: int) -> None:
        """Open a connection in place of one that failed, in a moment; not for what is sent once."""
        if not self.spec.phase.once:
            asyncio.get_running_loop().call_later(RETRY_S, self.connect, port)

    async def run(self) -> LoadResult:
        """Load, measure, let what runs finish."""
        loop, phase = asyncio.get_running_loop(), self.spec.phase
        ports, started_s = self.spec.ports, loop.time()
        for i in range(phase.connections):
            due_s = started_s + phase.ramp_s * i / phase.connections
            loop.call_at(due_s, self.connect, ports[i % len(ports)])
        await asyncio.sleep(phase.warm_s)
        begin = self._cut()
        await asyncio.sleep(phase.seconds)
        end = self._cut()
        self.stopping = True
        if self._open:
            try:
                async with asyncio.timeout(DRAIN_S_MAX):
                    await self._idle.wait()
            except TimeoutError:
                for connection in list(self._open):
                    detail = f"no end within {DRAIN_S_MAX:g} s after the measured part"
                    connection.fail(Failure.TIMEOUT, detail)
        if phase.once:
            late = phase.connections - len(self.tally.whole_s) - self._failures.total()
            for _ in range(late):
                self.failed(
                    Failure.TIMEOUT, "the connection did not stand before the end of the measured part"
                )
        return self._result(begin, end)

    def _cut(self) -> _Cut:
        tally = self.tally
        return _Cut(
            time.monotonic(),
            read_cpu(self.spec.proxy_pids),
            read_cpu(self.spec.worker_pids),
            read_cpu((os.getpid(),)),
            self.reads,
            len(tally.first_s),
            len(tally.whole_s),
            len(tally.delays_s),
            len(tally.gaps_s),
        )

    def _result(self, begin: _Cut, end: _Cut) -> LoadResult:
        tally = self.tally
        return LoadResult(
            window_s=end.at_s - begin.at_s,
            requests=end.whole - begin.whole,
            events=end.delays - begin.delays,
            reads=end.reads - begin.reads,
            proxy_cpu_s=spent_s(begin.proxy, end.proxy),
            workers_cpu_s=spent_s(begin.workers, end.workers),
            client_cpu_s=spent_s(begin.client, end.client),
            rss_bytes=peak_rss_bytes(self.spec.proxy_pids),
            # Paced streams all begin before the measured part.
            first_ms=percentiles(
                tally.first_s if self.spec.phase.once else tally.first_s[begin.first : end.first]
            ),
            whole_ms=_within(tally.whole_s, begin.whole, end.whole),
            delay_ms=_within(tally.delays_s, begin.delays, end.delays),
            gap_ms=_within(tally.gaps_s, begin.gaps, end.gaps),
            checked=len(tally.whole_s),
            failures=dict(self._failures),
            first_failure=self._first_failure,
        )


def _within(values_s: array[float], begin: int, end: int) -> Percentiles | None:
    return percentiles(values_s[begin:end])


class _Connection(asyncio.Protocol):
    """A connection: sends a request, checks the answer, sends the next."""

    def __init__(self, load: Load, port: int) -> None:
        self._load = load
        self._port = port
        self._check: AnswerCheck | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self._transport = cast(asyncio.Transport, transport)
        if self._load.stopping:
            self._transport.abort()
        else:
            self._send()

    def _send(self) -> None:
        self._check = self._load.begin(self)
        self._transport.write(self._load.request)

    def data_received(self, data: bytes) -> None:
        """Check what has come."""
        self._load.reads += 1
        if self._check is None:
            # Nothing was asked for, or what was asked for has failed.
            self._transport.abort()
            return
        try:
            over = self._check.feed(data, time.monotonic())
        except WrongAnswerError as error:
            self.fail(error.failure, error.detail)
            return
        if over:
            self._next(self._check)

    def connection_lost(self, error: Exception | None) -> None:
        """End the answer with the connection: some may end so."""
        check = self._check
        if check is None:
            return
        if error is not None:
            self.fail(Failure.RESET, str(error))
            return
        try:
            check.closed(time.monotonic())
        except WrongAnswerError as wrong:
            self.fail(wrong.failure, wrong.detail)
        else:
            self._next(check)

    def _next(self, check: AnswerCheck) -> None:
        if check.message.rest:
            self.fail(Failure.OUT_OF_ORDER, f"bytes after the answer: {check.message.rest[:80]!r}")
            return
        self._check = None
        self._load.end(self)
        more = not self._load.stopping and not self._load.spec.phase.once
        if more and not check.message.closes:
            self._send()
            return
        self._transport.abort()
        if more:
            self._load.connect(self._port)

    def fail(self, failure: Failure, detail: str) -> None:
        """Give up what was asked for, and the connection."""
        self._check = None
        self._load.failed(failure, detail)
        self._load.end(self)
        self._transport.abort()
        self._load.retry(self._port)


def main() -> None:
    """Run the load that the first argument describes and print what it measured."""
    spec = LoadSpec.model_validate_json(sys.argv[1])
    gc.freeze()
    # Nothing here makes cycles: a collection would only be a pause in the load.
    gc.disable()

    async def run() -> LoadResult:
        return await Load(spec).run()

    print(uvloop.run(run()).model_dump_json())


if __name__ == "__main__":
    main()
