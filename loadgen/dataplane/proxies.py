"""Starting a proxy by its command line, and knowing when it serves."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from brproxy.types import InvalidInputError
from loadgen.commands.processes import ProcessError, stop
from loadgen.dataplane.cpu import on_core

POLL_S = 0.1
"""Between two requests to a proxy that does not serve yet."""

LOG_BYTES_MAX = 1 << 14
"""Of the end of a log, searched for its last line."""

ANSWER_S_MAX = 2.0
"""For such a request."""

_JSON = {"Content-Type": "application/json"}
_PLACEHOLDER = re.compile(r"\{(?:port|workers|config)\}")


@dataclass(frozen=True, slots=True)
class Proxy:
    """What is compared: a proxy by its command line; without one, the load goes straight to the workers."""

    name: str
    command: tuple[str, ...] = ()


def parse_proxy(text: str) -> Proxy:
    """Return the proxy that ``NAME=COMMAND LINE`` describes; raises InvalidInputError."""
    name, _, line = text.partition("=")
    try:
        command = tuple(shlex.split(line))
    except ValueError as error:
        raise InvalidInputError(f"--proxy {text!r}: {error}") from error
    if not name.strip() or not command:
        raise InvalidInputError(f"--proxy {text!r}: expected NAME=COMMAND LINE")
    return Proxy(name.strip(), command)


def fill_in(command: Sequence[str], port: int, workers: Sequence[str], config: Path) -> list[str]:
    """Replace {port}, {workers} (URLs, separated by commas) and {config} in a command line."""
    values = {"{port}": str(port), "{workers}": ",".join(workers), "{config}": str(config)}
    return [_PLACEHOLDER.sub(lambda match: values[match[0]], word) for word in command]


class RunningProxy:
    """A proxy's process; its output goes to ``log``."""

    def __init__(self, proxy: Proxy, process: asyncio.subprocess.Process, log: Path) -> None:
        self._proxy = proxy
        self._process = process
        self._log = log
        self.pid = process.pid

    def check(self) -> None:
        """Raise ProcessError if it has ended."""
        if self._process.returncode is not None:
            raise self.error(f"ended with code {self._process.returncode}; it has to stay in the foreground")

    def error(self, what: str) -> ProcessError:
        """Return an error that quotes the last line of its log."""
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - LOG_BYTES_MAX))
            lines = log.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        return ProcessError(f"{self._proxy.name} {what}; the last line of its log: {last}")

    async def wait_ready(self, url: str, request: bytes, limit_s: float) -> None:
        """Wait until it answers ``request`` with 200; raises ProcessError."""
        timeout = aiohttp.ClientTimeout(total=ANSWER_S_MAX)
        last = "no answer"
        try:
            async with asyncio.timeout(limit_s), aiohttp.ClientSession(timeout=timeout) as session:
                while True:
                    self.check()
                    with suppress(aiohttp.ClientError, TimeoutError):
                        async with session.post(url, data=request, headers=_JSON) as response:
                            if response.status == 200:
                                return
                            last = f"status {response.status}"
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise self.error(f"did not serve within {limit_s:g} s: {last}") from None


@asynccontextmanager
async def running(
    proxy: Proxy, command: Sequence[str], port: int, log: Path, core: int | None
) -> AsyncIterator[RunningProxy]:
    """Run a proxy for as long as the block runs; raises ProcessError if it cannot be started."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ProcessError(f"{proxy.name} was not started: something listens on port {port} already")
    try:
        with log.open("wb") as output, on_core(core):
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
    except OSError as error:
        raise ProcessError(f"{proxy.name} cannot be started: {command[0]}: {error.strerror}") from error
    try:
        yield RunningProxy(proxy, process, log)
    finally:
        await stop(process)
        # Its session is its own: whatever is left in the group was started by it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
