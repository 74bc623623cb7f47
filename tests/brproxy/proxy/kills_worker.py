"""A worker that is killed, a process of its own: ``python -m tests.brproxy.proxy.kills_worker --name dp-0``.

Its answers are those of loadgen's emulator. When each comes, the request says in its ``order``; SIGUSR1 opens
the gate: from then on nobody waits. SIGUSR2 lets it die without a word, as a real vLLM does one time in two
after SIGTERM: it refuses connections, and says nothing more on those it has. On standard output it says where
it listens, and the name of each request that reaches it, with the machine's monotonic time.
"""

import argparse
import asyncio
import os
import signal
import time
from contextlib import suppress

import orjson

from loadgen.emulator.wire import Answer, read_request

READY = "listens on port"
LIMIT_S = 600
"""Nothing that is started here lives longer."""

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n"
_STREAM_HEAD = _HEAD % b"text/event-stream" + b"transfer-encoding: chunked\r\n\r\n"
_OPENINGS = {"nothing": b"", "head": _STREAM_HEAD, "comment": _STREAM_HEAD + b"8\r\n: wait\n\n\r\n"}
"""What of a stream comes before its prefill is over."""

OPENINGS = tuple(_OPENINGS)


def _chunk(payload):
    return b"%x\r\n%b\r\n" % (len(payload), payload)


class Worker:
    """Answers requests until it is killed."""

    def __init__(self, name):
        self._name = name
        self._gate = asyncio.Event()

    def open_gate(self):
        self._gate.set()

    async def handle(self, reader, writer):
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                if head.startswith(b"get "):
                    writer.write(_HEAD % b"text/plain" + b"content-length: 2\r\n\r\nok")
                    continue
                length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
                await self._answer(writer, await reader.readexactly(length))
        writer.close()

    async def _answer(self, writer, body):
        order = orjson.loads(body)["order"]
        print(order["name"], time.monotonic(), flush=True)
        if order["kills"]:
            os.kill(os.getpid(), signal.SIGKILL)
        request = read_request(body, chat=True, length_header=None)
        answer = Answer(request, f"{self._name}.{order['name']}", 0)
        if not request.stream:
            await self._wait(order["prefill_s"])
            content = answer.complete()
            writer.write(_HEAD % b"application/json" + b"content-length: %d\r\n\r\n" % len(content) + content)
            return
        writer.write(_OPENINGS[order["opening"]])
        await self._wait(order["prefill_s"])
        writer.write((b"" if _OPENINGS[order["opening"]] else _STREAM_HEAD) + _chunk(answer.opening()))
        for token in range(request.output_tokens):
            writer.write(_chunk(answer.chunk(token, token + 1)))
            await writer.drain()
            await self._wait(order["interval_s"])
        writer.write(_chunk(answer.closing(request.output_tokens)) + b"0\r\n\r\n")

    async def _wait(self, limit_s):
        """Wait for the gate, ``limit_s`` at most."""
        if not self._gate.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._gate.wait(), limit_s)


async def serve(name):
    signal.alarm(LIMIT_S)
    worker = Worker(name)
    server = await asyncio.start_server(worker.handle, "127.0.0.1", 0, backlog=4096)

    def die_silently():
        server.close()
        # In the next turn, when nobody listens any more, the loop stands still for good.
        loop.call_soon(time.sleep, LIMIT_S)

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, worker.open_gate)
    loop.add_signal_handler(signal.SIGUSR2, die_silently)
    print(READY, server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    asyncio.run(serve(parser.parse_args().name))
