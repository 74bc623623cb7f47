"""Workers that go out or away: what becomes of the requests that are with them.

A worker that checks take out keeps no request that it has not answered: those move on. One that has died
without a word (its sockets stay open, as a real vLLM's do one time in two after SIGTERM) shows it by two
signs together: it refuses new connections, and is silent on the old ones. Then also what it has begun ends.
"""

from __future__ import annotations

from brproxy.proxy.exchange.deciding import WorkerAnswer
from brproxy.proxy.groups import Groups
from brproxy.proxy.service import GroupService
from brproxy.relay.watch import Watch
from brproxy.roster import Change, Member


class Departures:
    """Tells the answers of ``groups`` when their worker goes out or, silent for ``gone_s``, is gone."""

    def __init__(self, groups: Groups, watch: Watch, gone_s: float) -> None:
        self._groups = groups
        self._watch = watch
        self.gone_s = gone_s
        groups.follow_all(self)
        watch.also(self.look)

    def group_came(self, service: GroupService) -> None:
        """See groups.Follower."""
        service.group.roster.observe(self._member_changed)

    def group_gone(self, service: GroupService) -> None:
        """See groups.Follower: nobody of it has answers any more."""

    def look(self, now_s: float) -> None:
        """Look for workers that are gone, at ``now_s`` of the loop, as the watch does."""
        gone = {
            member
            for service in self._groups.each()
            for member in service.group.roster.members
            if member.refuses_since_s is not None
        }
        if not gone:
            return
        for answer in self._answers():
            if answer.member in gone and answer.silent_s(now_s) >= self.gone_s:
                answer.worker_gone(f"{answer.member.key} refuses connections and is silent")

    def _member_changed(self, member: Member, change: Change) -> None:
        if change is Change.OUT:
            for answer in self._answers():
                if answer.member is member:
                    answer.worker_out(f"{member.key} is unhealthy: {member.health.reason}")

    def _answers(self) -> list[WorkerAnswer]:
        return [watched for watched in self._watch.watched() if isinstance(watched, WorkerAnswer)]
