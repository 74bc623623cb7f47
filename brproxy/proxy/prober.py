"""Active health checks: one task for each worker asks its health path and records the result."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus

from brproxy.clock import Clock
from brproxy.health import Health
from brproxy.proxy.control import ControlClient
from brproxy.proxy.service import GroupService
from brproxy.relay.errors import WorkerFailedError
from brproxy.roster import Change, Member

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
    """Checks every member of ``services`` for as long as it runs, those that come later included."""

    def __init__(
        self, services: list[GroupService], control: ControlClient, clock: Clock, settings: ProbeSettings
    ) -> None:
        self._services = services
        self._control = control
        self._clock = clock
        self._settings = settings
        self._tasks: dict[Member, asyncio.Task[None]] = {}
        self._is_running = False

    async def start(self) -> None:
        """Check every member once, so that traffic need not wait for the first interval; then go on."""
        members = [(s, member) for s in self._services for member in s.group.roster.members]
        await asyncio.gather(*(self._check(service, member) for service, member in members))
        for position, (service, member) in enumerate(members):
            # Spread over the interval, so that a large group is not asked all at one instant.
            self._begin(service, member, self._settings.interval_s * (1 + position / len(members)))
        for service in self._services:
            service.group.roster.observe(partial(self._member_changed, service))
        self._is_running = True

    async def stop(self) -> None:
        """End all checks."""
        self._is_running = False
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, service: GroupService, member: Member, delay_s: float) -> None:
        self._tasks[member] = asyncio.create_task(self._run(service, member, delay_s))

    def _member_changed(self, service: GroupService, member: Member, change: Change) -> None:
        if change is Change.ADDED and self._is_running:
            self._begin(service, member, 0.0)
        elif change is Change.GONE and member in self._tasks:
            self._tasks.pop(member).cancel()

    async def _run(self, service: GroupService, member: Member, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        while True:
            await self._check(service, member)
            await asyncio.sleep(self._settings.interval_s)

    async def _check(self, service: GroupService, member: Member) -> None:
        path = self._settings.path or service.dialect.HEALTH_PATH
        result = await probe(self._control, member.origin, path, self._settings.timeout_s)
        roster, now_s = service.group.roster, self._clock.now_s()
        if roster.record_of(member, ok=result.ok, reason=result.reason, now_s=now_s):
            level = logging.INFO if member.health.state is Health.HEALTHY else logging.WARNING
            log.log(level, "worker %s is %s: %s", member.key, member.health.state.value, result.reason)
