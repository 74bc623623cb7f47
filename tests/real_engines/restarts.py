"""A real vLLM is killed under load and comes back with another KV cache: is that found, and does all go on?

    python -m tests.real_engines.restarts --url http://127.0.0.1:8101 \
        --first 'run.sh VENV MODEL 8101' --then 'run.sh VENV MODEL 8101 --num-gpu-blocks-override 200'

It starts the engine by the first command, a proxy of its own that has been told nothing but the URL (and
``--ranks``), and a load; kills the engine with all its processes, and starts it by the second command while
requests wait. What goes wrong has a line each, and makes the exit code 1.
"""

import argparse
import asyncio
import random
import signal
import sys
import time
from collections import Counter

import aiohttp

from brproxy.app import running_proxy
from brproxy.config import parse_config
from tests.real_engines.asking import chat
from tests.real_engines.conftest import Proxy
from tests.real_engines.kills import ANSWERED_WITHIN_S, UP_WITHIN_S, Side, outcome
from tests.real_engines.texts import text_of

AT_ONCE = 6
FOUND_WITHIN_S = 30.0


def capacities(proxy):
    return [member.limits.kv_capacity_tokens for member in proxy.services["default"].group.roster.members]


async def run(options, session, side, proxy):
    draw, faults, words = random.Random(1), [], Counter()
    stop = asyncio.Event()

    async def user(number):
        while not stop.is_set():
            text = text_of("english", draw)
            body = chat(side.engine, text, 40, stream=number % 2 == 0, ignore_eos=True)
            word, _ = await outcome(session, proxy.url, body)
            words[word] += 1

    users = [asyncio.create_task(user(number)) for number in range(AT_ONCE)]
    await asyncio.sleep(options.load_s)
    before = capacities(proxy)
    print(f"KV capacity {before}; {dict(words)}")
    await side.end(signal.SIGKILL)
    killed_s, side.command = time.monotonic(), options.then
    await side.start()
    back_s = time.monotonic()
    print(f"back after {back_s - killed_s:.0f} s; {dict(words)}")
    while capacities(proxy) == before and time.monotonic() < back_s + FOUND_WITHIN_S:
        await asyncio.sleep(0.1)
    print(f"KV capacity {capacities(proxy)} after another {time.monotonic() - back_s:.1f} s")
    words.clear()
    await asyncio.sleep(options.load_s)
    stop.set()
    await asyncio.gather(*users)
    print(f"afterwards: {dict(words)}")
    if capacities(proxy) == before:
        faults.append("its new KV capacity was not found")
    if not words["answered"]:
        faults.append("nothing was answered after its return")
    faults += [word for word in words if word.startswith(("hangs", "cut"))]
    if proxy.booked():
        faults.append(f"still booked: {proxy.booked()}")
    return faults


async def main(options):
    timeout = aiohttp.ClientTimeout(total=UP_WITHIN_S + ANSWERED_WITHIN_S)
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        side = Side(options.first, options.url, session)
        try:
            await side.start()
            worker = {"url": side.engine.url} | ({"ranks": options.ranks} if options.ranks else {})
            document = {"listen": {"port": 0}, "worker": [worker], "log": {"level": "warning"}}
            async with running_proxy(parse_config(document, "restarts")) as running:
                faults = await run(options, session, side, Proxy(running))
        finally:
            await side.end(signal.SIGKILL)
    for fault in faults:
        print(f"FAULT {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--first", metavar="COMMAND", required=True)
    parser.add_argument("--then", metavar="COMMAND", required=True)
    parser.add_argument("--ranks", default="", help='as in the configuration, "0-1"')
    parser.add_argument("--load-s", type=float, default=10.0)
    sys.exit(asyncio.run(main(parser.parse_args())))
