"""One half of a real prefill/decode pair is killed under load: does anything hang, and what is served again?

    python -m tests.real_engines.kills --kill prefill decode \
        --prefill 'run-pd.sh VENV MODEL 8101 18101 prefill' --prefill-url http://127.0.0.1:8101 \
        --decode 'run-pd.sh VENV MODEL 8102 18102 decode' --decode-url http://127.0.0.1:8102

It starts both (a command each, which must stay in its process group), a proxy of its own before them, and a
load of streams and other requests; kills one of them with all its processes (SIGKILL), starts it again, and
goes on with the next.
What goes wrong has a line each, and makes the exit code 1.
"""

import argparse
import asyncio
import os
import random
import shlex
import signal
import sys
import time
from collections import Counter
from contextlib import asynccontextmanager

import aiohttp

from brproxy.app import running_proxy
from brproxy.config import parse_config
from tests.real_engines.asking import CHAT, chat
from tests.real_engines.conftest import Proxy, Vllm
from tests.real_engines.texts import text_of

UP_WITHIN_S = 600.0
ANSWERED_WITHIN_S = 90.0
"""After the kill; what has no answer by then hangs (seconds)."""
LATE = 8
"""Requests that come while it is dead."""


class Side:
    """One engine, started by ``command``."""

    def __init__(self, command, url, session):
        self.command = command
        self.engine = Vllm(url.rstrip("/"), session)
        self.process = None

    async def start(self):
        self.process = await asyncio.create_subprocess_exec(
            *shlex.split(self.command),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        async with asyncio.timeout(UP_WITHIN_S):
            while not await self._is_up():
                if self.process.returncode is not None:
                    raise RuntimeError(f"{self.command} ended with {self.process.returncode}")
                await asyncio.sleep(0.5)

    async def _is_up(self):
        try:
            await self.engine.look()
        except (aiohttp.ClientError, KeyError, ValueError):
            return False
        return True

    async def end(self, number):
        if self.process is not None and self.process.returncode is None:
            os.killpg(self.process.pid, number)
            await self.process.wait()


async def outcome(session, url, body):
    """Return what a client got, in a word or two, and when it had it all."""
    got = b""
    try:
        async with session.post(url + CHAT, json=body) as response:
            async for piece in response.content.iter_any():
                got += piece
        whole = not body.get("stream") or got.endswith(b"data: [DONE]\n\n")
        status = response.status
        if status == 200 and whole and b'"error"' not in got:
            word = "answered"
        elif status == 200:
            word = "begun, then an error" if b'"error"' in got else "cut"
        else:
            word = f"status {status}"
            print(f"  {status}: {got[:200]!r}")
    except (aiohttp.ClientError, ConnectionError) as error:
        word = (
            "begun, then an error" if b'"error"' in got else f"cut ({type(error).__name__}) at {got[-80:]!r}"
        )
    except TimeoutError:
        word = f"hangs, with {len(got)} bytes"
    return word, time.monotonic()


async def run(name, options, session, sides, proxy):
    victim = sides[name]
    draw = random.Random(name)

    def ask(stream):
        body = chat(victim.engine, text_of("english", draw), 60, stream=stream, ignore_eos=True)
        return asyncio.create_task(outcome(session, proxy.url, body))

    print(f"before: {(await ask(False))[0]}, {(await ask(True))[0]}")
    asking = []
    for number in range(options.requests):
        asking.append(ask(number % 2 == 0))
        await asyncio.sleep(options.interval_s)
    await victim.end(signal.SIGKILL)
    killed_s = time.monotonic()
    before = sum(task.done() for task in asking)
    print(f"{name} killed; {before} of {len(asking)} had been answered; {LATE} more come")
    asking += [ask(number % 2 == 0) for number in range(LATE)]
    if options.again:
        await victim.start()
        print(f"it is back after {time.monotonic() - killed_s:.0f} s")
    async with asyncio.timeout(ANSWERED_WITHIN_S + UP_WITHIN_S):
        ends = await asyncio.gather(*asking)
    for word, count in Counter(word for word, _ in ends).items():
        print(f"{count:4d} {word}")
    print(f"the last had its answer {max(end_s for _, end_s in ends) - killed_s:.1f} s after the kill")
    faults = [word for word, _ in ends if word.startswith(("hangs", "cut"))]
    if not options.again:
        await victim.start()
    await asyncio.sleep(2)
    for _ in range(4):
        word, _ = await ask(True)
        if word != "answered":
            faults.append(f"after its return: {word}")
    counts = proxy.services["default"].handover.counts
    print(f"afterwards: {dict(counts)}")
    booked = {name: proxy.booked(name) for name in proxy.services}
    if any(booked.values()):
        faults.append(f"still booked: {booked}")
    return faults


@asynccontextmanager
async def pair(options, session):
    sides = {
        "prefill": Side(options.prefill, options.prefill_url, session),
        "decode": Side(options.decode, options.decode_url, session),
    }
    try:
        await asyncio.gather(*(side.start() for side in sides.values()))
        yield sides
    finally:
        for side in sides.values():
            await side.end(signal.SIGKILL)


async def main(options):
    faults = []
    timeout = aiohttp.ClientTimeout(total=UP_WITHIN_S + ANSWERED_WITHIN_S)
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
        pair(options, session) as sides,
    ):
        workers = [{"url": side.engine.url, "role": role, "slots": 8} for role, side in sides.items()]
        document = {"listen": {"port": 0}, "worker": workers, "log": {"level": "error"}}
        async with running_proxy(parse_config(document, "kills")) as running:
            for name in options.kill:
                faults += await run(name, options, session, sides, Proxy(running))
    for fault in faults:
        print(f"FAULT {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    for role in ("prefill", "decode"):
        parser.add_argument(f"--{role}", metavar="COMMAND", required=True)
        parser.add_argument(f"--{role}-url", metavar="URL", required=True)
    parser.add_argument("--kill", nargs="+", choices=("prefill", "decode"), required=True)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--interval-s", type=float, default=0.1)
    parser.add_argument("--again", action="store_true", help="start it again while requests wait")
    sys.exit(asyncio.run(main(parser.parse_args())))
