"""Groups that were removed: they serve what they have, within a limit in time, and leave no trace."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence

from brproxy.proxy.driver import GroupGoneError
from brproxy.proxy.exchange.deciding import WorkerAnswer
from brproxy.proxy.groups import Groups
from brproxy.proxy.service import GroupService
from brproxy.relay.watch import Watch

log = logging.getLogger(__name__)

LOOK_S = 0.1
"""Between two looks at what a group that goes still has (seconds)."""


class Retiring:
    """Ends groups of ``groups`` with their last request, whose answers ``watch`` knows.

    What has not ended ``drain_s`` (seconds) after they were removed is ended.
    """

    def __init__(self, groups: Groups, watch: Watch, drain_s: float) -> None:
        self._groups = groups
        self._watch = watch
        self._drain_s = drain_s
        self._tasks: set[asyncio.Task[None]] = set()

    def retire(self, services: Sequence[GroupService]) -> None:
        """Have ``services``, a group and the one that prefills for it, take no new requests, and go."""
        for service in services:
            self._groups.retire(service)
        task = asyncio.create_task(self._drain(services))
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def stop(self) -> None:
        """Wait for nobody any more: what is left ends with the proxy."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a group that was removed could not be ended", exc_info=task.exception())

    async def _drain(self, services: Sequence[GroupService]) -> None:
        names = " and ".join(service.group.name for service in services)
        try:
            async with asyncio.timeout(self._drain_s):
                await _until_empty(services)
        except TimeoutError:
            log.warning("group %s: what has not ended within %g s is ended", names, self._drain_s)
            for service in services:
                for member in service.group.roster.members:
                    # Else what is ended would be tried again.
                    service.group.drain(member.key)
            while _is_busy(services):
                self._end_requests(services, f"the group was removed {self._drain_s:g} s ago")
                await asyncio.sleep(LOOK_S)
        for service in services:
            await _end(service)
            self._groups.remove(service)
        log.info("group %s has gone", names)

    def _end_requests(self, services: Iterable[GroupService], reason: str) -> None:
        members = {member for service in services for member in service.group.roster.members}
        for watched in self._watch.watched():
            if isinstance(watched, WorkerAnswer) and watched.member in members:
                watched.worker_gone(reason)
        for service in services:
            if service.handover is not None:
                service.handover.end_prefills()
            service.driver.give_up(GroupGoneError(service.group.name))


async def _until_empty(services: Iterable[GroupService]) -> None:
    while True:
        if not _is_busy(services):
            return
        await asyncio.sleep(LOOK_S)


def _is_busy(services: Iterable[GroupService]) -> bool:
    """Tell whether any request is left, in either half: one that is between two legs is in one of them."""
    return any(
        service.group.dispatcher.ledger.bound
        or len(service.group.dispatcher.waiting)
        or (service.handover is not None and service.handover.is_busy)
        for service in services
    )


async def _end(service: GroupService) -> None:
    """End all of a group without requests: connections and checks go with the members."""
    service.driver.close()
    if service.handover is not None:
        await service.handover.close()
    for member in service.group.roster.members:
        service.group.remove(member.key)
