"""What the handlers work with: each barrier group with its driver, its workers' origins and its dialect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from brproxy.clock import Clock
from brproxy.engines.dialect import Dialect
from brproxy.estimate import TokenEstimator
from brproxy.fleet import Fleet, Group
from brproxy.proxy.driver import GroupDriver
from brproxy.proxy.relay import RelayLimits
from brproxy.proxy.upstream import Upstream
from brproxy.telemetry.metrics import Metrics


@dataclass(frozen=True, slots=True)
class GroupService:
    """One barrier group at work; ``origins[G]`` are its workers' "http://host:port"."""

    group: Group
    driver: GroupDriver
    origins: tuple[str, ...]
    dialect: Dialect


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """Limits of the handlers, as the configuration's ``limits`` names them."""

    requests_max: int
    retries_max: int
    retry_after_s: int
    body_bytes_max: int
    control_timeout_s: float


@dataclass(frozen=True, slots=True)
class Service:
    """Everything behind the handlers."""

    groups: Sequence[GroupService]
    fleet: Fleet
    upstream: Upstream
    estimator: TokenEstimator
    metrics: Metrics
    clock: Clock
    limits: ServiceLimits
    relay_limits: RelayLimits
    ask_usage: bool
    hash_prompts: bool
    health_checks: bool

    def choose(self, model: str) -> GroupService:
        """Return the group for a request; raises UnknownModelError."""
        chosen = self.fleet.choose(model)
        return next(service for service in self.groups if service.group is chosen)
