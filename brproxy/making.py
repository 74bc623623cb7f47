"""Makes, changes and ends what runs, as the deployment wants it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from brproxy.build import GroupBuilder, reach_of, settle
from brproxy.config import Config
from brproxy.config_workers import Worker
from brproxy.fleet import Group
from brproxy.proxy.retiring import Retiring
from brproxy.proxy.service import Service


class GroupMaker:
    """See deployment.Making: groups of ``service``, by ``builder``, ended by ``retiring``.

    ``also_settle`` has who keeps settings of its own take them up.
    """

    def __init__(
        self,
        service: Service,
        builder: GroupBuilder,
        retiring: Retiring,
        also_settle: Callable[[Config], None],
    ) -> None:
        self._service = service
        self._builder = builder
        self._retiring = retiring
        self._also_settle = also_settle

    def settle(self, config: Config) -> None:
        """See Making."""
        settle(self._service, config)
        self._also_settle(config)

    def begin(self, config: Config, workers: Sequence[Worker]) -> Iterable[Group]:
        """See Making. What the group of that name had learnt, if it leaves, is known to the new one."""
        services = self._builder.build(config, workers)
        for service in services:
            before = self._leaving(service.group)
            if before is not None:
                _learn_from(before, service.group)
            self._service.groups.add(service)
        return [service.group for service in services]

    def end(self, groups: Sequence[Group]) -> None:
        """See Making."""
        self._retiring.retire([self._service.groups.of(group) for group in groups])

    def reach(self, worker: Worker) -> None:
        """See Making."""
        self._builder.reach(worker)
        for service in self._service.groups.each():
            if not service.group.leaves:
                service.reached_otherwise(worker.url, reach_of(worker))
                if service.handover is not None:
                    service.handover.forget_pages()

    def forget(self, workers: Sequence[Worker]) -> None:
        """See Making."""
        there = {member.origin for group in self._service.fleet.groups for member in group.roster.members}
        there |= {worker.url for worker in workers}
        for known in (self._builder.reaches, self._builder.bootstrap_ports):
            for url in known.keys() - there:
                del known[url]

    def _leaving(self, group: Group) -> Group | None:
        """Return the last group in the place of ``group`` that leaves, None without one."""
        leaving = [
            each
            for each in self._service.fleet.groups
            if each.leaves and each.of == group.of and each.prefills == group.prefills
        ]
        return leaving[-1] if leaving else None


def _learn_from(before: Group, group: Group) -> None:
    dispatcher = group.dispatcher
    try:
        dispatcher.predictor.restore(before.dispatcher.predictor.state())
    except Exception as error:  # noqa: BLE001 - a predictor that raises costs what was learnt, not a reload
        dispatcher.faults.note("predictor", error)
