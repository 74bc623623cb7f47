"""From a configuration to the parts of a proxy, put together; nothing listens yet."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from brproxy.clock import Clock, MonotonicClock
from brproxy.config import Config
from brproxy.config_workers import Worker
from brproxy.deployment import join
from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.engines.dialect import make_dialect
from brproxy.engines.transfer import Order, Transfer, make_transfer
from brproxy.estimate import TokenEstimator
from brproxy.fleet import Fleet, Group
from brproxy.health import HealthThresholds
from brproxy.ledger import Ledger
from brproxy.open_files import requests_for_open_files
from brproxy.prediction.predictor import AnyPredictor, make_predictor
from brproxy.proxy.body_room import BodyRoom
from brproxy.proxy.cors import Cors
from brproxy.proxy.departures import Departures
from brproxy.proxy.driver import GroupDriver
from brproxy.proxy.legs.handover import Handover, HandoverLimits
from brproxy.proxy.legs.metaserver import Metaserver
from brproxy.proxy.service import (
    BodyLimits,
    GroupService,
    RelayLimits,
    Service,
    ServiceLimits,
    SessionReading,
)
from brproxy.relay.endpoint import NOTHING_ELSE, Endpoint, EndpointSettings, Reach
from brproxy.relay.hops import Hops
from brproxy.relay.watch import Watch
from brproxy.roster import Roster
from brproxy.routing.policy import make_policy
from brproxy.sessions import SessionLimits
from brproxy.state_file import load_state
from brproxy.telemetry.metrics import Metrics


def build_group(config: Config, name: str, workers: list[Worker], seed: np.random.SeedSequence) -> Group:
    """Build the decision core of one barrier group."""
    checks = config.health
    thresholds = HealthThresholds(checks.unhealthy_after, checks.healthy_after)
    share_max = checks.ejected_share_max
    roster = Roster(thresholds, checked=checks.enabled, ejected_share_max=share_max)
    for worker in workers:
        join(roster, worker)
    prefills = workers[0].role == "prefill"
    policy = config.routing.prefill_policy if prefills else config.routing.policy
    dispatcher = Dispatcher(
        Ledger(roster, checks.slow_start_s),
        make_policy(policy, config.policy_params(policy)),
        make_predictor(config.prediction.predictor, config.predictor_params()),
        np.random.default_rng(seed),
        PoolLimits(config.limits.pool_requests_max, config.limits.pool_wait_s_max),
        name,
        # Where prefill is apart, what a decode worker has cached spares none.
        session_limits(config) if workers[0].role == "both" else None,
    )
    return Group(name, workers[0].models, dispatcher, prefills)


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
        load_state(Path(config.prediction.state_file), predictors_of(fleet), config.prediction.predictor)
    metrics = Metrics(fleet)
    limits, timeouts = config.limits, config.timeouts
    settings = endpoint_settings(config)
    reaches = {worker.url: reach_of(worker) for worker in config.worker}
    bootstrap_ports = {worker.url: worker.bootstrap_port for worker in config.worker}
    services = {
        group.name: GroupService(
            group,
            GroupDriver(group, clock, config.routing.tick_ms / 1000),
            make_dialect(config.groups[group.name][0].engine),
            lambda member: Endpoint(member.origin, settings, reaches.get(member.origin, NOTHING_ELSE)),
        )
        for group in fleet.groups
    }
    for name, workers in config.groups.items():
        if workers[0].role == "prefill":
            transfer = make_transfer(workers[0].handover)
            services[workers[0].group].handover = Handover(
                services[name],
                transfer,
                _handover_limits(config, transfer),
                bootstrap_ports,
                secrets.randbelow,
                lambda origin: Endpoint(origin, settings, NOTHING_ELSE),
            )
    watch = Watch(_look_interval_s(config), partial(_look_after, services.values()))
    watch.also(Departures(services.values(), watch, timeouts.gone_s).look)
    return Service(
        groups=services,
        reaches=reaches,
        bootstrap_ports=bootstrap_ports,
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
            comments_s=timeouts.keepalive_comments_s,
            failovers_max=limits.failovers_max,
            recomputed_max=config.prefill_decode.recomputed_max,
            kept_text_bytes_max=limits.kept_text_bytes_max,
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
            paused_s_max=timeouts.paused_s_max,
            event_bytes_max=limits.event_bytes_max,
            response_parse_bytes_max=limits.response_parse_bytes_max,
        ),
        cors=Cors(config.listen.cors_origins),
        metaserver=_metaserver(services.values(), timeouts.client_body_s),
        hops=Hops(config.forwarding.x_forwarded, via=config.forwarding.via),
        ask_usage=config.estimate.ask_usage,
        sessions=SessionReading(config.affinity.enabled, config.affinity.by_messages),
        hash_prompts=any(group.dispatcher.predictor.USES_KEYS for group in fleet.groups),
        health_checks=config.health.enabled,
    )


def _handover_limits(config: Config, transfer: Transfer) -> HandoverLimits:
    own, listen = config.prefill_decode, config.listen
    host = listen.host if isinstance(listen.host, str) else listen.host[0]
    return HandoverLimits(
        split_prompt_tokens_min=own.split_prompt_tokens_min,
        lease_s=own.lease_s or transfer.LEASE_S,
        free_at_once_max=own.free_at_once_max,
        free_timeout_s=own.free_timeout_s,
        finish_s=own.finish_prefill_s,
        metaserver_url=own.metaserver_url or f"http://{host}:{listen.port}",
        health_checks=config.health.enabled,
    )


def _metaserver(services: Iterable[GroupService], body_s: float) -> Metaserver:
    """Return what decode workers ask for prefills."""
    transfers = [service.handover.transfer for service in services if service.handover is not None]
    readers = [transfer.read_post for transfer in transfers if transfer.ORDER is Order.DECODE_FIRST]
    return Metaserver(readers, body_s)


def session_limits(config: Config) -> SessionLimits | None:
    """Return how sessions are remembered, None if they are not."""
    affinity = config.affinity
    if not affinity.enabled:
        return None
    return SessionLimits(affinity.sessions_max, affinity.kept_s, affinity.block_tokens, affinity.discount)


def reach_of(worker: Worker) -> Reach:
    """Return how the proxy reaches ``worker``, besides its URL."""
    return Reach(worker.fields, worker.tls_files)


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


def predictors_of(fleet: Fleet) -> dict[str, AnyPredictor]:
    """Return the predictor of each group, by the group's name."""
    return {group.name: group.dispatcher.predictor for group in fleet.groups}
