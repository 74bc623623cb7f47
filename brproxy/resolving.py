"""Names that stand for several workers, looked up now and then: whoever has an address of one is a member.

A name that cannot be looked up changes nothing: a resolver that fails says nothing about workers, which
their checks know better. Nor does one without addresses, as a Kubernetes service is while no pod is ready.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from brproxy.addresses import ADDRESSES_MAX, Addresses, expanded, followed, is_each
from brproxy.config import Config
from brproxy.config_workers import Worker
from brproxy.deployment import Deployment
from brproxy.logs import SparingLog
from brproxy.origins import read_worker_url
from brproxy.validation import ConfigError

log = logging.getLogger(__name__)

LOOKED_UP_AT_ONCE_MAX = 8
"""Names that are looked up at the same time (names): each takes a thread."""

LookUp = Callable[[str, int], Awaitable[Sequence[str]]]
"""Returns the addresses of a host, for a port; raises OSError."""


async def look_up(host: str, port: int) -> list[str]:
    """Return the addresses of ``host`` as the system has them; raises OSError.

    Only those of the family that it prefers: a pod with an address in either is one worker.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for family, *_, address in found if family == found[0][0]]


@dataclass(frozen=True, slots=True)
class Resolved:
    """``config`` with a worker at each address ``known`` of the ``names`` that it had."""

    config: Config
    names: tuple[Worker, ...] = ()
    known: Addresses = field(default_factory=dict)


class Resolver:
    """Finds the addresses of names by ``look_up``, each within ``timeout_s`` (seconds)."""

    def __init__(self, timeout_s: float, look_up: LookUp = look_up) -> None:
        self._timeout_s = timeout_s
        self._look_up = look_up
        self._together = asyncio.Semaphore(LOOKED_UP_AT_ONCE_MAX)
        self._asking: dict[str, asyncio.Future[Sequence[str]]] = {}
        self._told: set[tuple[str, str]] = set()

    async def resolved(self, config: Config, known: Addresses) -> Resolved:
        """Return ``config`` with the workers that its names stand for now; ``known`` is what was known."""
        names = tuple(worker for worker in config.worker if is_each(worker))
        if not names:
            return Resolved(config)
        found = await self.find(names, known)
        workers = expanded(config.worker, found)
        return Resolved(config.model_copy(update={"worker": workers}), names, found)

    async def find(self, names: Sequence[Worker], known: Addresses) -> dict[str, Sequence[str]]:
        """Return the addresses that each name has now, by URL; those ``known`` if it cannot be looked up."""
        found = await asyncio.gather(*(self._find(worker) for worker in names))
        return {
            worker.url: addresses or known.get(worker.url, ())
            for worker, addresses in zip(names, found, strict=True)
        }

    def close(self) -> None:
        """Wait for no look-up that is still under way."""
        for task in self._asking.values():
            task.cancel()

    async def _find(self, worker: Worker) -> Sequence[str]:
        """Return the addresses of a name, none where it cannot be looked up: that is said once."""
        url = worker.url
        try:
            async with self._together:
                found = await self._ask(url)
        except OSError as error:
            reason = error.strerror or str(error) or "it did not answer in time"
            if (url, "failure") not in self._told:
                self._told.add((url, "failure"))
                log.warning("worker %s: cannot look up %s: %s; its members stay", worker.label, url, reason)
            return ()
        self._told.discard((url, "failure"))
        addresses = tuple(sorted(set(found)))
        if len(addresses) > ADDRESSES_MAX and (url, "number") not in self._told:
            self._told.add((url, "number"))
            text = "worker %s: %s has %d addresses; the first %d are members"
            log.warning(text, worker.label, url, len(addresses), ADDRESSES_MAX)
        return addresses[:ADDRESSES_MAX]

    async def _ask(self, url: str) -> Sequence[str]:
        """Look up the host of ``url``; raises OSError. One that takes too long goes on, and is waited for."""
        origin = read_worker_url(url).origin
        task = self._asking.get(url)
        if task is None:
            task = asyncio.ensure_future(self._look_up(origin.host, origin.port))
            self._asking[url] = task
        done, _ = await asyncio.wait({task}, timeout=self._timeout_s)
        if not done:
            raise TimeoutError
        self._asking.pop(url, None)
        return task.result()


class Resolving:
    """Has ``deployment`` follow the addresses of names, looked up every ``interval_s`` (seconds)."""

    def __init__(self, resolver: Resolver, deployment: Deployment, interval_s: float) -> None:
        self._resolver = resolver
        self._deployment = deployment
        self._interval_s = interval_s
        self._names: Sequence[Worker] = ()
        self._known: Addresses = {}
        self._refused = SparingLog(log)
        self._bugs = SparingLog(log)
        self._task: asyncio.Task[None] | None = None

    def follow(self, resolved: Resolved) -> None:
        """Follow its names from now on; ``deployment`` has its workers."""
        self._names, self._known = resolved.names, resolved.known
        if self._names and self._task is None:
            self._task = asyncio.create_task(self._run())

    async def resolved(self, config: Config) -> Resolved:
        """Return ``config``, which is to be the file's, with the workers that its names stand for now."""
        return await self._resolver.resolved(config, self._known)

    async def stop(self) -> None:
        """End all look-ups."""
        self._resolver.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def look(self) -> None:
        """Look up all names once, and make what has changed."""
        names, known = self._names, self._known
        found = await self._resolver.find(names, known)
        if names is not self._names:
            # A reload came meanwhile, and has looked up its own.
            return
        for worker in names:
            before, now = known.get(worker.url, ()), found[worker.url]
            if now == before:
                continue
            workers = followed(self._deployment.running(), worker, before, now)
            try:
                changes = self._deployment.change(workers, f"addresses of {worker.url}")
            except ConfigError as error:
                self._refused.warning("not followed: %s", error)
                continue
            self._known = {**self._known, worker.url: now}
            log.info("addresses of %s: %s", worker.url, changes)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self.look()
            except Exception as error:  # noqa: BLE001 - logged; else nobody would look again
                self._bugs.log(logging.ERROR, "following the addresses of workers failed", exc_info=error)
