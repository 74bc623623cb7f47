"""``loadgen emulate``: run an emulated deployment until it is stopped."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from loadgen.emulator.server import running_emulator
from loadgen.emulator.settings import EmulatorSettings

READY = "workers listen on"
"""What the one line that is printed once every port is open begins with; the URLs follow."""


async def emulate(settings: EmulatorSettings, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; ``say`` gets a line with the workers' URLs once they listen.

    A second line has the bootstrap ports, in forms of transfer that have some.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running_emulator(settings) as emulator:
        say(f"{len(emulator.urls)} {READY} {' '.join(emulator.urls)}")
        if emulator.bootstrap_urls:
            say(f"bootstrap ports: {' '.join(emulator.bootstrap_urls)}")
        await stop.wait()
