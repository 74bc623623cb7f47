"""Random responses through the whole proxy without sockets: what a client gets is what the worker sent.

    python tests/brproxy/relay/fuzz.py --cases 1000000 --seed 1

Everything between the two transports is the proxy's own: aiohttp's server, handlers, decision core, relay.
Worker and client are drawn at random: framing, sizes, where reads are cut, HTTP version, kind of response.
A failure names its seed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from functools import partial

import httptools

from brproxy.build import build_service
from brproxy.config import parse_config
from brproxy.engines.dialects.vllm import VllmDialect
from brproxy.proxy.handlers import Handlers
from brproxy.relay.server import RelayServer

CASES_A_BATCH = 64
BODY = b'{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true%s}'
USAGE_ASKED = b',"stream_options":{"include_usage":true}'
DONE = b"data: [DONE]\n\n"
DIALECT = VllmDialect()
TEMPTING = (re.compile(rb"\r\n(?=[0-9a-f]+\r\n)"), re.compile(rb"\n\n\r\n"), re.compile(rb"\r\n"))


class Transport(asyncio.Transport):
    """Keeps what is written and whether it was closed."""

    def __init__(self, protocol):
        super().__init__()
        self.protocol = protocol
        self.written = b""
        self.closed = False
        protocol.connection_made(self)

    def write(self, data):
        self.written += data

    def is_closing(self):
        return self.closed

    def close(self):
        self.closed = True

    abort = close

    def pause_reading(self):
        """Do nothing: nobody reads."""

    resume_reading = pause_reading

    def get_extra_info(self, name, default=None):
        return default


class Case:
    """One random exchange: the request, the worker's bytes, and what the client must see."""

    def __init__(self, seed):
        self.seed = seed
        self.rng = random.Random(seed)
        self.http10 = self.rng.random() < 0.15
        self.asks_usage = self.rng.random() < 0.5
        self.reports_to_all = False
        self.method = "HEAD" if self.rng.random() < 0.05 else "POST"
        self.until_close = False
        self.tokens = 0
        self.tokens_are_clear = True
        kind = self.rng.choice([self._stream, self._stream, self._stream, self._reply, self._empty])
        self.response = kind()

    def request(self):
        body = BODY % (USAGE_ASKED if self.asks_usage else b"")
        version = b"1.0" if self.http10 else b"1.1"
        line = b"%b /v1/chat/completions HTTP/%b\r\n" % (self.method.encode(), version)
        fields = b"Host: p\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        return line + fields + body

    def reads(self):
        """Return the worker's bytes, cut at random: mostly where it wrote, sometimes at every byte."""
        how = self.rng.random()
        raw = b"".join(self.response)
        if how < 0.4:
            return self.response
        if how < 0.5:
            return [raw[i : i + 1] for i in range(len(raw))]
        if how < 0.7:
            # Where chunks begin or events end, real ones and what looks like them.
            cuts = [match.end() for match in self.rng.choice(TEMPTING).finditer(raw)]
        else:
            cuts = sorted(self.rng.randrange(len(raw) + 1) for _ in range(self.rng.randrange(12)))
        return [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]

    def _event(self, number):
        rng = self.rng
        text = rng.choice(
            [" word", " data: x", ' \\"q\\"', " \\n", "ü", "", "x" * rng.randrange(40), f" {number}"]
        )
        finish = rng.choice(["null"] * 8 + ['"stop"'])
        delta = f'{{"content":"{text}"}}' if number else '{"role":"assistant","content":""}'
        choice = f'{{"index":0,"delta":{delta},"finish_reason":{finish}}}'
        usage = rng.choice([""] * 8 + [',"usage":null', "so far"])
        made = f'{{"id":"c-{self.seed}","choices":[{choice}]%s}}'
        # A server that reports unasked does so to everybody, in the last event too.
        self.reports_to_all |= usage == "so far" and finish == "null"
        reported = ',"usage":{"prompt_tokens":3,"completion_tokens":%d}'
        self.tokens += DIALECT.read_event(
            (made % (reported % 0 if usage == "so far" else usage)).encode()
        ).has_tokens
        event = (made % (reported % self.tokens if usage == "so far" else usage)).encode()
        return b"data: " + event + b"\n\n"

    def _stream(self):
        rng = self.rng
        events = [self._event(number) for number in range(rng.randrange(1, 12))]
        if rng.random() < 0.1:
            events.insert(rng.randrange(len(events)), b": comment\n\n")
        if rng.random() < 0.05:
            events.append(b"data: odd\r\n\r\n")
            self.tokens += DIALECT.read_event(b"odd").has_tokens
        if rng.random() < 0.05:
            events.append(b": " + b"y" * rng.randrange(9000) + b"\n\n")
        if rng.random() < 0.1:
            # What looks like a chunk, line ends and all, inside of one.
            inner = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events[-2:])
            events.append(rng.choice([b": \r\n", b"\r\n\r\n"]) + inner + b"\n\n")
            self.tokens_are_clear = False
        if rng.random() < 0.1:
            # Half a line in a chunk of its own; an event with more behind it that looks like a chunk's end.
            events.insert(rng.randrange(1, len(events) + 1), rng.choice([b"data: ", b": c", b"\n"]))
            events[-1] += b"\r\n: x\n\n"
            self.tokens_are_clear = False
        usage = (
            b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":%d}}\n\n'
            % self.tokens
        )
        # A report that does not fit what was counted would teach a ratio.
        reports = self.tokens_are_clear and rng.random() < 0.7
        is_wanted = reports and (self.asks_usage or self.reports_to_all)
        self.body = b"".join(events) + (usage if is_wanted else b"") + DONE
        sent = [*events, *([usage] if reports else []), DONE]
        while len(sent) > 1 and rng.random() < 0.3:
            position = rng.randrange(len(sent) - 1)
            sent[position : position + 2] = [sent[position] + sent[position + 1]]
        return self._framed(sent, "text/event-stream; charset=utf-8")

    def _reply(self):
        rng = self.rng
        document = {"usage": {"prompt_tokens": 3, "completion_tokens": 2}, "text": "z" * rng.randrange(3000)}
        reply = json.dumps(document).encode()
        self.body = rng.choice([reply, rng.randbytes(rng.randrange(400)), b""])
        is_json = rng.random() < 0.5
        pieces, rest = [], self.body
        while rest:
            size = rng.randrange(1, len(rest) + 1)
            pieces.append(rest[:size])
            rest = rest[size:]
        response = self._framed(pieces, "application/json" if is_json else "audio/wav")
        if is_json and self.body == reply and self.status < 300:
            self.tokens = 2
        return response

    def _empty(self):
        self.status, self.body = self.rng.choice([204, 304]), b""
        return [b"HTTP/1.1 %d Nothing\r\nX-W: w\r\n\r\n" % self.status]

    def _framed(self, pieces, content_type):
        rng = self.rng
        self.status = rng.choice([200, 200, 200, 201, 400, 404])
        head = f"HTTP/1.1 {self.status} Reason\r\nX-W: w\r\nContent-Type: {content_type}\r\n"
        early = b"HTTP/1.1 103 Early\r\nLink: l\r\n\r\n" if rng.random() < 0.05 else b""
        framing = rng.choice(["chunked", "chunked", "length", "close"])
        if self.method == "HEAD":
            self.body, self.tokens = b"", 0
            return [early + f"{head}Content-Length: 5\r\n\r\n".encode()]
        if framing == "chunked":
            trailer = b"X-T: t\r\n" if rng.random() < 0.1 else b""
            chunks = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
            if rng.random() < 0.2:
                chunks = [b"".join(chunks)]
            return [
                early + f"{head}Transfer-Encoding: chunked\r\n\r\n".encode(),
                *chunks,
                b"0\r\n" + trailer + b"\r\n",
            ]
        if framing == "length":
            return [early + f"{head}Content-Length: {sum(map(len, pieces))}\r\n\r\n".encode(), *pieces]
        self.until_close = True
        return [early + f"{head}\r\n".encode(), *pieces]


class Received:
    """What a client understands of the bytes it got; httptools reads them as any client would."""

    def __init__(self, raw, case):
        self.body, self.fields, self.complete, self.status = b"", {}, False, 0
        self._parser = httptools.HttpResponseParser(self)
        self._expected = case.status
        if case.method == "HEAD":
            head, end, rest = raw.rpartition(b"\r\n\r\n")
            self._parser.feed_data(head + end)
            self.complete = not rest
        else:
            self._parser.feed_data(raw)

    def on_header(self, name, value):
        self.fields[name.lower()] = value

    def on_headers_complete(self):
        self.status = self._parser.get_status_code()

    def on_body(self, piece):
        self.body += piece

    def on_message_complete(self):
        self.complete = self.status == self._expected


class Bench:
    """The proxy between fake transports."""

    def __init__(self):
        workers = [{"url": "http://127.0.0.1:1"}, {"url": "http://127.0.0.1:2"}]
        config = parse_config(
            {"worker": workers, "health": {"enabled": False}, "routing": {"policy": "br-h"}}, "fuzz"
        )
        self.service = build_service(config)
        self.dispatcher = self.service.fleet.groups[0].dispatcher
        self.ledger = self.dispatcher.ledger
        self.server = RelayServer(
            Handlers(self.service).handle, 1 << 20, auto_decompress=False, access_log=None
        )
        self.connections = {}
        for group in self.service.groups.values():
            for pool in group.endpoints:
                pool.connect = partial(self._connect, pool)

    async def _connect(self, pool):
        connection = pool._protocol()
        self.connections[connection] = Transport(connection)
        return connection

    async def close(self):
        self.service.watch.close()

    async def run(self, case):
        """Run one case; raises AssertionError with its seed."""
        client = Transport(self.server())
        tokens_before = self.service.metrics.groups["default"].output_tokens
        await asyncio.sleep(0)
        client.protocol.data_received(case.request())
        connection, transport = await self._asked()
        for read in case.reads():
            if read:
                connection.data_received(read)
        if case.until_close:
            transport.closed = True
            connection.connection_lost(None)
        await self._settled()
        self._check(case, client, self.service.metrics.groups["default"].output_tokens - tokens_before)
        if not client.closed:
            client.protocol.connection_lost(None)
        for old, its in list(self.connections.items()):
            if its.closed:
                del self.connections[old]

    async def _asked(self):
        """Return the connection that got the request."""
        for _ in range(20):
            await asyncio.sleep(0)
            for connection, transport in self.connections.items():
                if transport.written:
                    transport.written = b""
                    return connection, transport
        raise AssertionError("no worker got the request")

    async def _settled(self):
        for _ in range(20):
            await asyncio.sleep(0)
            if not self.ledger.bound:
                return

    def _check(self, case, client, tokens):
        received = Received(client.written, case)
        framed_by_close = case.http10 and b"content-length" not in received.fields
        said = f"seed {case.seed}: {client.written[-300:]!r}"
        assert received.status == case.status, said
        assert received.body == case.body, said
        assert received.complete or (framed_by_close and client.closed), said
        assert received.fields[b"x-w"] == b"w", said
        assert b"transfer-encoding" not in received.fields or not case.http10, said
        assert tokens == case.tokens or not case.tokens_are_clear, (
            f"{said}: {tokens} for {case.tokens} tokens"
        )
        assert (self.ledger.bound, len(self.dispatcher.waiting), sum(self.ledger.kv_tokens)) == (0, 0, 0), (
            said
        )


async def fuzz(cases, seed, report=lambda _done: None):
    """Run ``cases`` cases, with one seed after another from ``seed`` on."""
    bench = Bench()
    try:
        for number in range(cases):
            await bench.run(Case(seed + number))
            if number % 1000 == 999:
                report(number + 1)
    finally:
        await bench.close()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    started_s = time.perf_counter()

    def report(done):
        rate = done / (time.perf_counter() - started_s)
        sys.stderr.write(f"\r{done:,} of {asked.cases:,} cases, {rate:,.0f} a second")

    asyncio.run(fuzz(asked.cases, asked.seed, report))
    sys.stderr.write(
        f"\n{asked.cases:,} cases from seed {asked.seed}: every response arrived as it was sent\n"
    )


if __name__ == "__main__":
    main()
