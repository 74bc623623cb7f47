"""Starting the emulator and the proxy as a user would: as processes of their own, on free loopback ports."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import uvloop

from brproxy.types import BrproxyError

Result = TypeVar("Result")

START_S_MAX = 120.0
STOP_S_MAX = 10.0
LINES_KEPT = 20
_LINE_BYTES_MAX = 1 << 16
_KILLED_BY = 128
"""What a shell adds to a signal's number for the exit code."""


class ProcessError(BrproxyError):
    """A process that was started did not come up; the text has its last line."""


@asynccontextmanager
async def running_process(
    module: str, arguments: Sequence[str], ready: re.Pattern[str]
) -> AsyncIterator[re.Match[str]]:
    """Run ``python -m module …`` for as long as the block runs; yields the match of its ``ready`` line.

    ``ready`` may span several lines. Raises ProcessError when the process ends or stays silent before it
    says so.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=_LINE_BYTES_MAX,
    )
    if process.stdout is None:
        raise ProcessError(f"{module} has no output to read")
    drain: asyncio.Task[None] | None = None
    try:
        match = await _wait_ready(module, process.stdout, ready)
        drain = asyncio.create_task(_drain(process.stdout))
        yield match
    finally:
        await stop(process)
        if drain is not None:
            await drain


async def _wait_ready(module: str, output: asyncio.StreamReader, ready: re.Pattern[str]) -> re.Match[str]:
    last: deque[str] = deque(maxlen=LINES_KEPT)
    try:
        async with asyncio.timeout(START_S_MAX):
            while line := await output.readline():
                last.append(line.decode(errors="replace").rstrip())
                match = ready.search("\n".join(last))
                if match is not None:
                    return match
    except TimeoutError:
        last.append(f"no sign of life within {START_S_MAX:g} s")
    raise ProcessError(f"{module} did not start: {last[-1] if last else 'it ended without a word'}")


async def _drain(output: asyncio.StreamReader) -> None:
    # A pipe that nobody reads fills up and stops its writer.
    while await output.read(_LINE_BYTES_MAX):
        pass


async def stop(process: asyncio.subprocess.Process) -> None:
    """End a process: SIGTERM, and SIGKILL if that does not help in STOP_S_MAX, or nobody waits so long."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_S_MAX):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
    except asyncio.CancelledError:
        process.kill()
        raise


def run_to_end(main: Coroutine[Any, Any, Result]) -> Result:
    """Run ``main`` on an event loop; signals that end a process end what it has started first.

    SIGTERM and SIGHUP end this process with an exit code as a shell gives it; SIGINT as with any command.
    """
    ended_by: list[int] = []

    async def until_signal() -> Result:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def end(number: int) -> None:
            ended_by.append(number)
            if task is not None:
                task.cancel()

        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, end, number)
        return await main

    try:
        return uvloop.run(until_signal())
    except asyncio.CancelledError:
        if not ended_by:
            raise
        raise SystemExit(_KILLED_BY + ended_by[0]) from None
