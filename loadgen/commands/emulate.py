"""``loadgen emulate``: run an emulated deployment until it is stopped."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace

from brproxy.types import InvalidInputError
from loadgen.cluster_settings import ClusterSettings
from loadgen.emulator.server import running_emulator
from loadgen.emulator.settings import EmulatorSettings

READY = "workers listen on"
"""What the one line that is printed once every port is open begins with; the URLs follow."""

BOOTSTRAP = "bootstrap ports:"
"""What the next line begins with, of workers that have such ports."""


DEPLOYMENTS_MAX = 64


def emulate_arguments(cluster: ClusterSettings, speed: float, more: Mapping[str, object]) -> list[str]:
    """Return the command line that emulates ``cluster`` on free ports, with ``more`` options."""
    options = {
        "--workers": cluster.workers,
        "--slots": cluster.slots,
        "--step-base-ms": cluster.step_base_s * 1e3,
        "--step-ns-per-kv-token": cluster.step_s_per_kv_token * 1e9,
        "--prefill-us-per-token": cluster.prefill_s_per_token * 1e6,
        "--speed": speed,
        "--base-port": 0,
        **more,
    }
    if cluster.kv_capacity_tokens is not None:
        options["--kv-capacity-tokens"] = cluster.kv_capacity_tokens
    if cluster.prefill_tokens_max is not None:
        options["--prefill-tokens-max"] = cluster.prefill_tokens_max
    return ["emulate", *(str(part) for option in options.items() for part in option)]


async def emulate(settings: EmulatorSettings, deployments: int, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; ``say`` gets a line with the workers' URLs once they listen.

    A second line has the bootstrap ports, in forms of transfer that have some. So many ``deployments`` are
    served, each with a barrier of its own; their ports follow one another. Raises InvalidInputError.
    """
    if not 1 <= deployments <= DEPLOYMENTS_MAX:
        raise InvalidInputError(f"there are 1 to {DEPLOYMENTS_MAX} deployments, got {deployments}")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    urls: list[str] = []
    bootstrap_urls: list[str] = []
    servers = settings.cluster.workers // settings.ranks_per_url
    async with AsyncExitStack() as stack:
        for first in range(0, deployments * servers, servers):
            own = replace(
                settings,
                base_port=settings.base_port and settings.base_port + first,
                bootstrap_port=settings.bootstrap_port and settings.bootstrap_port + first,
            )
            emulator = await stack.enter_async_context(running_emulator(own))
            urls += emulator.urls
            bootstrap_urls += emulator.bootstrap_urls
        say(f"{len(urls)} {READY} {' '.join(urls)}")
        if bootstrap_urls:
            say(f"{BOOTSTRAP} {' '.join(bootstrap_urls)}")
        await stop.wait()
