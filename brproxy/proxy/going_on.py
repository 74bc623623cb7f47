"""Requests that go on at another worker, as requests of their own whose answers become one.

Two things end a part early: a worker that dies in the middle of its stream (``limits.failovers_max``), and
one that gives a request up and wants it prefilled anew (vllm-ascend's "recomputed"). What follows has a place
in the books, a journey and a prompt of its own: the client's and the text so far. Where that would not be
exact a stream ends with an error, and what the client has had nothing of is generated from the beginning.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import ClassVar, Final, ParamSpec, Self, TypeVar

from brproxy.engines.continuing import read_completion
from brproxy.engines.paths import Work, path_kind
from brproxy.journey import Runs
from brproxy.lifecycle import NOBODY
from brproxy.proxy.accounting import Account
from brproxy.proxy.attempts import Attempts
from brproxy.proxy.driver import Lease
from brproxy.proxy.errors import ProxyError, stream_broke_off
from brproxy.proxy.exchange.client_sink import ClientSink
from brproxy.proxy.exchange.deciding import WorkerAnswer
from brproxy.proxy.exchange.handles import DecodeAnswer, PairedAnswer
from brproxy.proxy.exchange.kept import KeptAnswer, KeptDecodeAnswer, KeptPairedAnswer
from brproxy.proxy.incoming import Incoming
from brproxy.proxy.kept_events import Keeper
from brproxy.proxy.legs.decode_first import DecodeFirstLegs
from brproxy.proxy.legs.handover import Handover
from brproxy.proxy.legs.prefill_first import DecodeLeg
from brproxy.proxy.legs.split import Kinds, run_split
from brproxy.proxy.legs.together import PairedLegs
from brproxy.proxy.service import GroupService, Service
from brproxy.relay.errors import ClientGoneError
from brproxy.roster import Member
from brproxy.types import PendingRequest, WorkerIndex

log = logging.getLogger(__name__)

COMMENT: Final = b": another worker goes on\n\n"
"""Goes out where a worker has died, between what it said and what another does."""


class Failovers:
    """Counts what comes of the failovers of one request; ``counts`` are those of its group.

    Outcomes: "finished"; "failed", whatever for; "left", the client has; "no_worker", nobody else was there.
    """

    __slots__ = ("_counts", "_is_under_way")

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts
        self._is_under_way = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._end("finished")
        else:
            self._end("left" if issubclass(kind, asyncio.CancelledError | ClientGoneError) else "failed")

    def begin(self, *, has_others: bool) -> None:
        """Note that a worker has died, and whether there is another one to go on."""
        # Whoever went on until now has not come to the end.
        self._end("failed")
        self._is_under_way = True
        if not has_others:
            self._end("no_worker")

    def _end(self, outcome: str) -> None:
        if self._is_under_way:
            self._counts[outcome] += 1
            self._is_under_way = False


Part = Callable[[PendingRequest, frozenset[WorkerIndex]], Awaitable[None]]
"""Has a worker answer the request as it is now, none of those that are named."""


class _Kept(Attempts):
    """Attempts at a part; ``keeper`` is set before they run."""

    ANSWER: ClassVar[type[WorkerAnswer]] = KeptAnswer

    __slots__ = ()

    keeper: Keeper

    def begun(self, *, is_long: bool) -> None:
        """See deciding.Attempt.begun. The request may be needed again, however long the answer is."""
        super().begun(is_long=False)

    def finished(self) -> None:
        """See deciding.Attempt.finished."""
        if self.keeper.is_given_up:
            self._lease.fail()
        super().finished()

    def _answer_of(self, member: Member, account_kind: type[Account] = Account) -> WorkerAnswer:
        answer = super()._answer_of(member, account_kind)
        if isinstance(answer, KeptAnswer | KeptDecodeAnswer | KeptPairedAnswer):
            answer.keeper = self.keeper
        return answer


class KeptAttempts(_Kept):
    """Attempts on workers that do all of it."""

    __slots__ = ("keeper",)


class _KeptDecodeLeg(_Kept, DecodeLeg):
    ANSWER: ClassVar[type[DecodeAnswer]] = KeptDecodeAnswer

    __slots__ = ("keeper",)


class _KeptPairedLegs(_Kept, PairedLegs):
    ANSWER: ClassVar[type[PairedAnswer]] = KeptPairedAnswer

    __slots__ = ("keeper",)


class _KeptDecodeFirstLegs(_Kept, DecodeFirstLegs):
    __slots__ = ("keeper",)


P = ParamSpec("P")
K = TypeVar("K", bound=_Kept)


def _keeping(kind: Callable[P, K], keeper: Keeper) -> Callable[P, K]:
    def make(*args: P.args, **kwargs: P.kwargs) -> K:
        attempts = kind(*args, **kwargs)
        attempts.keeper = keeper
        return attempts

    return make


class FailoverAttempts(Attempts):
    """Attempts at a request that another worker may go on with; at any other as Attempts."""

    __slots__ = ("_keeper",)

    def __init__(
        self, service: Service, group: GroupService, lease: Lease, incoming: Incoming, sink: ClientSink
    ) -> None:
        _note_abort(service, incoming, sink)
        keeper = keeper_of(service, incoming, sink, None) if incoming.facts.stream else None
        self._keeper = None if keeper is None or keeper.completion is None else keeper
        if self._keeper is not None:
            _begin(self._keeper, incoming)
        super().__init__(service, group, lease, incoming, sink)

    async def run(self) -> None:
        """See Attempts.run."""
        if self._keeper is None:
            await super().run()
            return
        first, request = self._lease, self._lease.entry.request
        group, keeper = self._group, self._keeper
        make = _keeping(KeptAttempts, keeper)

        async def part(request: PendingRequest, avoid: frozenset[WorkerIndex]) -> None:
            lease = first
            if avoid:
                lease = group.driver.admit(request, avoid | group.adapters.lacking(request.model))
            with lease:
                await make(self._service, group, lease, self._incoming, self._sink).run()

        with Failovers(self._service.metrics.failovers_of(group.group)) as failovers:
            await _in_parts(part, keeper, group, request, self._incoming, self._sink, failovers)


async def run_split_in_parts(
    service: Service,
    group: GroupService,
    handover: Handover,
    request: PendingRequest,
    incoming: Incoming,
    sink: ClientSink,
) -> None:
    """See run_split: another worker goes on where one gives a request up, or dies."""
    _note_abort(service, incoming, sink)
    keeper = keeper_of(service, incoming, sink, handover)
    if keeper is None:
        await run_split(service, group, handover, request, incoming, sink)
        return
    _begin(keeper, incoming)
    kinds = Kinds(
        _keeping(KeptAttempts, keeper),
        _keeping(_KeptDecodeLeg, keeper),
        _keeping(_KeptPairedLegs, keeper),
        _keeping(_KeptDecodeFirstLegs, keeper),
    )

    async def part(request: PendingRequest, _avoid: frozenset[WorkerIndex]) -> None:
        await run_split(service, group, handover, request, incoming, sink, kinds)

    with Failovers(service.metrics.failovers_of(group.group)) as failovers:
        await _in_parts(part, keeper, group, request, incoming, sink, failovers)


def _note_abort(service: Service, incoming: Incoming, sink: ClientSink) -> None:
    """Take note of a request that ends those of others: streams that are ended then, are so because of it."""
    if path_kind(incoming.path, sink.client.method).aborts:
        service.aborts.asked_s = service.clock.now_s()


def keeper_of(
    service: Service, incoming: Incoming, sink: ClientSink, handover: Handover | None
) -> Keeper | None:
    """Return what keeps the answer to a request, None where nothing can make it go on elsewhere."""
    facts, upload, limits = incoming.facts, incoming.upload, service.limits
    asks_again = handover is not None and handover.transfer.ASKS_AGAIN
    body = upload.beginning
    if not body or not upload.is_whole or incoming.is_form or facts.malformed:
        return None
    if path_kind(incoming.path, sink.client.method).work is not Work.GENERATES:
        return None
    if not asks_again and not (limits.failovers_max and facts.stream):
        return None
    aborts, began_s = service.aborts, service.clock.now_s()
    return Keeper(
        lambda: read_completion(
            incoming.path, body, streams=facts.stream, text_bytes_max=limits.kept_text_bytes_max
        ),
        handover.transfer.asks_again if handover is not None and asks_again else None,
        lambda: aborts.asked_s >= began_s,
        failovers_max=limits.failovers_max if facts.stream else 0,
        recomputed_max=limits.recomputed_max,
    )


def _begin(keeper: Keeper, incoming: Incoming) -> None:
    """Make the request one whose answer can be read."""
    if incoming.accept_encoding:
        incoming.accept_encoding = b"identity"
    if keeper.completion is not None:
        incoming.upload.beginning = keeper.completion.body()
        incoming.facts = incoming.facts._replace(usage_can_be_asked=False)


async def _in_parts(
    part: Part,
    keeper: Keeper,
    group: GroupService,
    request: PendingRequest,
    incoming: Incoming,
    sink: ClientSink,
    failovers: Failovers,
) -> None:
    """Answer the client by one part after another; raises what ``part`` does."""
    body = incoming.upload.beginning
    asked, avoid = request, NOBODY
    while True:
        try:
            await part(request, avoid)
        except ProxyError as error:
            if not keeper.is_cut:
                raise
            # It is kept where it was raised, and its frames would wait for the garbage collector.
            error.__traceback__ = None
        if keeper.is_cut and keeper.member is not None:
            died = keeper.member
            avoid = frozenset({died.index})
            has_others = group.group.roster.has_others(avoid)
            failovers.begin(has_others=has_others)
            if not has_others:
                raise stream_broke_off()
            log.warning("worker %s has not ended a stream, and another one goes on from there", died.key)
            sink.pass_on(COMMENT)
        elif not keeper.is_given_up:
            return
        elif group.handover is not None:
            group.handover.counts["recomputed"] += 1
        keeper.go_on()
        # What goes on is another request.
        incoming.runs = Runs()
        request, incoming.upload.beginning = asked, body
        completion = keeper.completion
        if completion is None or not completion.is_continued:
            continue
        incoming.upload.beginning = completion.body()
        # The prompt is longer than its text says.
        incoming.facts = incoming.facts._replace(teaches=False)
        request = replace(
            asked,
            prompt_tokens=(completion.prompt_tokens or asked.prompt_tokens) + completion.tokens,
            output_tokens_max=completion.tokens_left,
            prompt_hash=None,
            prefix_hash=None,
            count_number=0,
        )
