"""Asking engines for their load: one question for each endpoint, once in an interval.

Several members may stand behind one endpoint, and one page tells of all of them. A worker without such a page
is left alone for a while: it is another server, and the booked load alone stands in.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus

from brproxy.clock import Clock
from brproxy.logs import SparingLog
from brproxy.proxy.asking import Question, ask
from brproxy.proxy.service import GroupService
from brproxy.relay.endpoint import Endpoint
from brproxy.relay.errors import TooLongError, WorkerFailedError
from brproxy.roster import Change, Member
from brproxy.signals import GroupSignals

log = logging.getLogger(__name__)

UNANSWERED_S = 60.0
"""Before a worker that has no page of its load, or one that is too long, is asked again (seconds)."""


@dataclass(frozen=True, slots=True)
class PollSettings:
    """Seconds between two questions and for one; bytes of a page at most."""

    interval_s: float
    timeout_s: float
    bytes_max: int


class NoPageError(Exception):
    """A worker does not tell its load; the text says how."""


class Poller:
    """Asks every endpoint of the groups that it is told of for as long as it runs: one task for each.

    ``signals_of`` makes what takes in the answers of a group.
    """

    def __init__(
        self, signals_of: Callable[[GroupService], GroupSignals], clock: Clock, settings: PollSettings
    ) -> None:
        self._signals_of = signals_of
        self._groups: dict[GroupService, GroupSignals] = {}
        self._clock = clock
        self.settings = settings
        self._tasks: dict[Endpoint, asyncio.Task[None]] = {}
        self._failed = SparingLog(log)
        self._bugs = SparingLog(log)
        self._is_running = False

    def start(self) -> None:
        """Begin: nobody waits for the first answers, as requests can be served without."""
        self._is_running = True
        for service, signals in self._groups.items():
            if not service.dialect.LOAD_PATH:
                text = "group %s: its engine has no page of its load, the booked load alone stands in"
                log.info(text, service.group.name)
                continue
            endpoints = service.endpoints
            for position, endpoint in enumerate(endpoints):
                # Spread over the interval, so that not all pages have to be read at one instant.
                spread_s = self.settings.interval_s * position / len(endpoints)
                self._begin(service, signals, endpoint, spread_s)

    def signals(self) -> dict[str, GroupSignals]:
        """Return what the engines of each group have said, by the group's name."""
        return {service.group.name: signals for service, signals in self._groups.items()}

    def group_came(self, service: GroupService) -> None:
        """See groups.Follower."""
        signals = self._groups[service] = self._signals_of(service)
        if service.dialect.LOAD_PATH:
            service.group.roster.observe(partial(self._member_changed, service, signals))

    def group_gone(self, service: GroupService) -> None:
        """See groups.Follower."""
        del self._groups[service]

    async def stop(self) -> None:
        """End all questions."""
        self._is_running = False
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _member_changed(
        self, service: GroupService, signals: GroupSignals, member: Member, change: Change
    ) -> None:
        if change is Change.ADDED:
            self._begin(service, signals, service.endpoint(member.index))
        elif change is Change.GONE:
            for endpoint in [left for left in self._tasks if left.is_closed]:
                self._tasks.pop(endpoint).cancel()

    def _begin(
        self, service: GroupService, signals: GroupSignals, endpoint: Endpoint, spread_s: float = 0.0
    ) -> None:
        if self._is_running and endpoint not in self._tasks:
            run = self._run(service, signals, endpoint, spread_s)
            self._tasks[endpoint] = asyncio.create_task(run)

    async def _run(
        self, service: GroupService, signals: GroupSignals, endpoint: Endpoint, spread_s: float
    ) -> None:
        """Ask ``endpoint`` until nobody behind it is there; ``spread_s`` later from the second time on."""
        ask_at_s = 0.0
        while members := tuple(service.behind(endpoint)):
            if self._clock.now_s() >= ask_at_s:
                try:
                    await self._poll(service, signals, endpoint, members)
                except NoPageError as error:
                    signals.silent(members, service.dialect.read_load(b"").wanted, str(error))
                    ask_at_s = self._clock.now_s() + UNANSWERED_S
                except Exception as error:  # noqa: BLE001 - logged; else nobody would ask this worker again
                    self._bugs.log(
                        logging.ERROR, "asking %s for its load failed", endpoint.origin, exc_info=error
                    )
            signals.settle(members, self._clock.now_s())
            await asyncio.sleep(self.settings.interval_s + spread_s)
            spread_s = 0.0

    async def _poll(
        self, service: GroupService, signals: GroupSignals, endpoint: Endpoint, members: Sequence[Member]
    ) -> None:
        """Ask once and take in the answer; raises NoPageError.

        One that fails to answer, or that cannot be asked, is asked again at the next interval: checks say
        what is wrong with it.
        """
        # So that the books have what streamed until now.
        service.driver.catch_up()
        signals.asked(members, self._clock.now_s())
        path, settings = service.dialect.LOAD_PATH, self.settings
        question = Question(path, settings.timeout_s, settings.bytes_max)
        try:
            reply = await ask(endpoint, question)
        except TooLongError as error:
            msg = f"{path}: {error} (limits.control_bytes_max)"
            raise NoPageError(msg) from error
        except WorkerFailedError as error:
            self._note_failure(members, str(error))
            return
        status = reply.head.status
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self._note_failure(members, f"{path} answers {status}")
            return
        if status != HTTPStatus.OK:
            msg = f"{path} answers {status}"
            raise NoPageError(msg)
        reading = service.dialect.read_load(reply.body)
        if not reading.reports:
            msg = f"{path} is no page of this engine, it has none of: {', '.join(reading.wanted)}"
            raise NoPageError(msg)
        # The gauge was read in between: what has been booked until now may be in it, too.
        now_s = self._clock.now_s()
        signals.asked(members, now_s)
        signals.told(members, reading, now_s)

    def _note_failure(self, members: Sequence[Member], reason: str) -> None:
        # Of one that is out its checks have said so.
        if any(member.is_routable for member in members):
            self._failed.warning("worker %s did not say its load: %s", members[0].key, reason)
