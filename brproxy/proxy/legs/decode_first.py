"""Decode first: the worker that decodes gets the request, and asks this proxy for a prefill that suits it.

It posts to ``/v1/metaserver`` where its KV is to go, and who prefills sends it there, layer by layer. The
post is answered once that is done. A prefill worker is chosen only then; where one fails another is asked.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Final, NamedTuple

from brproxy.engines.transfer import Handoff
from brproxy.journey import Action, Event
from brproxy.proxy.attempts import Attempts
from brproxy.proxy.driver import Lease
from brproxy.proxy.exchange.client_sink import ClientSink
from brproxy.proxy.incoming import Incoming
from brproxy.proxy.legs.handover import Handover, prefill_of
from brproxy.proxy.service import GroupService, Service
from brproxy.relay.endpoint import Endpoint
from brproxy.relay.errors import WorkerFailedError
from brproxy.roster import Member
from brproxy.types import BrproxyError, WorkerIndex

_ENDED: Final = "the request has ended"
"""What a worker is told that asks for a prefill which nobody needs any more."""


class _Said(NamedTuple):
    """Why a worker has not prefilled, "" if it has.

    ``moves``: another may. ``ran``: it may have worked on it, and died of it.
    """

    why: str
    moves: bool = True
    ran: bool = False


class DecodeFirstLegs(Attempts):
    """A request's attempts on workers that decode, each of which asks for a prefill when it likes."""

    __slots__ = ("_asked", "_decode_body", "_handoff", "_handover", "_metaserver", "_prefill")

    _handoff: Handoff

    def __init__(
        self,
        service: Service,
        group: GroupService,
        lease: Lease,
        incoming: Incoming,
        sink: ClientSink,
        handover: Handover,
    ) -> None:
        super().__init__(service, group, lease, incoming, sink)
        self._handover = handover
        self._metaserver = service.metaserver
        self._asked = prefill_of(lease.entry.request)
        self._prefill: asyncio.Task[str] | None = None
        self._decode_body = b""

    async def prefill(self, params: bytes) -> str:
        """Have a worker prefill to where ``params`` says; return "" or why nobody did.

        A worker that asks twice gets the one answer.
        """
        if self._prefill is None:
            self._prefill = self._service.watch.loop.create_task(self._prefilled(params))
        prefill = self._prefill
        # Whoever asks may leave, and others wait for the same; it is cancelled with the leg that it is for.
        await asyncio.wait((prefill,))
        return _ENDED if prefill.cancelled() else prefill.result()

    async def _send(self, *, afresh: bool) -> Action:
        handover = self._handover
        incoming = self._incoming
        self._handoff = handover.handoff(incoming.request_id, None)
        # Before there is a connection: it can fail.
        document = handover.document(incoming)
        self._decode_body = handover.transfer.decode_body(incoming.path, document, self._handoff)
        names = self._handoff.transfer_id, incoming.request_id.decode("latin-1")
        self._metaserver.expect(self, *names)
        try:
            return await super()._send(afresh=afresh)
        finally:
            self._metaserver.forget(self, *names)
            prefill, self._prefill = self._prefill, None
            if prefill is not None:
                prefill.cancel()

    async def _prefilled(self, params: bytes) -> str:
        failed: frozenset[WorkerIndex] = frozenset()
        handover, said = self._handover, _Said("no worker prefills")
        for _ in range(self._service.limits.retries_max + 1):
            if not handover.has_others(failed):
                break
            try:
                with handover.group.driver.admit(self._asked, avoid=failed) as lease:
                    worker = await lease.worker_soon()
                    said = await self._ask(worker, params)
                    if not said.why:
                        return ""
                    lease.fail()
            except BrproxyError as error:
                # It has waited for long enough, or never will be prefilled.
                return str(error)
            failed |= {worker}
            may_repeat = self._incoming.runs.failed(ran=said.ran)
            if not said.moves or not may_repeat:
                break
        return said.why

    async def _ask(self, worker: WorkerIndex, params: bytes) -> _Said:
        """Have ``worker`` prefill; return what came of it."""
        member, endpoint = self._handover.group.reach(worker)
        incoming = self._incoming
        handoff = self._handoff._replace(params=params)
        document = self._handover.document(incoming)
        body = self._handover.transfer.prefill_body(incoming.path, document, handoff)
        request = self._leg(member, endpoint, body, is_read=True)
        try:
            bytes_max = self._service.relay_limits.response_parse_bytes_max
            reply = await self._handover.collected(worker, request, bytes_max=bytes_max, wants_body=False)
        except WorkerFailedError as error:
            return _Said(str(error), moves=True, ran=not error.unreachable)
        status = reply.head.status
        if status < HTTPStatus.BAD_REQUEST:
            return _Said("")
        moves, ran = self._handover.moves(status), not self._group.dialect.is_refusal(status)
        return _Said(f"{member.key} answered {status}", moves=moves, ran=ran)

    def _after(self, event: Event, error: Exception | None) -> Action:
        # Who has asked for a prefill has had the request, however soon it closed its connection.
        has_worked = event is Event.STALE and self._prefill is not None
        return super()._after(Event.CUT if has_worked else event, error)

    def _request(self, member: Member, endpoint: Endpoint) -> bytes:
        return self._leg(member, endpoint, self._decode_body, is_read=self._usage_was_added)
