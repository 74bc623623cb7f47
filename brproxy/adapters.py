"""Which worker of a group has which LoRA adapter, as their lists of models say it. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from brproxy.lifecycle import NOBODY
from brproxy.roster import Change, Member, Roster
from brproxy.types import WorkerIndex


class Adapters:
    """The adapters of one group's workers; ``names`` are those that any worker has.

    Of a worker that has not said what it has, it is not known to have any.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._of: dict[Member, frozenset[str]] = {}
        self.names: frozenset[str] = frozenset()
        roster.observe(self._member_changed)

    def told(self, members: Iterable[Member], names: frozenset[str]) -> None:
        """Take in what workers have now."""
        there = set(self._roster.members)
        self._of.update((member, names) for member in members if member in there)
        self._sum_up()

    def lacking(self, model: str) -> frozenset[WorkerIndex]:
        """Return the workers that cannot serve ``model`` although others can.

        None lacks what is no adapter, or what no worker is known to have: an engine may load it when it is
        asked for, and else says so in its own words.
        """
        if model not in self.names:
            return NOBODY
        members = self._roster.members
        return frozenset(member.index for member in members if model not in self._of.get(member, ()))

    def _member_changed(self, member: Member, change: Change) -> None:
        if change is Change.GONE and member in self._of:
            del self._of[member]
            self._sum_up()

    def _sum_up(self) -> None:
        self.names = frozenset().union(*self._of.values())
