"""What the proxy itself asks workers, bounded in bytes and in time; and the checks of their health.

Questions go over the same endpoints as clients' requests: what connects, reads HTTP and knows a shortage of
this machine from a fault of a worker is there once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from http import HTTPStatus

from brproxy.clock import Clock
from brproxy.health import Health
from brproxy.logs import SparingLog
from brproxy.proxy.exchange.collect import Collect, Reply
from brproxy.proxy.service import GroupService
from brproxy.relay.endpoint import Endpoint
from brproxy.relay.errors import ShortageError, StaleConnectionError, WorkerFailedError
from brproxy.relay.request import body_length, request_head
from brproxy.roster import Change, Member

log = logging.getLogger(__name__)

HEALTH_BYTES_MAX = 1 << 16
"""Read of a health check's body, which nobody looks at: a connection is kept for a short one only (bytes)."""

IDENTITY = b"Accept-Encoding: identity\r\n"
_CREDENTIALS = frozenset({b"authorization", b"api-key", b"x-api-key"})


def credentials_of(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the lines by which a client with these header fields says who it is."""
    return b"".join(b"%b: %b\r\n" % field for field in fields if field[0].lower() in _CREDENTIALS)


@dataclass(frozen=True, slots=True)
class Question:
    """A GET for ``path``: answered as a whole within ``timeout_s``, with a body of ``bytes_max`` at most.

    ``lines`` are header fields that go with it, each with its line end. ``afresh``: on a new connection.
    With a ``document``, which is JSON, it is a POST of that.
    """

    path: str
    timeout_s: float
    bytes_max: int
    wants_body: bool = True
    lines: bytes = b""
    afresh: bool = False
    document: bytes = b""

    def request(self, endpoint: Endpoint) -> bytes:
        """Return the request as it goes to ``endpoint``."""
        path, lines = endpoint.adapted(self.path, self.lines)
        if not self.document:
            return request_head("GET", path, endpoint.host_field, lines)
        lines += b"Content-Type: application/json\r\n" + body_length("POST", self.document)
        return request_head("POST", path, endpoint.host_field, lines) + self.document


async def ask(endpoint: Endpoint, question: Question) -> Reply:
    """Ask ``endpoint``; raises WorkerFailedError, of which ShortageError when it could not be asked.

    Redirects are not followed: they are replies. A kept connection that turns out to be closed is replaced
    by a new one.
    """
    try:
        async with asyncio.timeout(question.timeout_s):
            return await _ask(endpoint, question)
    except TimeoutError as error:
        msg = f"{endpoint.origin}{question.path} did not answer within {question.timeout_s:g} s"
        raise WorkerFailedError(msg, unreachable=True) from error


async def _ask(endpoint: Endpoint, question: Question) -> Reply:
    return await collected(
        endpoint,
        question.request(endpoint),
        bytes_max=question.bytes_max,
        wants_body=question.wants_body,
        afresh=question.afresh,
    )


async def collected(
    endpoint: Endpoint, request: bytes, *, bytes_max: int, wants_body: bool, afresh: bool = False
) -> Reply:
    """Send ``request``, as it goes over the wire, and return the answer as a whole; takes its time.

    Raises WorkerFailedError. Who is cancelled abandons the connection, which the worker sees.
    """
    loop = asyncio.get_running_loop()
    connection = None if afresh else endpoint.take_idle()
    while True:
        if connection is None:
            connection = await endpoint.connect()
        exchange = Collect(connection, loop, bytes_max=bytes_max, wants_body=wants_body)
        exchange.send(request)
        try:
            return await exchange.outcome
        except StaleConnectionError:
            # Engines close idle connections when they like. A new one is never stale.
            connection = None
        finally:
            exchange.close()


class Verdict(Enum):
    """What one check says. Nothing follows for a worker that could not be asked."""

    OK = "ok"
    FAILED = "failed"
    NOT_ASKED = "not asked"


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The verdict, what the worker did in words, and whether it refused the connection."""

    verdict: Verdict
    reason: str
    refused: bool = False


async def probe(endpoint: Endpoint, path: str, timeout_s: float) -> ProbeResult:
    """Ask for ``path`` once; OK is an answer of 2xx. Never raises for what a worker does."""
    # On a new connection: whether a worker still takes one is a part of the question.
    question = Question(path, timeout_s, HEALTH_BYTES_MAX, wants_body=False, afresh=True)
    try:
        status = (await ask(endpoint, question)).head.status
    except ShortageError as error:
        return ProbeResult(Verdict.NOT_ASKED, str(error))
    except WorkerFailedError as error:
        return ProbeResult(Verdict.FAILED, str(error), error.refused)
    ok = HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES
    return ProbeResult(Verdict.OK if ok else Verdict.FAILED, f"{path} answers {status}")


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """``path``: empty for the engine's own. Seconds between two checks of a server, and for one."""

    path: str
    interval_s: float
    timeout_s: float


class Prober:
    """Checks every server behind ``services`` for as long as it runs: one task for each.

    Of ranks behind one URL the answer counts for each.
    """

    def __init__(self, services: list[GroupService], clock: Clock, settings: ProbeSettings) -> None:
        self._services = list(services)
        self._clock = clock
        self.settings = settings
        self._tasks: dict[Endpoint, asyncio.Task[None]] = {}
        self._not_asked = SparingLog(log)
        self._bugs = SparingLog(log)
        self._is_running = False

    async def start(self) -> None:
        """Check every server once, so that traffic need not wait for the first interval; then go on."""
        # First of all, so that nobody who comes during the first checks is missed.
        self._is_running = True
        for service in self._services:
            service.group.roster.observe(partial(self._member_changed, service))
        endpoints = [(service, endpoint) for service in self._services for endpoint in service.endpoints]
        await asyncio.gather(*(self._check(service, endpoint) for service, endpoint in endpoints))
        for position, (service, endpoint) in enumerate(endpoints):
            if endpoint not in self._tasks:
                # Spread over the interval, so that a large group is not asked all at one instant.
                self._begin(service, endpoint, self.settings.interval_s * (1 + position / len(endpoints)))

    def group_came(self, service: GroupService) -> None:
        """See groups.Follower; before the start it is one of those that are checked first."""
        self._services.append(service)
        if self._is_running:
            service.group.roster.observe(partial(self._member_changed, service))

    def group_gone(self, service: GroupService) -> None:
        """See groups.Follower."""
        self._services.remove(service)

    async def stop(self) -> None:
        """End all checks."""
        self._is_running = False
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, service: GroupService, endpoint: Endpoint, delay_s: float) -> None:
        if service.behind(endpoint) and self._is_running:
            self._tasks[endpoint] = asyncio.create_task(self._run(service, endpoint, delay_s))

    def _end(self, endpoint: Endpoint) -> None:
        if endpoint in self._tasks:
            self._tasks.pop(endpoint).cancel()

    def _member_changed(self, service: GroupService, member: Member, change: Change) -> None:
        if change is Change.ADDED:
            # One that joins others behind its server is asked for at once, as any other.
            endpoint = service.endpoint(member.index)
            self._end(endpoint)
            self._begin(service, endpoint, 0.0)
        elif change is Change.GONE:
            # The service has let go of what connected to it, unless others are there.
            for endpoint in [left for left in self._tasks if not self._is_there(left)]:
                self._end(endpoint)

    def _is_there(self, endpoint: Endpoint) -> bool:
        return any(service.behind(endpoint) for service in self._services)

    async def _run(self, service: GroupService, endpoint: Endpoint, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        while True:
            await self._check(service, endpoint)
            await asyncio.sleep(self.settings.interval_s)

    async def _check(self, service: GroupService, endpoint: Endpoint) -> None:
        path = self.settings.path or service.dialect.HEALTH_PATH
        try:
            result = await probe(endpoint, path, self.settings.timeout_s)
        except Exception as error:  # noqa: BLE001 - logged; else nobody would check this worker again
            self._bugs.log(logging.ERROR, "the check of %s failed", endpoint.origin, exc_info=error)
            return
        if result.verdict is Verdict.NOT_ASKED:
            self._not_asked.warning("%s could not be checked: %s", endpoint.origin, result.reason)
            return
        ok, now_s = result.verdict is Verdict.OK, self._clock.now_s()
        for member in service.record(
            endpoint, ok=ok, reason=result.reason, now_s=now_s, refused=result.refused
        ):
            level = logging.INFO if member.health.state is Health.HEALTHY else logging.WARNING
            log.log(level, "worker %s is %s: %s", member.key, member.health.state.value, result.reason)
