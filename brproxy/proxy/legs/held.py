"""What a prefill worker keeps for a request: until when, and how it is freed where nobody fetches it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus

from brproxy.engines.transfer import Handoff
from brproxy.proxy.asking import collected
from brproxy.proxy.driver import Lease
from brproxy.proxy.incoming import Incoming
from brproxy.proxy.legs.handover import Handover
from brproxy.proxy.service import GroupService
from brproxy.relay.request import body_length, request_head
from brproxy.types import PendingRequest

FETCHED_S = 5.0
"""After that what was sent for has been fetched, or never will be: who answers in one piece, and has all to
decode first, does not say (seconds)."""

_FREED_BYTES_MAX = 1 << 16
"""Read of an answer that nobody wants (bytes)."""


class Held:
    """KV that ``worker`` keeps, with its booking; ``on_end`` is told when the lease ends.

    That is at ``ends_s`` of the loop's time, None: nothing is known of it.
    """

    def __init__(self, lease: Lease, handoff: Handoff, ends_s: float | None = None) -> None:
        self._lease = lease
        self._ends_s = ends_s
        self._timer: asyncio.TimerHandle | None = None
        self.worker = lease.entry.worker
        self.handoff = handoff
        self.on_end: Callable[[], None] | None = None

    @property
    def waits(self) -> bool:
        """Whether its lease runs."""
        return self._timer is not None

    def wait(self, on_end: Callable[[], None]) -> None:
        """Let go of it when the lease ends, and tell so."""
        if self._timer is not None:
            self.stop_waiting()
        self.on_end = on_end
        if self._ends_s is not None:
            self._timer = asyncio.get_running_loop().call_at(self._ends_s, self._ended)

    def sent(self) -> None:
        """Note that it is being fetched: let go of it once that must be over."""
        self.stop_waiting()
        self.on_end = None
        self._timer = asyncio.get_running_loop().call_later(FETCHED_S, self._ended)

    def stop_waiting(self) -> None:
        """Keep it for as long as it takes."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def let_go(self) -> None:
        """End its booking."""
        self.stop_waiting()
        self.on_end = None
        self._lease.finish()

    def _ended(self) -> None:
        tell = self.on_end
        self.let_go()
        if tell is not None:
            tell()


class Freeing:
    """A decode leg that asks for nothing but the KV, so that who keeps it frees it; booked until then."""

    def __init__(self, group: GroupService, handover: Handover, incoming: Incoming, held: Held) -> None:
        # Taken out: what refers to the request keeps all of it.
        self._group = group
        self._handover = handover
        self._path, self._target, self._lines = incoming.path, incoming.target, incoming.lines
        self._body = handover.transfer.free_body(
            incoming.path, incoming.upload.beginning or b"", held.handoff
        )
        self._held = held

    async def run(self) -> None:
        """Take ``free_timeout_s`` at most; raises WorkerFailedError."""
        try:
            async with asyncio.timeout(self._handover.limits.free_timeout_s):
                await self._send()
        except TimeoutError:
            # It may be freed all the same; else the lease ends.
            return
        finally:
            self._held.let_go()

    async def _send(self) -> None:
        # It takes no slot and is sent at once, whoever waits: it makes room.
        with self._group.driver.admit(PendingRequest(0, sequences=0)) as lease:
            worker = lease.worker_now()
            if worker is None:
                return
            member, endpoint = self._group.reach(worker)
            target, lines = endpoint.adapted(self._target, self._lines)
            lines += member.lines + body_length("POST", self._body)
            request = request_head("POST", target, endpoint.host_field, lines) + self._body
            reply = await collected(endpoint, request, bytes_max=_FREED_BYTES_MAX, wants_body=False)
            self._handover.counts["freed"] += reply.head.status < HTTPStatus.BAD_REQUEST
