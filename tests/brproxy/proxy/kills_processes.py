"""The processes that kills.py starts: workers, and a proxy before them, on free ports of the loopback."""

import asyncio
import signal
import sys
from contextlib import asynccontextmanager

from loadgen.commands.processes import stop
from tests.brproxy.proxy.kills_worker import READY

INTERVAL_S = TIMEOUT_S = 0.5
"""Between two checks of a worker's health, and for one."""

UNHEALTHY_AFTER = 3

POLL_S = 0.02


class Process:
    """A process and its log; ``port`` is where it listens."""

    def __init__(self, process, log):
        self.process = process
        self.log = log
        self.port = 0

    @property
    def is_dead(self):
        return self.process.returncode is not None

    def signal(self, number):
        self.process.send_signal(number)


@asynccontextmanager
async def running(log, ready, module, *arguments):
    """Run ``python -m module``; it says on which port it listens behind ``ready``, at the end of a line."""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    running = Process(process, log)
    try:
        while not running.port:
            lines = [line for line in log.read_text().split("\n")[:-1] if ready in line]
            if lines:
                running.port = int(lines[0].partition(ready)[2].split(",")[0].rpartition(":")[2])
            elif running.is_dead:
                raise RuntimeError(f"{module} did not start: {log.read_text()}")
            else:
                await asyncio.sleep(POLL_S)
        yield running
    finally:
        if not running.is_dead:
            # Whoever stands still cannot end.
            running.signal(signal.SIGCONT)
        await stop(process)


class Worker:
    """A worker and the requests that have reached it, with their times."""

    def __init__(self, name, running):
        self.name = name
        self.running = running

    def reached(self):
        lines = [line.split() for line in self.running.log.read_text().split("\n")[1:-1]]
        return {words[0]: float(words[1]) for words in lines if len(words) == 2}


@asynccontextmanager
async def running_workers(folder):
    """Run three workers and give them."""
    module = "tests.brproxy.proxy.kills_worker"
    async with (
        running(folder / "dp-0.log", READY, module, "--name", "dp-0") as first,
        running(folder / "dp-1.log", READY, module, "--name", "dp-1") as second,
        running(folder / "dp-2.log", READY, module, "--name", "dp-2") as third,
    ):
        yield [Worker(f"dp-{i}", worker) for i, worker in enumerate((first, second, third))]


def _configuration(ports, slots, timeout_s):
    tables = [
        "[listen]\nport = 0",
        f"[health]\ninterval_s = {INTERVAL_S}\ntimeout_s = {timeout_s}\nunhealthy_after = {UNHEALTHY_AFTER}",
        *(
            f'[[worker]]\nurl = "http://127.0.0.1:{port}"\nname = "dp-{i}"\nslots = {slots}'
            for i, port in enumerate(ports)
        ),
    ]
    return "\n\n".join(tables) + "\n"


@asynccontextmanager
async def running_proxy(folder, workers, slots, timeout_s):
    """Run the proxy before ``workers`` and give its process; ``timeout_s``: of a check."""
    config = folder / "brproxy.toml"
    config.write_text(_configuration([worker.running.port for worker in workers], slots, timeout_s))
    ready = "brproxy listens on"
    async with running(folder / "brproxy.log", ready, "brproxy", "serve", "--config", str(config)) as proxy:
        yield proxy


async def until(condition, *arguments):
    """Wait until ``condition`` holds, which may have to be awaited."""
    while True:
        holds = condition(*arguments)
        if asyncio.iscoroutine(holds):
            holds = await holds
        if holds:
            return
        await asyncio.sleep(POLL_S)
