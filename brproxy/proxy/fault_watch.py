"""Watches barrier groups for failed ranks, and tells those that wait for it to go on.

It is the controller outside that vLLM's fault tolerance waits for. A worker that says it waits or is dead is
out until it says otherwise, whatever its health check answers. So is the rest of its group until the fault is
over: who has not noticed it hangs all the same. What they have not answered waits, or goes to another group.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from http import HTTPStatus

from brproxy.clock import Clock
from brproxy.engines.fault_pages import (
    APPLY_PATH,
    BYTES_MAX,
    RETRY,
    STATUS_PATH,
    Report,
    Standing,
    read_instruction_id,
    read_status,
)
from brproxy.fault_tolerance import Action, Event, Recovery, RecoverySettings
from brproxy.health import Health
from brproxy.logs import SparingLog
from brproxy.proxy.asking import Question, ask
from brproxy.proxy.service import GroupService
from brproxy.relay.endpoint import Endpoint
from brproxy.relay.errors import WorkerFailedError

log = logging.getLogger(__name__)

_SAYINGS = {
    Event.FAULT: (logging.WARNING, "a rank has failed"),
    Event.TELL: (logging.WARNING, "nobody is healthy: all that wait retry"),
    Event.FAILED: (logging.WARNING, "the retry has failed"),
    Event.GIVEN_UP: (logging.ERROR, "the fault is given up, its workers have to be started anew"),
    Event.RECOVERED: (logging.INFO, "the fault is over"),
    Event.GONE: (logging.WARNING, "the fault is over, and so is the group: nobody is healthy"),
}
_HELD = "hangs until a fault of its group is over"
_OUT = {Standing.UNHEALTHY: "waits after a fault", Standing.DEAD: "says that it is dead"}


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """Seconds between two looks at a group, and for one answer; and how its recovery goes."""

    interval_s: float
    timeout_s: float
    recovery: RecoverySettings


class FaultWatch:
    """Looks at the groups that it is told of whose engine has fault tolerance, while it runs: a task each."""

    def __init__(self, clock: Clock, settings: WatchSettings) -> None:
        self._clock = clock
        self._settings = settings
        self._recoveries: dict[GroupService, Recovery] = {}
        self._tasks: dict[GroupService, asyncio.Task[None]] = {}
        self._without: set[str] = set()
        self._bugs = SparingLog(log)
        self._is_running = False

    @property
    def recoveries(self) -> dict[str, Recovery]:
        """How each group stands, by its name."""
        return {service.group.name: recovery for service, recovery in self._recoveries.items()}

    def start(self) -> None:
        """Begin to look."""
        self._is_running = True
        self._tasks = {service: asyncio.create_task(self._run(service)) for service in self._recoveries}

    def group_came(self, service: GroupService) -> None:
        """See groups.Follower."""
        if service.dialect.TELLS_FAULTS:
            self._recoveries[service] = Recovery(self._settings.recovery)
            if self._is_running:
                self._tasks[service] = asyncio.create_task(self._run(service))

    def group_gone(self, service: GroupService) -> None:
        """See groups.Follower."""
        self._recoveries.pop(service, None)
        if service in self._tasks:
            self._tasks.pop(service).cancel()

    async def stop(self) -> None:
        """End all looks; ranks that wait then are told nothing more."""
        self._is_running = False
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, service: GroupService) -> None:
        while True:
            try:
                await self._look(service)
            except Exception as error:  # noqa: BLE001 - logged; else nobody would look at this group again
                text = "looking for faults of group %s failed"
                self._bugs.log(logging.ERROR, text, service.group.name, exc_info=error)
            await asyncio.sleep(self._settings.interval_s)

    async def _look(self, service: GroupService) -> None:
        recovery = self._recoveries[service]
        endpoints = {endpoint.origin: endpoint for endpoint in service.endpoints}
        answers = await asyncio.gather(*(self._ask(endpoint) for endpoint in endpoints.values()))
        reports = {origin: each for origin, each in zip(endpoints, answers, strict=True) if each is not None}
        action = recovery.look(reports, self._clock.now_s())
        ids = dict.fromkeys(action.tell, "")
        try:
            _say(service.group.name, action, reports)
            for origin, endpoint in endpoints.items():
                self._judge(service, endpoint, reports.get(origin), _HELD if recovery.holds else "")
            given = await asyncio.gather(*(self._tell(endpoints[origin]) for origin in action.tell))
            ids = dict(zip(action.tell, given, strict=True))
        finally:
            # Whatever went wrong: else there would be no look any more.
            if action.event is Event.TELL:
                recovery.heard(ids, self._clock.now_s())

    def _judge(self, service: GroupService, endpoint: Endpoint, report: Report | None, held: str) -> None:
        """Take a worker out for what it says, or for what ``held`` says of its group; or let it be again.

        Without an answer all stays as it is.
        """
        standing = Standing.HEALTHY if report is None else report.standing
        if standing in {Standing.SILENT, Standing.ABSENT}:
            return
        reason = _OUT.get(standing, held)
        if standing in _OUT and report is not None and report.reason:
            reason += f" ({report.reason})"
        for member in service.accuse(endpoint, reason, self._clock.now_s()):
            is_well = member.health.state is Health.HEALTHY
            level = logging.INFO if is_well else logging.WARNING
            log.log(level, "worker %s is %s: %s", member.key, member.health.state.value, member.health.reason)

    async def _ask(self, endpoint: Endpoint) -> Report | None:
        """Return how a server stands, None for one without fault tolerance."""
        try:
            reply = await ask(endpoint, Question(STATUS_PATH, self._settings.timeout_s, BYTES_MAX))
        except WorkerFailedError as error:
            return Report(Standing.ABSENT if error.refused else Standing.SILENT, str(error))
        status = reply.head.status
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return Report(Standing.SILENT, f"{STATUS_PATH} answers {status}")
        report = read_status(reply.body) if status == HTTPStatus.OK else None
        if report is not None:
            self._without.discard(endpoint.origin)
        elif endpoint.origin not in self._without:
            self._without.add(endpoint.origin)
            text = "worker %s does not tell of faults (vllm serve --enable-fault-tolerance): %s answers %d%s"
            unread = ", and nothing that is known" if status == HTTPStatus.OK else ""
            log.warning(text, endpoint.origin, STATUS_PATH, status, unread)
        return report

    async def _tell(self, endpoint: Endpoint) -> str:
        """Tell a server to retry; return the id that it gave to that, "" if it did not take it."""
        question = Question(APPLY_PATH, self._settings.timeout_s, BYTES_MAX, document=RETRY)
        try:
            reply = await ask(endpoint, question)
        except WorkerFailedError as error:
            log.warning("worker %s could not be told to retry: %s", endpoint.origin, error)
            return ""
        if reply.head.status != HTTPStatus.ACCEPTED:
            text = "worker %s did not take the retry: %s answers %d"
            log.warning(text, endpoint.origin, APPLY_PATH, reply.head.status)
            return ""
        # Without an id it cannot say that this one failed: then only time tells.
        return read_instruction_id(reply.body) or "accepted"


def _say(name: str, action: Action, reports: dict[str, Report]) -> None:
    if action.event is not None:
        level, saying = _SAYINGS[action.event]
        standings = [report.standing for report in reports.values()]
        counted = ", ".join(f"{standings.count(each)} {each.value}" for each in Standing if each in standings)
        first = next((f": {each.reason}" for each in reports.values() if each.reason), "")
        log.log(level, "group %s: %s; of its servers %s%s", name, saying, counted or "none answers", first)
