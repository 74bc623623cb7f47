"""From a configuration to a running proxy: builds the parts, listens, and stops in good order."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import numpy as np
from aiohttp import web

from brproxy.clock import Clock, MonotonicClock
from brproxy.config import Config, Listen, Worker
from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.engines.dialect import make_dialect
from brproxy.estimate import TokenEstimator
from brproxy.fleet import Fleet, Group
from brproxy.health import HealthThresholds
from brproxy.ledger import Ledger
from brproxy.listening import start_listening, url_of
from brproxy.open_files import (
    clients_for_open_files,
    file_number_max,
    raise_open_files_limit,
    requests_for_open_files,
)
from brproxy.prediction.predictor import AnyPredictor, make_predictor
from brproxy.proxy.asking import Prober, ProbeSettings
from brproxy.proxy.body_room import BodyRoom
from brproxy.proxy.cors import Cors
from brproxy.proxy.departures import Departures
from brproxy.proxy.driver import GroupDriver
from brproxy.proxy.errors import of_status
from brproxy.proxy.handlers import Handlers
from brproxy.proxy.service import BodyLimits, GroupService, RelayLimits, Service, ServiceLimits
from brproxy.relay.endpoint import Endpoint, EndpointSettings
from brproxy.relay.server import ClientLimits, RelayServer
from brproxy.relay.watch import Watch
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policy import make_policy
from brproxy.state_file import load_state, save_state
from brproxy.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

Listening = Callable[[web.ServerRunner, Listen], Awaitable[int]]
"""Has a runner accept connections and returns the port, as ``start_listening`` does."""

_GC_THRESHOLD = 20_000
"""Container objects more than at the last collection that start one; Python's own 700 is a few requests."""


def build_group(config: Config, name: str, workers: list[Worker], seed: np.random.SeedSequence) -> Group:
    """Build the decision core of one barrier group."""
    checks = config.health
    thresholds = HealthThresholds(checks.unhealthy_after, checks.healthy_after)
    roster = Roster(thresholds, checked=checks.enabled)
    for worker in workers:
        roster.add(worker.label, WorkerLimits(worker.slots, worker.kv_capacity_tokens), worker.url)
    dispatcher = Dispatcher(
        Ledger(roster),
        make_policy(config.routing.policy, config.policy_params()),
        make_predictor(config.prediction.predictor, config.predictor_params()),
        np.random.default_rng(seed),
        PoolLimits(config.limits.pool_requests_max, config.limits.pool_wait_s_max),
        name,
    )
    return Group(name, workers[0].models, dispatcher)


def build_service(config: Config, clock: Clock | None = None) -> Service:
    """Build everything behind the handlers; needs a running event loop. ``clock``: None for the machine's."""
    seeds = np.random.SeedSequence(config.routing.seed).spawn(len(config.groups))
    clock = clock or MonotonicClock()
    fleet = Fleet(
        [
            build_group(config, name, workers, seed)
            for (name, workers), seed in zip(config.groups.items(), seeds, strict=True)
        ]
    )
    if config.prediction.state_file:
        load_state(Path(config.prediction.state_file), _predictors(fleet), config.prediction.predictor)
    metrics = Metrics(fleet)
    limits, timeouts = config.limits, config.timeouts
    settings = endpoint_settings(config)
    services = {
        group.name: GroupService(
            group,
            GroupDriver(group, clock, config.routing.tick_ms / 1000),
            make_dialect(config.groups[group.name][0].engine),
            lambda member: Endpoint(member.origin, settings),
        )
        for group in fleet.groups
    }
    watch = Watch(_look_interval_s(config), partial(_look_after, services.values()))
    watch.also(Departures(services.values(), watch, timeouts.gone_s).look)
    return Service(
        groups=services,
        fleet=fleet,
        watch=watch,
        estimator=TokenEstimator(config.estimate.bytes_per_token, limits.models_max),
        metrics=metrics,
        clock=clock,
        limits=ServiceLimits(
            requests_max=min(limits.requests_max, requests_for_open_files()),
            retries_max=limits.retries_max,
            retry_wait_s=timeouts.retry_wait_s,
            retry_wait_s_max=timeouts.retry_wait_s_max,
            retry_after_s=limits.retry_after_s,
            control_timeout_s=config.health.timeout_s,
            control_bytes_max=limits.control_bytes_max,
            models_kept_s=limits.models_kept_s,
        ),
        body_limits=BodyLimits(
            bytes_max=limits.body_bytes_max,
            upload_bytes_max=limits.upload_bytes_max,
            stall_s=timeouts.client_stall_s,
            whole_s=timeouts.client_body_s,
        ),
        body_room=BodyRoom(limits.bodies_bytes_max, limits.retry_after_s),
        relay_limits=RelayLimits(
            first_byte_s=timeouts.first_byte_s,
            stall_s=timeouts.stall_s,
            event_bytes_max=limits.event_bytes_max,
            response_parse_bytes_max=limits.response_parse_bytes_max,
        ),
        ask_usage=config.estimate.ask_usage,
        hash_prompts=any(group.dispatcher.predictor.USES_KEYS for group in fleet.groups),
        health_checks=config.health.enabled,
    )


def endpoint_settings(config: Config) -> EndpointSettings:
    """Return how the proxy connects to workers."""
    timeouts, limits = config.timeouts, config.limits
    return EndpointSettings(
        timeouts.connect_s, timeouts.keepalive_s, limits.idle_connections_max, limits.header_bytes_max
    )


def _look_interval_s(config: Config) -> float:
    """Return how often time-outs are looked at: they are late by up to that, a tenth of the shortest."""
    timeouts = config.timeouts
    return min(1.0, 0.1 * min(timeouts.first_byte_s, timeouts.stall_s, timeouts.keepalive_s))


def _look_after(services: Iterable[GroupService], now_s: float) -> None:
    for service in services:
        for endpoint in service.endpoints:
            endpoint.expire(now_s)
        # Nobody has to look at the load for what is unbooked to stay little.
        service.driver.look_after()


class RunningProxy:
    """A proxy that listens: its service, and the port it was given."""

    def __init__(self, service: Service, handlers: Handlers, port: int) -> None:
        self.service = service
        self.handlers = handlers
        self.port = port


@asynccontextmanager
async def running_proxy(
    config: Config, *, clock: Clock | None = None, listening: Listening = start_listening
) -> AsyncIterator[RunningProxy]:
    """Listen for as long as the block runs; then drain. Raises ListenError.

    Leaving the block stops accepting, lets running requests finish for ``timeouts.drain_s`` and cancels the
    rest. ``clock`` (None: the machine's) and ``listening`` are a simulation's own, as its event loop is.
    """
    service = build_service(config, clock)
    handlers = Handlers(service)
    settings = ProbeSettings(config.health.path, config.health.interval_s, config.health.timeout_s)
    prober = Prober(list(service.groups.values()), service.clock, settings)
    server = RelayServer(
        Cors(config.listen.cors_origins).around(handlers.handle),
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
    )
    runner = web.ServerRunner(server, shutdown_timeout=config.timeouts.drain_s)
    keeping = asyncio.create_task(_keep_state(config, service))
    try:
        await runner.setup()
        if config.health.enabled:
            await prober.start()
        port = await listening(runner, config.listen)
        yield RunningProxy(service, handlers, port)
        handlers.pages.draining = True
    finally:
        await runner.cleanup()
        await handlers.pages.close()
        await prober.stop()
        keeping.cancel()
        _save_state(config, service)
        for group in service.groups.values():
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
        save_state(path, _predictors(service.fleet), config.prediction.predictor)


def _predictors(fleet: Fleet) -> dict[str, AnyPredictor]:
    return {group.name: group.dispatcher.predictor for group in fleet.groups}


async def serve(config: Config) -> None:
    """Run the proxy until SIGTERM or SIGINT; a second signal ends it without waiting for requests."""
    stop, stop_now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            stop_now.set()
        stop.set()

    raise_open_files_limit()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    run = asyncio.create_task(_run_until(config, stop))
    hurry = asyncio.create_task(stop_now.wait())
    await asyncio.wait((run, hurry), return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    if not run.done():
        log.warning("second signal: leaving without waiting for running requests")
        run.cancel()
        await asyncio.wait((run,), timeout=1.0)
        return
    run.result()


async def _run_until(config: Config, stop: asyncio.Event) -> None:
    async with running_proxy(config) as proxy:
        groups = ", ".join(f"{name} ({len(workers)} workers)" for name, workers in config.groups.items())
        log.info(
            "brproxy listens on %s, policy %s, groups: %s",
            url_of(config.listen, proxy.port),
            config.routing.policy,
            groups,
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
        await stop.wait()
        log.info("stopping: running requests have %g s to finish", config.timeouts.drain_s)
    log.info("stopped")
