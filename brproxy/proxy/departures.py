"""Workers that go out or away: what becomes of the requests that are with them.

A worker that checks take out keeps no request that it has not answered: those move on. One that has died
without a word (its sockets stay open, as a real vLLM's do one time in two after SIGTERM) shows it by two
signs together: it refuses new connections, and is silent on the old ones. Then also what it has begun ends.
"""

from __future__ import annotations

from collections.abc import Iterable

from brproxy.proxy.exchange.deciding import WorkerAnswer
from brproxy.proxy.service import GroupService
from brproxy.relay.watch import Watch
from brproxy.roster import Change, Member


class Departures:
    """Tells the answers of ``services`` when their worker goes out or, silent for ``gone_s``, is gone."""

    def __init__(self, services: Iterable[GroupService], watch: Watch, gone_s: float) -> None:
        self._services = tuple(services)
        self._watch = watch
        self._gone_s = gone_s
        for service in self._services:
            service.group.roster.observe(self._member_changed)

    def look(self, now_s: float) -> None:
        """Look for workers that are gone; to be called about once a second, at ``now_s`` of the loop."""
        gone = {
            member
            for service in self._services
            for member in service.group.roster.members
            if member.refuses_since_s is not None
        }
        if not gone:
            return
        for answer in self._answers():
            if answer.member in gone and answer.silent_s(now_s) >= self._gone_s:
                answer.worker_gone(f"{answer.member.key} refuses connections and is silent")

    def _member_changed(self, member: Member, change: Change) -> None:
        if change is Change.UNHEALTHY:
            for answer in self._answers():
                if answer.member is member:
                    answer.worker_out(f"{member.key} is unhealthy: {member.health.reason}")

    def _answers(self) -> list[WorkerAnswer]:
        return [watched for watched in self._watch.watched() if isinstance(watched, WorkerAnswer)]
