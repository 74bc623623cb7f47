"""What works beside the handlers while a proxy runs: it checks and asks workers, follows file and names."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

from brproxy.build import GroupBuilder
from brproxy.config import Config
from brproxy.deployment import Deployment
from brproxy.fault_tolerance import RecoverySettings
from brproxy.making import GroupMaker
from brproxy.offsets import OffsetSettings
from brproxy.proxy.asking import Prober, ProbeSettings
from brproxy.proxy.fault_watch import FaultWatch, WatchSettings
from brproxy.proxy.handlers import Handlers
from brproxy.proxy.in_band import InBand
from brproxy.proxy.polling import Poller, PollSettings
from brproxy.proxy.retiring import Retiring
from brproxy.proxy.service import GroupService, Service
from brproxy.reloading import Reloading
from brproxy.resolving import Resolver, Resolving
from brproxy.returning import Returning
from brproxy.signals import GroupSignals
from brproxy.telemetry.count_metrics import CountMetrics
from brproxy.telemetry.engine_metrics import EngineMetrics
from brproxy.telemetry.fault_metrics import FaultMetrics
from brproxy.telemetry.handover_metrics import HandoverMetrics
from brproxy.telemetry.step_metrics import StepMetrics


class Parts:
    """The parts around ``service``, whose groups ``builder`` builds; each follows the groups.

    ``path`` is the file that is read again when asked (None: there is none); ``resolver`` looks up names.
    """

    def __init__(
        self,
        config: Config,
        service: Service,
        builder: GroupBuilder,
        handlers: Handlers,
        path: Path | None,
        resolver: Resolver | None,
    ) -> None:
        self._config = config
        self._service = service
        self._handlers = handlers
        groups, clock = service.groups, service.clock
        self._retiring = Retiring(groups, service.watch, config.timeouts.drain_s)
        self._prober = Prober(groups.each(), clock, probe_settings(config))
        self._poller = Poller(self._signals_of, clock, poll_settings(config))
        self._faults = FaultWatch(clock, _watch_settings(config))
        maker = GroupMaker(service, builder, self._retiring, self._settle)
        self.deployment = Deployment(config, service.fleet, maker)
        resolver = resolver or Resolver(config.discovery.timeout_s)
        self.resolving = Resolving(resolver, self.deployment, config.discovery.resolve_interval_s)
        self.returning = Returning(groups, self.deployment)
        self.reloading = Reloading(self.deployment, path, self.resolving, self.returning)
        self._follow()
        self._show()

    async def check_workers(self) -> None:
        """Have the first checks made, so that the port opens when somebody is known to be well."""
        if self._config.discovery.enabled:
            self.returning.start()
        if self._config.health.enabled:
            await self._prober.start()

    def start(self) -> None:
        """Begin with all else."""
        self._poller.start()
        self._faults.start()
        if self._config.telemetry.enabled:
            self._handlers.adapters.start()

    async def stop(self) -> None:
        """End all that is under way."""
        await self._retiring.stop()
        for group in self._service.groups.each():
            if group.handover is not None:
                await group.handover.close()
        adapters = self._handlers.adapters
        for part in (self._prober, self._poller, self._faults, self.returning, self.resolving, adapters):
            await part.stop()
        if self._service.counting is not None:
            await self._service.counting.close()

    def _follow(self) -> None:
        groups, config = self._service.groups, self._config
        for follower in (self._prober, self._handlers):
            groups.follow(follower)
        for part, is_on in (
            (self._poller, config.telemetry.enabled),
            (self._faults, config.fault_tolerance.enabled),
        ):
            if is_on:
                groups.follow_all(part)

    def _settle(self, config: Config) -> None:
        self._prober.settings = probe_settings(config)
        self._poller.settings = poll_settings(config)
        self._handlers.look_at_settings()

    def _signals_of(self, service: GroupService) -> GroupSignals:
        """Return what takes in the load that engines of a group tell."""
        telemetry = self._config.telemetry
        settings = OffsetSettings(telemetry.lag_s, telemetry.stale_s, telemetry.half_life_s)
        restarted = partial(self.returning.restarted, service.group)
        signals = GroupSignals(service.group.dispatcher.ledger, settings, restarted)
        # What is booked where prefill is apart is with its engine no more once it is done.
        if not service.group.prefills:
            service.signals = signals
            if telemetry.in_band and service.dialect.LOAD_IN_BAND:
                service.in_band = InBand(signals, self._service.clock)
        return signals

    def _show(self) -> None:
        """Have the metrics show what engines say, and what became of prefills and of faults."""
        service = self._service

        def handovers() -> dict[str, Counter[str]]:
            return {name: each.handover.counts for name, each in service.groups.items() if each.handover}

        service.metrics.also(EngineMetrics(self._poller.signals, service.clock))
        service.metrics.also(HandoverMetrics(handovers))
        service.metrics.also(StepMetrics(service.fleet))
        service.metrics.also(CountMetrics(service.counting.stats if service.counting else None))
        service.metrics.also(FaultMetrics(lambda: self._faults.recoveries))


def probe_settings(config: Config) -> ProbeSettings:
    """Return how workers are checked."""
    return ProbeSettings(config.health.path, config.health.interval_s, config.health.timeout_s)


def poll_settings(config: Config) -> PollSettings:
    """Return how engines are asked for their load."""
    telemetry = config.telemetry
    return PollSettings(telemetry.interval_s, telemetry.timeout_s, config.limits.control_bytes_max)


def _watch_settings(config: Config) -> WatchSettings:
    """Return how groups are looked at for faults."""
    own = config.fault_tolerance
    recovery = RecoverySettings(own.recovery_s, own.retries_max, own.retry_wait_s)
    return WatchSettings(own.interval_s, own.timeout_s, recovery)
