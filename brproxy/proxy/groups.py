"""The barrier groups at work, as they come and go; who keeps something for each of them is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from brproxy.fleet import Fleet, Group

if TYPE_CHECKING:
    from brproxy.proxy.service import GroupService


class Follower(Protocol):
    """Who keeps something for each group."""

    def group_came(self, service: GroupService) -> None:
        """Take up a group that has come; its members are told by its roster."""

    def group_gone(self, service: GroupService) -> None:
        """Let go of a group that has gone, all of whose members have gone before."""


class Groups(Mapping[str, "GroupService"]):
    """The groups of ``fleet`` with all that they work with, by name."""

    def __init__(self, fleet: Fleet, services: Sequence[GroupService]) -> None:
        self._fleet = fleet
        self._services: dict[Group, GroupService] = {each.group: each for each in services}
        self._followers: list[Follower] = []
        # What a group works with. No method of its own: each request asks for it.
        self.of: Callable[[Group], GroupService] = self._services.__getitem__

    def __getitem__(self, name: str) -> GroupService:
        """Return the group called ``name``; raises KeyError."""
        return {group.name: service for group, service in self._services.items()}[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names, in order of coming."""
        return iter([group.name for group in self._services])

    def __len__(self) -> int:
        """Return how many groups there are."""
        return len(self._services)

    def each(self) -> list[GroupService]:
        """Return all groups, those that leave included."""
        return list(self._services.values())

    def follow(self, follower: Follower) -> None:
        """Have ``follower`` told, in the order of asking, of groups that come and go from now on."""
        self._followers.append(follower)

    def follow_all(self, follower: Follower) -> None:
        """Have ``follower`` take up the groups that are there, and be told as by ``follow``."""
        for service in self.each():
            follower.group_came(service)
        self.follow(follower)

    def add(self, service: GroupService) -> None:
        """Have a group serve requests from now on."""
        self._fleet.add(service.group)
        self._services[service.group] = service
        for follower in self._followers:
            follower.group_came(service)

    def retire(self, service: GroupService) -> None:
        """Have a group get no new requests."""
        self._fleet.retire(service.group)

    def remove(self, service: GroupService) -> None:
        """Let go of a group all of whose members have gone."""
        self._fleet.forget(service.group)
        del self._services[service.group]
        for follower in self._followers:
            follower.group_gone(service)
