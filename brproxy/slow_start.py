"""Slow start: a worker that comes back empty, or joins, gets its slots bit by bit. Pure; time comes in.

Whatever a policy minimises is least on a worker that has nothing, so that all that arrives would go there:
dozens of prompts at once for an engine that is cold, while the others of its barrier wait. So for ``ramp_s``
it may hold a share of its slots only, which grows evenly from one slot to all of them.

That is for few among many. Where more than half of those that may be chosen are new there is nobody to spare
them, and all get all of their slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, inf

from brproxy.health import Health
from brproxy.roster import Change, Member, Roster


class SlowStart:
    """Who of ``roster`` is new; ``is_empty`` tells whether nothing is bound to the member with an index.

    ``ramp_s`` 0: nobody ever is. ``since_s`` has those that are, by index: mostly nobody.
    """

    def __init__(self, roster: Roster, ramp_s: float, is_empty: Callable[[int], bool]) -> None:
        self._ramp_s = ramp_s
        self._is_empty = is_empty
        self._late: set[Member] = set()
        self.since_s: dict[int, float] = {}
        # When the first of them is new no more (seconds).
        self._until_s = inf
        if ramp_s:
            roster.observe(self._member_changed)

    def ramp(
        self,
        slots_free: list[int],
        slots: Sequence[int],
        sequences: Sequence[int],
        routable: Sequence[bool],
        now_s: float,
    ) -> None:
        """Lower ``slots_free`` of the new to what they may still take at ``now_s``; all is by index."""
        if now_s >= self._until_s:
            self.since_s = {g: s for g, s in self.since_s.items() if now_s - s < self._ramp_s}
            self._until_s = min(self.since_s.values(), default=inf) + self._ramp_s
        new = self.since_s
        # All are, as when the proxy has just started: asked first, as each request comes by here.
        if len(new) == len(routable) or 2 * sum(routable[g] for g in new) > sum(routable):
            return
        for g, since_s in new.items():
            share = max(0.0, now_s - since_s) / self._ramp_s
            most = max(1, ceil(slots[g] * share))
            slots_free[g] = max(0, min(slots_free[g], most - sequences[g]))

    def _member_changed(self, member: Member, change: Change) -> None:
        if change is Change.UNHEALTHY or (change is Change.ADDED and member.health.state is Health.UNKNOWN):
            self._late.add(member)
        elif change is Change.HEALTHY and member in self._late:
            self._late.discard(member)
            if self._is_empty(member.index) and member.health.since_s is not None:
                self.since_s[member.index] = member.health.since_s
                self._until_s = min(self._until_s, member.health.since_s + self._ramp_s)
        elif change is Change.GONE:
            self._late.discard(member)
        if change in {Change.UNHEALTHY, Change.GONE, Change.ADDED}:
            self.since_s.pop(member.index, None)
