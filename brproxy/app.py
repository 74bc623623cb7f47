"""A running proxy: it listens, drains and stops in good order."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from aiohttp import web

from brproxy.admin import running_admin
from brproxy.build import build_service, predictors_of, reach_of
from brproxy.clock import Clock
from brproxy.config import Config
from brproxy.config_sections import Listen
from brproxy.config_workers import Worker
from brproxy.deployment import Deployment
from brproxy.discovery import fill_in
from brproxy.fault_tolerance import RecoverySettings
from brproxy.listening import start_listening, urls_of
from brproxy.offsets import OffsetSettings
from brproxy.open_files import clients_for_open_files, file_number_max, raise_open_files_limit
from brproxy.proxy.asking import Prober, ProbeSettings
from brproxy.proxy.errors import of_status
from brproxy.proxy.fault_watch import FaultWatch, WatchSettings
from brproxy.proxy.handlers import Handlers
from brproxy.proxy.in_band import InBand
from brproxy.proxy.polling import Poller, PollSettings
from brproxy.proxy.service import Service
from brproxy.relay.server import ClientLimits, RelayServer
from brproxy.reloading import Reloading
from brproxy.resolving import Resolved, Resolver, Resolving
from brproxy.returning import Returning
from brproxy.signals import GroupSignals
from brproxy.state_file import save_state
from brproxy.telemetry.engine_metrics import EngineMetrics
from brproxy.telemetry.fault_metrics import FaultMetrics
from brproxy.telemetry.handover_metrics import HandoverMetrics

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
    deployment: Deployment
    reloading: Reloading
    returning: Returning
    resolving: Resolving
    port: int
    admin_port: int | None


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
    service = build_service(config, clock)
    handlers = Handlers(service)

    def reach(worker: Worker) -> None:
        service.reaches[worker.url] = reach_of(worker)
        service.bootstrap_ports[worker.url] = worker.bootstrap_port

    deployment = Deployment(config, service.fleet, reach)
    resolver = resolver or Resolver(config.discovery.timeout_s)
    resolving = Resolving(resolver, deployment, config.discovery.resolve_interval_s)
    settings = ProbeSettings(config.health.path, config.health.interval_s, config.health.timeout_s)
    prober = Prober(list(service.groups.values()), service.clock, settings)
    returning = Returning(service.fleet.groups, deployment)
    reloading = Reloading(deployment, path, resolving, returning)
    poller = _poller(config, service, returning)
    faults = _fault_watch(config, service)
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
        if config.discovery.enabled:
            returning.start()
        if config.health.enabled:
            await prober.start()
        async with running_admin(config.admin, service, deployment, reloading) as admin_port:
            port = await listening(runner, config.listen)
            poller.start()
            faults.start()
            if config.telemetry.enabled:
                handlers.adapters.start()
            if resolved is not None:
                resolving.follow(resolved)
            yield RunningProxy(
                service, handlers, deployment, reloading, returning, resolving, port, admin_port
            )
        handlers.pages.draining = True
    finally:
        try:
            await runner.cleanup()
            await handlers.pages.close()
            for group in service.groups.values():
                if group.handover is not None:
                    await group.handover.close()
            for part in (prober, poller, faults, returning, resolving, handlers.adapters):
                await part.stop()
        finally:
            # Also by a second signal, which ends the waiting above.
            keeping.cancel()
            _save_state(config, service)
            _close(service)


def _close(service: Service) -> None:
    for group in service.groups.values():
        group.driver.close()
        for endpoint in group.endpoints:
            endpoint.close()
    service.watch.close()


def _poller(config: Config, service: Service, returning: Returning) -> Poller:
    """Return what asks engines for their load, of no group where that is off; metrics show what they say.

    ``returning`` is told who has started anew.
    """
    telemetry, clock = config.telemetry, service.clock
    settings = OffsetSettings(telemetry.lag_s, telemetry.stale_s, telemetry.half_life_s)
    groups = [
        (each, GroupSignals(name, each.group.dispatcher.ledger, settings, partial(returning.restarted, name)))
        for name, each in service.groups.items()
        if telemetry.enabled
    ]
    for each, signals in groups:
        # What is booked where prefill is apart is with its engine no more once it is done.
        if not each.group.prefills:
            each.signals = signals
            if telemetry.in_band and each.dialect.LOAD_IN_BAND:
                each.in_band = InBand(signals, clock)
    service.metrics.also(EngineMetrics([signals for _, signals in groups], clock))
    handovers = {name: each.handover.counts for name, each in service.groups.items() if each.handover}
    service.metrics.also(HandoverMetrics(handovers))
    polls = PollSettings(telemetry.interval_s, telemetry.timeout_s, config.limits.control_bytes_max)
    return Poller(groups, clock, polls)


def _fault_watch(config: Config, service: Service) -> FaultWatch:
    """Return what watches for failed ranks, of no group where that is off; metrics show what comes of it."""
    own = config.fault_tolerance
    recovery = RecoverySettings(own.recovery_s, own.retries_max, own.retry_wait_s)
    settings = WatchSettings(own.interval_s, own.timeout_s, recovery)
    watch = FaultWatch(service.groups.values() if own.enabled else (), service.clock, settings)
    service.metrics.also(FaultMetrics(watch.recoveries))
    return watch


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
