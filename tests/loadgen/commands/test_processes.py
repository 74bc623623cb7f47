"""Commands that start emulators and proxies: whatever ends them ends these, too."""

import asyncio
import re
import signal
from pathlib import Path

import pytest

from loadgen.commands.processes import running_process
from tests.loadgen.commands.test_commands import SMALL, start

HANG_S = 300.0
"""Only ends what hangs: on a machine that has much to do a process takes its time to start."""


def children(pid):
    """Return the processes that ``pid`` has started, and that they have."""
    try:
        own = [
            int(child)
            for path in Path(f"/proc/{pid}/task").iterdir()
            for child in (path / "children").read_text().split()
        ]
    except FileNotFoundError:
        return []
    return own + [other for child in own for other in children(child)]


def is_there(pid):
    """Tell whether a process runs; one whose end nobody has taken note of does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def until(is_so):
    async with asyncio.timeout(HANG_S):
        while not is_so():
            await asyncio.sleep(0.01)


COMPARE = ("compare", "--policies", "br-0", *SMALL, "--requests", "10000")


# The emulator alone, or the proxy as well: it may be anywhere in its start. Which signal it is makes no
# difference to how far that is.
@pytest.mark.parametrize(
    ("number", "started"),
    [(signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGINT, 2), (signal.SIGHUP, 2)],
)
async def test_a_signal_ends_what_a_command_has_started(number, started):
    process = await start(*COMPARE)
    try:
        await until(lambda: len(children(process.pid)) >= started)
        left = children(process.pid)
        process.send_signal(number)
        _, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == (130 if number is signal.SIGINT else 128 + number)
    assert b"Traceback" not in err
    await until(lambda: not any(map(is_there, left)))


async def test_an_exception_and_who_waits_no_longer_end_it():
    arguments = ("emulate", "--base-port", "0", "--workers", "1")
    left = set()

    async def interrupted(error):
        async with running_process("loadgen", arguments, re.compile("http")):
            left.update(children("self"))
            raise error

    for error in (ValueError, asyncio.CancelledError):
        with pytest.raises(error):
            await interrupted(error)
    assert len(left) >= 2
    await until(lambda: not any(map(is_there, left)))
