"""Both legs at once: the two workers find each other, and the one that decodes answers the client.

Which two is decided before either has begun: the request waits for a worker that decodes, then for one
that prefills. Where one leg fails before the client has had anything the other ends, and the request is sent
to two again; a worker that decodes keeps its request while another one is found to prefill.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import ClassVar, cast

from brproxy.engines.transfer import Handoff
from brproxy.journey import Action, Event
from brproxy.proxy import errors
from brproxy.proxy.accounting import Account
from brproxy.proxy.attempts import Attempts
from brproxy.proxy.driver import Lease
from brproxy.proxy.exchange.client_sink import ClientSink
from brproxy.proxy.exchange.collect import Reply
from brproxy.proxy.exchange.deciding import WorkerAnswer
from brproxy.proxy.exchange.handles import PairedAnswer
from brproxy.proxy.exchange.merged import MergedAnswer
from brproxy.proxy.incoming import Incoming
from brproxy.proxy.legs.handover import Handover, prefill_of
from brproxy.proxy.service import GroupService, Service
from brproxy.relay.endpoint import Endpoint
from brproxy.relay.errors import WorkerFailedError
from brproxy.relay.framing import choose_framing
from brproxy.roster import Member
from brproxy.types import WorkerIndex


class PairedLegs(Attempts):
    """A request's attempts on workers that decode, each with one that prefills beside it."""

    __slots__ = (
        "_answer",
        "_asked",
        "_decode_body",
        "_failed",
        "_handoff",
        "_handover",
        "_has_met",
        "_other",
        "_prefill",
        "_prefill_body",
        "_trouble",
    )

    ANSWER: ClassVar[type[PairedAnswer]] = PairedAnswer
    _answer: PairedAnswer
    _handoff: Handoff
    _other: Lease

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
        self._asked = prefill_of(lease.entry.request)
        self._failed: frozenset[WorkerIndex] = frozenset()
        self._trouble: Reply | Exception | None = None
        self._prefill: asyncio.Task[Reply] | None = None
        self._prefill_body = self._decode_body = b""
        self._has_met = False

    def begun(self, *, is_long: bool) -> None:
        """See deciding.Attempt.begun."""
        # It has all that was prefilled, or it never will.
        if self._answer.tells_failure:
            self._handover.forget(self._other.entry.worker)
        self._other.finish()
        self._prefill_body = self._decode_body = b""
        super().begun(is_long=is_long)

    async def _send(self, *, afresh: bool) -> Action:
        """As Attempts._send; raises ProxyError where nobody can prefill, and as GroupDriver.admit."""
        handover, trouble = self._handover, None
        for _ in range(self._service.limits.retries_max + 1):
            with handover.group.driver.admit(self._asked, avoid=self._failed) as other:
                other.fail()
                worker = await other.worker_soon()
                self._other, self._trouble = other, None
                action = await self._send_both(worker, afresh=afresh)
            trouble = self._trouble_now()
            if trouble is None:
                return action
            if isinstance(trouble, Reply) and not handover.moves(trouble.head.status):
                self._pass_on(trouble)
                return Action.NOTHING
            handover.forget(worker)
            self._failed |= {worker}
            may_repeat = self._incoming.runs.failed(ran=self._may_have_run(trouble))
            if not may_repeat or not handover.has_others(self._failed):
                break
        raise errors.workers_failed(f"No worker prefilled the request: {_reason(trouble)}.")

    def _trouble_now(self) -> Reply | Exception | None:
        # By a call: a type checker does not know who else sets it while this awaits.
        return self._trouble

    async def _send_both(self, worker: WorkerIndex, *, afresh: bool) -> Action:
        member, _ = self._handover.group.reach(worker)
        self._has_met = False
        try:
            self._handoff = await self._handover.meeting(self._incoming.request_id, member)
        except WorkerFailedError as error:
            self._trouble = error
            return Action.NOTHING
        self._has_met = True
        incoming, transfer = self._incoming, self._handover.transfer
        # Before there are connections: it can fail.
        path, body = incoming.path, self._handover.document(incoming)
        self._prefill_body = transfer.prefill_body(path, body, self._handoff)
        self._decode_body = transfer.decode_body(path, body, self._handoff)
        try:
            return await super()._send(afresh=afresh)
        finally:
            prefill, self._prefill = self._prefill, None
            if prefill is not None and not prefill.cancel() and not prefill.cancelled():
                # Seen, whoever asks.
                prefill.exception()

    def _answer_of(self, member: Member, account_kind: type[Account] = Account) -> WorkerAnswer:
        # The worker that decodes can be reached: now the other leg goes out beside its own.
        self._prefill = self._service.watch.loop.create_task(self._prefill_leg())
        self._prefill.add_done_callback(self._prefilled)
        self._answer = cast(PairedAnswer, super()._answer_of(member, account_kind))
        return self._answer

    async def _prefill_leg(self) -> Reply:
        worker = self._other.entry.worker
        request = self._leg(*self._handover.group.reach(worker), self._prefill_body, is_read=True)
        bytes_max = self._service.relay_limits.response_parse_bytes_max
        return await self._handover.collected(worker, request, bytes_max=bytes_max, wants_body=True)

    def _prefilled(self, prefill: asyncio.Task[Reply]) -> None:
        """Take the end of the leg that prefills: where that failed, the other one is waiting for nothing."""
        if prefill is not self._prefill or prefill.cancelled():
            return
        error = prefill.exception()
        failure = prefill.result() if error is None else error
        if isinstance(failure, Reply):
            if failure.head.status < HTTPStatus.BAD_REQUEST:
                self._other.first_token()
                return
        elif not isinstance(failure, Exception):
            return
        if not self._outcome.done() and not self._journey.has_begun:
            self._trouble = failure
            self._outcome.set_result(Action.NOTHING)

    def _request(self, member: Member, endpoint: Endpoint) -> bytes:
        return self._leg(member, endpoint, self._decode_body, is_read=self._usage_was_added)

    def _may_have_run(self, trouble: Reply | Exception) -> bool:
        """Tell whether the worker that prefills may have worked on the request, and died of it."""
        if isinstance(trouble, Reply):
            return not self._group.dialect.is_refusal(trouble.head.status)
        # Who does not say at its page which engine it is has not been sent anything.
        return self._has_met and not (isinstance(trouble, WorkerFailedError) and trouble.unreachable)

    def _pass_on(self, reply: Reply) -> None:
        """Answer the client with what the worker that prefills has against the request."""
        sink = self._sink
        if sink.has_head:
            raise errors.workers_failed(f"No worker prefilled the request: {_reason(reply)}.")
        framing = choose_framing(reply.head, http10=sink.client.is_http10, bodiless=False, rewritten=False)
        self._lease.fail()
        super().begun(is_long=False)
        sink.begin(reply.head, framing, is_stream=False)
        sink.pass_on(reply.body)
        sink.finish(b"")
        self._journey.happened(Event.FINISHED)
        if sink.ends_by_close:
            sink.client.close()


class MergedLegs(PairedLegs):
    """The same for a request that asks about its prompt, which only the worker that prefills can tell."""

    __slots__ = ()

    ANSWER: ClassVar[type[PairedAnswer]] = MergedAnswer

    def _answer_of(self, member: Member, account_kind: type[Account] = Account) -> WorkerAnswer:
        answer = super()._answer_of(member, account_kind)
        if isinstance(answer, MergedAnswer):
            answer.expect()
        return answer

    def _prefilled(self, prefill: asyncio.Task[Reply]) -> None:
        is_ours = prefill is self._prefill
        super()._prefilled(prefill)
        if not is_ours or prefill.cancelled() or prefill.exception() is not None:
            return
        reply, answer = prefill.result(), self._answer
        if reply.head.status < HTTPStatus.BAD_REQUEST and isinstance(answer, MergedAnswer):
            answer.prefilled(reply.body)

    def _request(self, member: Member, endpoint: Endpoint) -> bytes:
        return self._leg(member, endpoint, self._decode_body, is_read=True)


def _reason(failure: Reply | Exception | None) -> str:
    """Return what went wrong, in a few words."""
    return f"it answered {failure.head.status}" if isinstance(failure, Reply) else str(failure)
