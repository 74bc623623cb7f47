"""Prefill, then decode: the finished prefill waits in the prompt pool for a worker that decodes.

The pool is the waiting room of the decode group. What was prefilled stays booked on the worker that has it
until the one that decodes has begun to answer, which then has fetched it. A lease says how long it is kept;
a request that waits longer is prefilled again, once a worker to decode it has been found, and so is one whose
decode worker was lost with it. Where the client leaves a prompt behind, a decode leg that asks for nothing
but the KV has it freed at once, not only when the lease ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import ClassVar, cast

from brproxy.engines.transfer import Handoff
from brproxy.journey import Action, Event
from brproxy.lifecycle import Event as LifeEvent
from brproxy.proxy.accounting import Account
from brproxy.proxy.attempts import Attempts
from brproxy.proxy.driver import Lease
from brproxy.proxy.errors import workers_failed
from brproxy.proxy.exchange.client_sink import ClientSink
from brproxy.proxy.exchange.deciding import WorkerAnswer
from brproxy.proxy.exchange.handles import DecodeAccount, DecodeAnswer, PrefillAnswer
from brproxy.proxy.incoming import Incoming
from brproxy.proxy.legs.handover import Handover, prefill_of
from brproxy.proxy.legs.held import Freeing, Held
from brproxy.proxy.legs.prefill_leg import PrefillLeg
from brproxy.proxy.service import GroupService, Service
from brproxy.relay.endpoint import Endpoint
from brproxy.roster import Member
from brproxy.types import PendingRequest

log = logging.getLogger(__name__)

# As a plain name: looking a member of an enumeration up costs more than comparing it.
_DIED = Event.DIED

_TAKES_ALONG = frozenset({Event.REFUSED, Event.CUT, Event.DIED, Event.OUT})
"""What ends a decode leg whose worker may have fetched what was prefilled, or had it freed."""


MakeDecodeLeg = Callable[..., Attempts]
"""Makes the leg that decodes, from what DecodeLeg is made of."""


async def prefill_then_decode(
    service: Service,
    group: GroupService,
    handover: Handover,
    request: PendingRequest,
    incoming: Incoming,
    sink: ClientSink,
    make_leg: MakeDecodeLeg,
) -> None:
    """Answer the client; as Attempts.run, and raises what GroupDriver.admit does."""
    prefilled = Prefilled(service, group, handover, request, incoming, sink)
    try:
        if not await prefilled.prefill():
            return
        with group.driver.admit(prefilled.request) as lease:
            # Its time to the first token began before it was prefilled.
            lease.entry.arrived_s = prefilled.arrived_s
            await make_leg(service, group, lease, incoming, sink, prefilled, handover).run()
    finally:
        prefilled.leave()


class Prefilled:
    """A prompt that a worker has prefilled and keeps, until ``leave``.

    ``request`` is what is known of the request, ``arrived_s`` when it first arrived (the clock's seconds).
    """

    def __init__(
        self,
        service: Service,
        group: GroupService,
        handover: Handover,
        request: PendingRequest,
        incoming: Incoming,
        sink: ClientSink,
    ) -> None:
        self._service = service
        self._group = group
        self._handover = handover
        self._incoming = incoming
        self._sink = sink
        self._held: Held | None = None
        self._is_lost = False
        self.request = request
        self.arrived_s = service.clock.now_s()

    async def prefill(self) -> bool:
        """Have a worker prefill; return False where the client has got an error instead.

        Raises as Attempts.run and GroupDriver.admit do.
        """
        handover = self._handover
        with handover.group.driver.admit(prefill_of(self.request)) as lease:
            leg = PrefillLeg(self._service, handover, lease, self._incoming, self._sink)
            try:
                await leg.run()
            finally:
                # Also where the client leaves as it comes.
                is_kept = self._keep(leg, lease)
                if is_kept:
                    lease.keep()
            if leg.reply is None:
                return False
            if not is_kept and not handover.transfer.DECODES_ALONE:
                raise workers_failed("The prefill worker did not say how its KV is fetched.")
        # Without handles the worker that decodes prefills for itself.
        self._is_lost = False
        return True

    @property
    def is_held(self) -> bool:
        """Whether a worker keeps it."""
        return self._held is not None

    async def body(self, *, alone: bool = False) -> bytes | None:
        """Return the body of the leg that decodes, after another prefill if need be; None: as ``prefill``.

        ``alone``: without handles, whatever is kept.
        """
        if alone:
            return self._handover.transfer.alone_body(self._incoming.upload.beginning or b"")
        if self._held is not None and self._handover.is_out(self._held.worker):
            # Who takes a request to a worker that is gone gets an error for it.
            self.lost()
        if self._is_lost:
            self._handover.counts["again"] += 1
            if not await self.prefill():
                return None
        handover, incoming = self._handover, self._incoming
        if self._held is None:
            return handover.transfer.alone_body(incoming.upload.beginning or b"")
        # From here on the two workers keep it alive between them.
        self._held.sent()
        document = handover.document(incoming)
        return handover.transfer.decode_body(incoming.path, document, self._held.handoff)

    def taken(self) -> None:
        """Note that what was prefilled has been fetched."""
        held, self._held = self._held, None
        if held is not None:
            held.let_go()

    def wait_again(self) -> None:
        """Note that the worker that decodes never had it: its lease runs on."""
        if self._held is not None:
            self._held.wait(self._ended)

    def lost(self) -> None:
        """Note that it is not to be had any more, although it may still be kept: have it freed."""
        self._is_lost = True
        held, self._held = self._held, None
        if held is None:
            return
        handover = self._handover
        handover.counts["stranded"] += 1
        if handover.may_free():
            leg = Freeing(self._group, handover, self._incoming, held)
            handover.in_background(self._service.watch.loop.create_task(leg.run()))
        elif held.waits:
            # Its lease ends as it would have, and its booking with it.
            held.on_end = None
        else:
            held.let_go()

    def leave(self) -> None:
        """Have the worker free what the one that decodes has not begun to answer with.

        That one may have fetched it, or had it freed as its leg was closed. Nothing tells, and to free twice
        costs one token.
        """
        if self._held is not None:
            self.lost()

    def _keep(self, leg: PrefillLeg, lease: Lease) -> bool:
        """Take over what a leg leaves behind, with its booking; return whether there is anything."""
        if leg.orphan is not None:
            work = self._adopted(leg, leg.orphan, lease)
            self._handover.in_background(self._service.watch.loop.create_task(work))
            return True
        if leg.reply is None:
            return False
        self.request.prompt_tokens = lease.entry.prompt_tokens
        self.request.count_number = lease.entry.request.count_number
        handoff = self._handles(leg, leg.reply)
        if handoff is not None:
            self._hold(lease, handoff)
        return handoff is not None

    def _handles(self, leg: PrefillLeg, reply: bytes | None) -> Handoff | None:
        params = None if reply is None else self._handover.transfer.read_reply(reply)
        return None if params is None or leg.handoff is None else leg.handoff._replace(params=params)

    async def _adopted(self, leg: PrefillLeg, orphan: PrefillAnswer, lease: Lease) -> None:
        """Wait a little for a prefill whose client has left, and have freed what it keeps; else end it.

        Ending it at once would do for one that runs, but who is about to answer keeps it until its lease
        ends.
        """
        handoff = None
        try:
            async with asyncio.timeout(self._handover.limits.finish_s):
                handoff = self._handles(leg, await orphan.body())
        except TimeoutError:
            # It takes longer than it would to be freed.
            pass
        finally:
            orphan.abandon()
            if handoff is None:
                lease.finish(LifeEvent.CANCEL)
        if handoff is not None:
            self._handover.counts["stranded"] += 1
            await Freeing(self._group, self._handover, self._incoming, Held(lease, handoff)).run()

    def _hold(self, lease: Lease, handoff: Handoff) -> None:
        lease_s, loop = self._handover.limits.lease_s, self._service.watch.loop
        self._held = held = Held(lease, handoff, None if lease_s is None else loop.time() + lease_s)
        held.wait(self._ended)

    def _ended(self) -> None:
        """Take note that nobody came for it before its lease ended."""
        self._handover.counts["expired"] += 1
        self._held, self._is_lost = None, True


class DecodeLeg(Attempts):
    """The second leg, to a worker that fetches what was prefilled.

    One that cannot fetch it is asked once more, to prefill by itself: the KV, or who has it, is at fault.
    """

    __slots__ = ("_answer", "_body", "_fetches", "_handover", "_is_alone", "_prefilled", "_was_alone")

    ANSWER: ClassVar[type[DecodeAnswer]] = DecodeAnswer
    _answer: DecodeAnswer

    def __init__(
        self,
        service: Service,
        group: GroupService,
        lease: Lease,
        incoming: Incoming,
        sink: ClientSink,
        prefilled: Prefilled,
        handover: Handover,
    ) -> None:
        super().__init__(service, group, lease, incoming, sink)
        self._prefilled = prefilled
        self._handover = handover
        self._body = b""
        self._fetches = self._is_alone = self._was_alone = False

    def may_move(self, event: Event) -> bool:
        """See deciding.Attempt.may_move."""
        return self.may_serve_alone(event) or super().may_move(event)

    def may_serve_alone(self, event: Event) -> bool:
        """See DecodeAttempt.may_serve_alone."""
        # Once: a request that is at fault itself would run twice wherever it moves.
        return (
            event is _DIED and self._fetches and not self._was_alone and self._handover.transfer.DECODES_ALONE
        )

    def begun(self, *, is_long: bool) -> None:
        """See deciding.Attempt.begun."""
        if self._answer.tells_failure:
            self._prefilled.lost()
        else:
            self._prefilled.taken()
        self._body = b""
        super().begun(is_long=is_long)

    def _after(self, event: Event, error: Exception | None) -> Action:
        if event in _TAKES_ALONG:
            self._prefilled.lost()
        if self.may_serve_alone(event):
            log.warning(
                "worker %s may not have fetched a prefill: %s", self._group.member(self._worker).key, error
            )
            self._handover.counts["unfetched"] += 1
            self._is_alone = self._was_alone = True
            # A request that is at fault itself has run: what loses it now has it lost.
            self._incoming.runs.lost += 1
            return Action.SEND_AFRESH
        return super()._after(event, error)

    async def _move(self) -> None:
        self._prefilled.wait_again()
        await super()._move()

    async def _send(self, *, afresh: bool) -> Action:
        body = await self._prefilled.body(alone=self._is_alone)
        self._fetches, self._is_alone = self._prefilled.is_held, False
        if body is None:
            self._lease.fail()
            return Action.NOTHING
        self._body = body
        return await super()._send(afresh=afresh)

    def _answer_of(self, member: Member, account_kind: type[Account] = Account) -> WorkerAnswer:
        # Whatever fails where nothing is to be fetched is the request's or the engine's own.
        if self.may_serve_alone(_DIED):
            account_kind = DecodeAccount
        self._answer = cast(DecodeAnswer, super()._answer_of(member, account_kind))
        return self._answer

    def _request(self, member: Member, endpoint: Endpoint) -> bytes:
        return self._leg(member, endpoint, self._body, is_read=self._usage_was_added)
