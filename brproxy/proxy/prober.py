"""Active health checks: one task for each worker asks its health path and records the result."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from http import HTTPStatus

from brproxy.clock import Clock
from brproxy.health import Health
from brproxy.proxy.control import ControlClient
from brproxy.proxy.service import GroupService
from brproxy.relay.errors import WorkerFailedError
from brproxy.types import WorkerIndex

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """``path``: empty for the engine's own. Seconds between two checks of a worker, and for one."""

    path: str
    interval_s: float
    timeout_s: float


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Whether the worker answered 2xx, and what it did in words."""

    ok: bool
    reason: str


async def probe(control: ControlClient, origin: str, path: str, timeout_s: float) -> ProbeResult:
    """Ask ``origin`` once; never raises for what a worker does."""
    try:
        status, _ = await control.get(origin, path, timeout_s)
    except WorkerFailedError as error:
        return ProbeResult(ok=False, reason=str(error))
    ok = HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES
    return ProbeResult(ok, f"{path} answers {status}")


class Prober:
    """Checks every worker of ``services`` for as long as it runs."""

    def __init__(
        self, services: list[GroupService], control: ControlClient, clock: Clock, settings: ProbeSettings
    ) -> None:
        self._services = services
        self._control = control
        self._clock = clock
        self._settings = settings
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Check every worker once, so that traffic need not wait for the first interval; then go on."""
        workers = [(s, WorkerIndex(i)) for s in self._services for i in range(len(s.pools))]
        await asyncio.gather(*(self._check(service, worker) for service, worker in workers))
        for position, (service, worker) in enumerate(workers):
            # Spread over the interval, so that a large group is not asked all at one instant.
            delay_s = self._settings.interval_s * (1 + position / len(workers))
            self._tasks.append(asyncio.create_task(self._run(service, worker, delay_s)))

    async def stop(self) -> None:
        """End all checks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, service: GroupService, worker: WorkerIndex, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        while True:
            await self._check(service, worker)
            await asyncio.sleep(self._settings.interval_s)

    async def _check(self, service: GroupService, worker: WorkerIndex) -> None:
        path = self._settings.path or service.dialect.HEALTH_PATH
        result = await probe(self._control, service.pools[worker].origin, path, self._settings.timeout_s)
        health = service.group.health
        changed = health.record(worker, ok=result.ok, reason=result.reason, now_s=self._clock.now_s())
        if changed:
            name, state = service.group.worker_names[worker], health.trackers[worker].state
            level = logging.INFO if state is Health.HEALTHY else logging.WARNING
            log.log(level, "worker %s is %s: %s", name, state.value, result.reason)
