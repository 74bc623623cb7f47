"""A running proxy: it listens, drains and stops in good order."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from brproxy.admin import running_admin
from brproxy.build import GroupBuilder, build_service, predictors_of
from brproxy.clock import Clock, MonotonicClock
from brproxy.config import Config
from brproxy.config_sections import Listen
from brproxy.deployment import Deployment
from brproxy.discovery import fill_in
from brproxy.listening import start_listening, urls_of
from brproxy.open_files import clients_for_open_files, file_number_max, raise_open_files_limit
from brproxy.parts import Parts
from brproxy.proxy.errors import of_status
from brproxy.proxy.handlers import Handlers
from brproxy.proxy.service import Service
from brproxy.relay.server import ClientLimits, RelayServer
from brproxy.reloading import Reloading
from brproxy.resolving import Resolved, Resolver
from brproxy.state_file import save_state

log = logging.getLogger(__name__)

Listening = Callable[[web.ServerRunner, Listen], Awaitable[int]]
"""Has a runner accept connections and returns the port, as ``start_listening`` does."""

_GC_THRESHOLD = 20_000
"""Container objects more than at the last collection that start one; Python's own 700 is a few requests."""


@dataclass(frozen=True, slots=True)
class RunningProxy:
    """A proxy that listens: what it is made of, and the ports it was given (None: no admin API)."""

    service: Service
    handlers: Handlers
    parts: Parts
    port: int
    admin_port: int | None

    @property
    def deployment(self) -> Deployment:
        """Which workers there are."""
        return self.parts.deployment

    @property
    def reloading(self) -> Reloading:
        """Who reads the file again."""
        return self.parts.reloading


@asynccontextmanager
async def running_proxy(
    config: Config,
    *,
    path: Path | None = None,
    resolved: Resolved | None = None,
    resolver: Resolver | None = None,
    clock: Clock | None = None,
    listening: Listening = start_listening,
) -> AsyncIterator[RunningProxy]:
    """Listen for as long as the block runs; then drain. Raises ListenError.

    Leaving the block stops accepting, lets running requests finish for ``timeouts.drain_s`` and cancels the
    rest. ``path`` is the file that is read again when asked (None: there is none), ``resolved`` what names
    of it stood for by ``resolver`` (None: it has none). ``clock`` (None: the machine's) and ``listening`` are
    a simulation's own, as its event loop is.
    """
    clock = clock or MonotonicClock()
    builder = GroupBuilder(config, clock)
    service = build_service(config, clock, builder)
    handlers = Handlers(service)
    parts = Parts(config, service, builder, handlers, path, resolver)
    server = RelayServer(
        service.cors.around(handlers.handle),
        config.limits.body_bytes_max,
        limits=ClientLimits(
            min(config.limits.client_connections_max, clients_for_open_files()),
            file_number_max(),
            config.timeouts.client_head_s,
            config.timeouts.stall_s,
        ),
        error_page=lambda status, message: of_status(status, message).response(""),
        auto_decompress=False,
        access_log=None,
        keepalive_timeout=config.timeouts.client_keepalive_s,
        max_line_size=config.limits.header_bytes_max,
        max_field_size=config.limits.header_bytes_max,
        max_headers=config.limits.header_fields_max,
        lingering_time=config.timeouts.client_linger_s,
    )
    runner = web.ServerRunner(server, shutdown_timeout=config.timeouts.drain_s)
    keeping = asyncio.create_task(_keep_state(config, service))
    try:
        await runner.setup()
        await parts.check_workers()
        async with running_admin(config.admin, service, parts.deployment, parts.reloading) as admin_port:
            port = await listening(runner, config.listen)
            parts.start()
            if resolved is not None:
                parts.resolving.follow(resolved)
            yield RunningProxy(service, handlers, parts, port, admin_port)
        handlers.pages.draining = True
    finally:
        try:
            await runner.cleanup()
            await handlers.pages.close()
            await parts.stop()
        finally:
            # Also by a second signal, which ends the waiting above.
            keeping.cancel()
            _save_state(config, service)
            _close(service)


def _close(service: Service) -> None:
    for group in service.groups.each():
        group.driver.close()
        for endpoint in group.endpoints:
            endpoint.close()
    service.watch.close()


async def _keep_state(config: Config, service: Service) -> None:
    """Write what predictors have learnt now and then."""
    if not config.prediction.state_file:
        return
    while True:
        await asyncio.sleep(config.prediction.state_interval_s)
        _save_state(config, service)


def _save_state(config: Config, service: Service) -> None:
    if config.prediction.state_file:
        path = Path(config.prediction.state_file)
        save_state(path, predictors_of(service.fleet), config.prediction.predictor)


async def serve(config: Config, path: Path | None = None) -> None:
    """Run the proxy until SIGTERM or SIGINT; a second signal ends it without waiting for anything.

    SIGHUP has it read ``path`` again.
    """
    stop, stop_now, again = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            stop_now.set()
        stop.set()

    raise_open_files_limit()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    # From now on: unheard it would end the process, while it starts as well as while it stops.
    loop.add_signal_handler(signal.SIGHUP, again.set)
    run = asyncio.create_task(_run_until(config, path, stop, again))
    hurry = asyncio.create_task(stop_now.wait())
    await asyncio.wait((run, hurry), return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    if not run.done():
        log.warning("second signal: leaving without waiting for running requests")
        run.cancel()
        await asyncio.wait((run,), timeout=1.0)
        return
    run.result()


async def _ready_to_run(config: Config, resolver: Resolver) -> tuple[Config, Resolved]:
    """Return ``config`` with what names and engines say, and what of it came from names."""
    resolved = await resolver.resolved(config, {})
    filled = await fill_in(resolved.config) if config.discovery.enabled else resolved.config
    return filled, resolved


async def _run_until(config: Config, path: Path | None, stop: asyncio.Event, again: asyncio.Event) -> None:
    resolver = Resolver(config.discovery.timeout_s)
    asking = asyncio.create_task(_ready_to_run(config, resolver))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((asking, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not asking.done():
        asking.cancel()
        await asyncio.wait((asking,))
        return
    config, resolved = asking.result()
    async with running_proxy(config, path=path, resolved=resolved, resolver=resolver) as proxy:
        groups = ", ".join(f"{name} ({size} workers)" for name, size in config.group_sizes.items())
        log.info(
            "brproxy listens on %s, policy %s, groups: %s",
            ", ".join(urls_of(config.listen, proxy.port)),
            config.routing.policy,
            groups,
        )
        if proxy.admin_port is not None:
            log.info(
                "the admin API listens on %s", urls_of(Listen(host=config.admin.host), proxy.admin_port)[0]
            )
        possible = proxy.service.limits.requests_max
        if possible < config.limits.requests_max:
            log.info(
                "open files are enough for %d requests at once, fewer than limits.requests_max = %d: "
                "ulimit -Hn or LimitNOFILE= raises that",
                possible,
                config.limits.requests_max,
            )
        # What exists now stays until the end: the collector need not go through it again and again.
        gc.collect()
        gc.freeze()
        # A request leaves no cycles behind in the usual course: look for them after more of them.
        gc.set_threshold(_GC_THRESHOLD)
        following = asyncio.create_task(proxy.reloading.follow(again))
        await stop.wait()
        following.cancel()
        proxy.handlers.pages.draining = True
        if config.timeouts.drain_delay_s:
            log.info("stopping: new requests are served for %g s more", config.timeouts.drain_delay_s)
            await asyncio.sleep(config.timeouts.drain_delay_s)
        log.info("stopping: running requests have %g s to finish", config.timeouts.drain_s)
    log.info("stopped")
