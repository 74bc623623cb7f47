"""Workers that come back, or up late, are asked again who they are: a restart may have made them others.

Each is asked by itself, and what it says is taken up when it says it: one that is silent holds up nobody.
However often a worker flaps, there is one conversation with it at most, and one after that. Requests are
routed meanwhile by what was known before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

from brproxy.build import endpoint_settings
from brproxy.config_workers import Worker
from brproxy.deployment import Deployment
from brproxy.discovery import ASKED_AT_ONCE_MAX, find_out, tell, tell_changes
from brproxy.findings import completed
from brproxy.fleet import Group
from brproxy.health import Health
from brproxy.logs import SparingLog
from brproxy.plans import Kind, Plan
from brproxy.proxy.groups import Groups
from brproxy.proxy.service import GroupService
from brproxy.roster import Change, Member
from brproxy.validation import ConfigError

log = logging.getLogger(__name__)

ASKED_AGAIN_S = 10.0
"""Least time between two reloads that have those asked who have never said who they are (seconds)."""


class Returning:
    """Asks workers of ``groups`` once each time that they come back, and has ``deployment`` follow.

    Not before it was started. Those are: who was out and is healthy again; who comes while the proxy runs, or
    did not answer when it was asked before, once it is healthy; and whoever has ``restarted``.
    """

    def __init__(self, groups: Groups, deployment: Deployment) -> None:
        self._groups = groups
        self._deployment = deployment
        self._settings = endpoint_settings(deployment.config)
        # Who is asked as soon as it is healthy; who is to be asked; and by URL who is being asked, and who
        # then once more.
        self._due: set[Member] = set()
        self._back: set[tuple[str, str]] = set()
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._again: set[str] = set()
        self._places = asyncio.Semaphore(ASKED_AT_ONCE_MAX)
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._bugs = SparingLog(log)
        self._silent_next_s = 0.0
        silent = {
            (worker.barrier_group, seat.key)
            for worker in deployment.config.worker
            if worker.heard.is_silent
            for seat in worker.seats
        }
        for service in groups.each():
            self._due.update(
                member
                for member in service.group.roster.members
                if (service.group.name, member.key) in silent
            )
        groups.follow_all(self)

    def start(self) -> None:
        """Begin to ask."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End all questions."""
        if self._task is not None:
            self._again.clear()
            tasks = (self._task, *self._asking.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def group_came(self, service: GroupService) -> None:
        """See groups.Follower."""
        service.group.roster.observe(partial(self._member_changed, service.group))

    def group_gone(self, service: GroupService) -> None:
        """See groups.Follower: nobody of it is due any more."""

    def restarted(self, group: Group, member: Member) -> None:
        """Note that the engine of a member has started anew: its checks may not have seen that."""
        if not group.leaves:
            self._ask(group, member)

    def reloaded(self, changes: Plan) -> None:
        """Note what a reload has changed: workers whose tables did are asked, as are those never heard of.

        The latter not more often than once in ASKED_AGAIN_S, as they may be no engines. Who is new is asked
        once it is healthy, as whoever comes.
        """
        names = {
            (step.worker.barrier_group, step.seat.key)
            for step in changes.steps
            if step.kind in {Kind.LIMITS, Kind.REACHED}
        }
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._silent_next_s:
            self._silent_next_s = now_s + ASKED_AGAIN_S
            names |= {
                (worker.barrier_group, seat.key)
                for worker in self._deployment.config.worker
                if worker.heard.said is None
                for seat in worker.seats
            }
        for service in self._groups.each():
            group = service.group
            for member in () if group.leaves else group.roster.members:
                if (group.name, member.key) in names and member.health.state is Health.HEALTHY:
                    self._ask(group, member)

    def _member_changed(self, group: Group, member: Member, change: Change) -> None:
        if change is Change.GONE:
            self._due.discard(member)
        elif change in {Change.ADDED, Change.UNHEALTHY}:
            self._due.add(member)
        if member in self._due and member.health.state is Health.HEALTHY and not group.leaves:
            self._ask(group, member)

    def _ask(self, group: Group, member: Member) -> None:
        self._due.discard(member)
        if self._task is not None:
            self._back.add((group.name, member.key))
            self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            back, self._back = self._back, set()
            for worker in self._deployment.config.worker:
                if any((worker.barrier_group, seat.key) in back for seat in worker.seats):
                    self._begin(worker.url)

    def _begin(self, url: str) -> None:
        if url in self._asking:
            self._again.add(url)
            return
        self._asking[url] = task = asyncio.create_task(self._ask_one(url))
        task.add_done_callback(partial(self._asked, url))

    def _asked(self, url: str, _task: asyncio.Task[None]) -> None:
        del self._asking[url]
        if url in self._again:
            self._again.remove(url)
            self._begin(url)

    async def _ask_one(self, url: str) -> None:
        try:
            async with self._places:
                await self._ask_again([each for each in self._deployment.config.worker if each.url == url])
        except ConfigError as error:
            log.warning("what workers say now cannot be taken up: %s", error)
        except Exception as error:  # noqa: BLE001 - logged: it is asked when it comes back the next time
            self._bugs.log(logging.ERROR, "asking a worker who it is failed", exc_info=error)

    async def _ask_again(self, workers: Sequence[Worker]) -> None:
        findings = await find_out(self._deployment.config, workers, self._settings)
        # Who is there may have changed meanwhile, and what is known of them.
        running = self._deployment.running()
        asked = [worker for worker in running if worker.url in findings]
        filled = {worker.url: worker for worker in completed(asked, findings, asked)}
        for worker in filled.values():
            tell(worker, findings[worker.url])
        tell_changes(asked, findings)
        changes = self._deployment.change([filled.get(each.url, each) for each in running], "workers")
        if changes.steps:
            log.info("workers say otherwise than before: %s", changes)
