"""From a configuration to the parts of a proxy, put together; nothing listens yet."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from brproxy.batches import BatchLimits, take_batches
from brproxy.clock import Clock, MonotonicClock
from brproxy.config import Config
from brproxy.config_workers import Worker
from brproxy.counters import build_counting
from brproxy.deployment import join
from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.engines.dialect import make_dialect
from brproxy.engines.transfer import Order, Transfer, make_transfer
from brproxy.estimate import TokenEstimator
from brproxy.fleet import Fleet, Group
from brproxy.health import HealthThresholds
from brproxy.ledger import Ledger
from brproxy.open_files import requests_for_open_files
from brproxy.plans import by_group
from brproxy.prediction.predictor import AnyPredictor, make_predictor
from brproxy.prefill_pace import PrefillPace
from brproxy.proxy.body_room import BodyRoom
from brproxy.proxy.cors import Cors
from brproxy.proxy.departures import Departures
from brproxy.proxy.driver import GroupDriver
from brproxy.proxy.groups import Groups
from brproxy.proxy.kept_events import Aborts
from brproxy.proxy.legs.handover import Handover, HandoverLimits
from brproxy.proxy.legs.metaserver import Metaserver, ReadPost
from brproxy.proxy.service import (
    BatchReading,
    BodyLimits,
    GroupService,
    RelayLimits,
    Service,
    ServiceLimits,
    SessionReading,
)
from brproxy.proxy.step_watch import StepWatch
from brproxy.relay.endpoint import NOTHING_ELSE, Endpoint, EndpointSettings, Reach
from brproxy.relay.hops import Hops
from brproxy.relay.watch import Watch
from brproxy.roster import Roster
from brproxy.routing.policy import AnyPolicy, make_policy
from brproxy.sessions import SessionLimits
from brproxy.state_file import load_state
from brproxy.step_costs import StepCosts
from brproxy.step_model import GivenCosts, StepModel
from brproxy.telemetry.metrics import Metrics


class GroupBuilder:
    """Builds the barrier groups of one proxy, without members; needs a running event loop.

    ``reaches`` and ``bootstrap_ports`` say how workers are reached, by URL, when they are added.
    """

    def __init__(self, config: Config, clock: Clock) -> None:
        self._seeds = np.random.SeedSequence(config.routing.seed)
        self._clock = clock
        self._endpoints = endpoint_settings(config)
        self.reaches: dict[str, Reach] = {}
        self.bootstrap_ports: dict[str, int] = {}

    def build(self, config: Config, workers: Sequence[Worker]) -> list[GroupService]:
        """Build the group of ``workers``, and the one that prefills for it, as ``config`` has them."""
        halves: dict[str, list[Worker]] = {}
        for worker in workers:
            halves.setdefault(worker.barrier_group, []).append(worker)
        services = [self._service(config, name, half) for name, half in halves.items()]
        services.sort(key=lambda service: service.group.prefills)
        if len(services) > 1:
            decoding, prefilling = services
            transfer = make_transfer(workers[0].handover)
            decoding.handover = Handover(
                prefilling,
                transfer,
                handover_limits(config, transfer),
                self.bootstrap_ports,
                secrets.randbelow,
                lambda origin: Endpoint(origin, self._endpoints, NOTHING_ELSE),
            )
        return services

    def _service(self, config: Config, name: str, workers: Sequence[Worker]) -> GroupService:
        group = build_group(config, name, workers, self._seeds.spawn(1)[0])
        return GroupService(
            group,
            GroupDriver(group, self._clock, config.routing.tick_ms / 1000),
            make_dialect(workers[0].engine),
            lambda member: Endpoint(
                member.origin, self._endpoints, self.reaches.get(member.origin, NOTHING_ELSE)
            ),
        )

    def reach(self, worker: Worker) -> None:
        """Note how ``worker`` is reached."""
        self.reaches[worker.url] = reach_of(worker)
        self.bootstrap_ports[worker.url] = worker.bootstrap_port


def build_group(config: Config, name: str, workers: Sequence[Worker], seed: np.random.SeedSequence) -> Group:
    """Build the decision core of the barrier group that ``workers`` will be in."""
    checks = config.health
    thresholds = HealthThresholds(checks.unhealthy_after, checks.healthy_after)
    share_max = checks.ejected_share_max
    roster = Roster(thresholds, checked=checks.enabled, ejected_share_max=share_max)
    prefills = workers[0].role == "prefill"
    ledger = Ledger(roster, checks.slow_start_s)
    given = given_costs(config)
    if all(worker.role == "decode" for worker in workers):
        # What is said of prefill is of those that do it.
        given = replace(given, s_per_prefill_token=None, prefill_tokens_max=None)
    steps = StepModel(ledger, given)
    # Nobody decodes there, which costs of steps are learnt from.
    pace = PrefillPace(given) if prefills else None
    dispatcher = Dispatcher(
        ledger,
        policy_of(config, prefills=prefills),
        make_predictor(config.prediction.predictor, config.predictor_params()),
        np.random.default_rng(seed),
        pool_limits(config, prefills=prefills),
        name,
        # Where prefill is apart, what a decode worker has cached spares none.
        session_limits(config) if all(worker.role == "both" for worker in workers) else None,
        steps.costs if pace is None else pace.costs,
    )
    if pace is not None:
        dispatcher.happenings.tell(pace)
    dispatcher.happenings.tell(steps.windows)
    if config.batches.header and not prefills:
        take_batches(dispatcher, batch_limits(config))
    return Group(name, workers[0].models, dispatcher, prefills, workers[0].group, steps=steps)


def given_costs(config: Config) -> GivenCosts:
    """Return what the configuration says of a step's costs, in seconds."""
    costs = config.costs

    def in_seconds(value: float | None, unit_s: float) -> float:
        return 0.0 if value is None else value * unit_s

    of_a_token = StepCosts(
        in_seconds(costs.step_base_ms, 1e-3),
        in_seconds(costs.step_ns_per_kv_token, 1e-9),
        in_seconds(costs.prefill_us_per_token, 1e-6),
        costs.prefill_tokens_max,
    ).of_a_token(costs.tokens_per_step)
    return GivenCosts(
        None if costs.step_base_ms is None else of_a_token.base_s,
        None if costs.step_ns_per_kv_token is None else of_a_token.s_per_kv_token,
        None if costs.prefill_us_per_token is None else of_a_token.s_per_prefill_token,
        of_a_token.prefill_tokens_max,
    )


def policy_of(config: Config, *, prefills: bool) -> AnyPolicy:
    """Return the policy of a group, new; ``prefills``: of one that only prefills."""
    name = config.routing.policy
    if prefills:
        in_step = config.prefill_decode.shares_barrier
        name = "prefill-in-step" if in_step else config.routing.prefill_policy
    return make_policy(name, config.policy_params(name))


def build_service(config: Config, clock: Clock | None = None, builder: GroupBuilder | None = None) -> Service:
    """Build everything behind the handlers; needs a running event loop. ``clock``: None for the machine's.

    ``builder`` builds the groups (None: one that nobody else needs).
    """
    clock = clock or MonotonicClock()
    builder = builder or GroupBuilder(config, clock)
    services = [
        service for workers in by_group(config.worker).values() for service in builder.build(config, workers)
    ]
    rosters = {service.group.name: service.group.roster for service in services}
    for worker in config.worker:
        builder.reach(worker)
        join(rosters[worker.barrier_group], worker)
    fleet = Fleet([service.group for service in services])
    if config.prediction.state_file:
        load_state(Path(config.prediction.state_file), predictors_of(fleet), config.prediction.predictor)
    metrics = Metrics(fleet)
    groups = Groups(fleet, services)
    groups.follow(_CountedGroups(metrics))
    step_watch = StepWatch(clock)
    groups.follow_all(step_watch)
    watch = Watch(look_interval_s(config), partial(_look_after, groups), step_watch.look)
    limits = config.limits
    estimator = TokenEstimator(config.estimate.bytes_per_token, limits.models_max)
    return Service(
        groups=groups,
        reaches=builder.reaches,
        bootstrap_ports=builder.bootstrap_ports,
        fleet=fleet,
        watch=watch,
        departures=Departures(groups, watch, config.timeouts.gone_s),
        estimator=estimator,
        counting=build_counting(config, groups, estimator, clock),
        metrics=metrics,
        clock=clock,
        limits=service_limits(config),
        body_limits=body_limits(config),
        body_room=BodyRoom(limits.bodies_bytes_max, limits.retry_after_s),
        relay_limits=relay_limits(config),
        cors=Cors(config.listen.cors_origins),
        metaserver=Metaserver(lambda: _post_readers(groups), config.timeouts.client_body_s),
        hops=Hops(config.forwarding.x_forwarded, via=config.forwarding.via),
        aborts=Aborts(),
        ask_usage=config.estimate.ask_usage,
        batches=BatchReading(config.batches.header, config.batches.id_bytes_max),
        sessions=SessionReading(config.affinity.enabled, config.affinity.by_messages),
        hash_prompts=any(group.dispatcher.predictor.USES_KEYS for group in fleet.groups),
        health_checks=config.health.enabled,
    )


class _CountedGroups:
    """Has ``metrics`` follow the groups."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def group_came(self, service: GroupService) -> None:
        """See groups.Follower."""
        self._metrics.group_came(service.group)

    def group_gone(self, service: GroupService) -> None:
        """See groups.Follower."""
        self._metrics.group_gone(service.group)


def service_limits(config: Config) -> ServiceLimits:
    """Return the limits of the handlers."""
    limits, timeouts = config.limits, config.timeouts
    return ServiceLimits(
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
    )


def body_limits(config: Config) -> BodyLimits:
    """Return the limits of one request's body."""
    limits, timeouts = config.limits, config.timeouts
    return BodyLimits(
        bytes_max=limits.body_bytes_max,
        upload_bytes_max=limits.upload_bytes_max,
        stall_s=timeouts.client_stall_s,
        whole_s=timeouts.client_body_s,
    )


def relay_limits(config: Config) -> RelayLimits:
    """Return the limits of one response."""
    limits, timeouts = config.limits, config.timeouts
    return RelayLimits(
        first_byte_s=timeouts.first_byte_s,
        stall_s=timeouts.stall_s,
        paused_s_max=timeouts.paused_s_max,
        event_bytes_max=limits.event_bytes_max,
        response_parse_bytes_max=limits.response_parse_bytes_max,
    )


def pool_limits(config: Config, *, prefills: bool) -> PoolLimits:
    """Return the limits of who waits in a group; ``prefills``: in one where nothing grows."""
    limits = config.limits
    share = 0.0 if prefills else limits.kv_growth_share
    return PoolLimits(limits.pool_requests_max, limits.pool_wait_s_max, share)


def settle(service: Service, config: Config) -> None:
    """Have ``service`` take up what ``config`` says of it; see plans.is_live."""
    service.limits = service_limits(config)
    service.body_limits = body_limits(config)
    service.body_room.retry_after_s = config.limits.retry_after_s
    service.relay_limits = relay_limits(config)
    service.departures.gone_s = config.timeouts.gone_s
    service.watch.interval_s = look_interval_s(config)
    for each in service.groups.each():
        dispatcher = each.group.dispatcher
        dispatcher.limits = pool_limits(config, prefills=each.group.prefills)
        each.driver.tick_every(config.routing.tick_ms / 1000)
        policy = policy_of(config, prefills=each.group.prefills)
        if type(policy) is not type(dispatcher.policy) or policy.params != dispatcher.policy.params:
            dispatcher.decide_by(policy)
        if each.handover is not None:
            each.handover.limits = handover_limits(config, each.handover.transfer)


def handover_limits(config: Config, transfer: Transfer) -> HandoverLimits:
    """Return the limits of requests in two legs."""
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


def _post_readers(groups: Groups) -> list[ReadPost]:
    """Return what reads the posts of decode workers."""
    transfers = [service.handover.transfer for service in groups.each() if service.handover is not None]
    return [transfer.read_post for transfer in transfers if transfer.ORDER is Order.DECODE_FIRST]


def session_limits(config: Config) -> SessionLimits | None:
    """Return how sessions are remembered, None if they are not."""
    affinity = config.affinity
    if not affinity.enabled:
        return None
    return SessionLimits(affinity.sessions_max, affinity.kept_s, affinity.block_tokens, affinity.discount)


def batch_limits(config: Config) -> BatchLimits:
    """Return how much is known of closed batches."""
    own = config.batches
    return BatchLimits(own.batches_max, own.prompts_max, own.kept_s)


def reach_of(worker: Worker) -> Reach:
    """Return how the proxy reaches ``worker``, besides its URL."""
    return Reach(worker.fields, worker.tls_files)


def endpoint_settings(config: Config) -> EndpointSettings:
    """Return how the proxy connects to workers."""
    timeouts, limits = config.timeouts, config.limits
    return EndpointSettings(
        timeouts.connect_s, timeouts.keepalive_s, limits.idle_connections_max, limits.header_bytes_max
    )


def look_interval_s(config: Config) -> float:
    """Return how often time-outs are looked at: they are late by up to that, a tenth of the shortest."""
    timeouts = config.timeouts
    return min(1.0, 0.1 * min(timeouts.first_byte_s, timeouts.stall_s, timeouts.keepalive_s))


def _look_after(groups: Groups, now_s: float) -> None:
    for service in groups.each():
        for endpoint in service.endpoints:
            endpoint.expire(now_s)
        # Nobody has to look at the load for what is unbooked to stay little.
        service.driver.look_after()


def predictors_of(fleet: Fleet) -> dict[str, AnyPredictor]:
    """Return the predictor of each group that stays, by the group's name."""
    return {group.name: group.dispatcher.predictor for group in fleet.groups if not group.leaves}
