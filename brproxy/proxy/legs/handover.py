"""What a group's requests are prefilled by, and how what was prefilled gets to the worker that decodes."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Final
from urllib.parse import urlencode

from brproxy.engines.edits import JsonObject
from brproxy.engines.transfer import Handoff, Order, Transfer
from brproxy.origins import read_worker_url
from brproxy.proxy.asking import Question, ask, collected
from brproxy.proxy.exchange.collect import Reply
from brproxy.proxy.incoming import Incoming
from brproxy.proxy.legs.metaserver import NAME, PATH
from brproxy.ranks import line_number
from brproxy.relay.endpoint import Endpoint
from brproxy.relay.errors import ShortageError, WorkerFailedError
from brproxy.roster import Change, Member
from brproxy.types import BrproxyError, PendingRequest, WorkerIndex

if TYPE_CHECKING:
    from brproxy.proxy.service import GroupService

log = logging.getLogger(__name__)

ROOMS: Final = 1 << 62
# As a plain name: looking a member of an enumeration up costs more than comparing it.
_DECODE_FIRST: Final = Order.DECODE_FIRST
_PAGE_BYTES_MAX = 1 << 20

WHAT = ("split", "alone", "again", "recomputed", "expired", "unfetched", "stranded", "freed")
"""What is counted of prefills: requests in two legs, and in one although there are two; prefills that had to
be repeated, as the worker that decodes was lost, as it ran out of room, and as the lease ended; those that it
could not fetch; prompts whose client left them with the worker that prefilled, and how many of these it was
told to free."""


class NotPrefilledError(BrproxyError):
    """No worker that prefills could do it, and one that decodes may do it all; nothing is kept anywhere."""


@dataclass(frozen=True, slots=True)
class HandoverLimits:
    """See the configuration's ``prefill_decode``; ``lease_s`` None: nothing is known of a lease."""

    split_prompt_tokens_min: int
    lease_s: float | None
    free_at_once_max: int
    free_timeout_s: float
    finish_s: float
    metaserver_url: str
    health_checks: bool


def prefill_of(request: PendingRequest) -> PendingRequest:
    """Return what the prefill of a request is to a worker: its prompt and a token, of which nobody learns."""
    # Made anew: a copy by the names of all fields costs as much as choosing a worker.
    return PendingRequest(
        request.prompt_tokens,
        request.model,
        output_tokens_max=1,
        runs_to_max=True,
        user=request.user,
        output_tokens_true=request.output_tokens_true,
        prompt_is_exact=request.prompt_is_exact,
        sequences=request.sequences,
        session_keys=request.session_keys,
        goes_on=request.goes_on,
        count_number=request.count_number,
    )


@lru_cache(maxsize=1024)
def _host(url: str) -> str:
    return read_worker_url(url).origin.host


class Handover:
    """The prefill side of a decode group.

    ``group`` are the workers that prefill, ``bootstrap_ports`` their ports by origin. ``draw`` returns a
    random integer below its argument, ``connect`` what reaches an origin. ``counts`` are by WHAT.
    """

    def __init__(
        self,
        group: GroupService,
        transfer: Transfer,
        limits: HandoverLimits,
        bootstrap_ports: dict[str, int],
        draw: Callable[[int], int],
        connect: Callable[[str], Endpoint],
    ) -> None:
        self.group = group
        self.transfer = transfer
        self.limits = limits
        self.counts: Counter[str] = Counter(dict.fromkeys(WHAT, 0))
        self._bootstrap_ports = bootstrap_ports
        self._draw = draw
        self._connect = connect
        self._pages: dict[WorkerIndex, bytes] = {}
        group.group.roster.observe(self._member_changed)
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: dict[asyncio.Timeout, Member] = {}

    def routable(self) -> Sequence[bool]:
        """Return which of the workers that prefill may be chosen, by index."""
        return self.group.group.roster.routable()

    def has_others(self, failed: Collection[WorkerIndex]) -> bool:
        """Tell whether a worker that prefills may be chosen which is not one of ``failed``."""
        return self.group.group.roster.has_others(failed)

    def moves(self, status: int) -> bool:
        """Tell whether another worker may prefill what one answered with ``status``, an error."""
        return status >= HTTPStatus.INTERNAL_SERVER_ERROR or self.group.dialect.is_refusal(status)

    async def meeting(self, request_id: bytes, prefill: Member) -> Handoff:
        """Return what two legs that are sent together share; raises WorkerFailedError.

        Where the two workers meet at a page, that is asked first, once until ``forget``.
        """
        handoff, path = self.handoff(request_id, prefill), self.transfer.BOOTSTRAP_PATH
        if not path:
            return handoff
        page = self._pages.get(prefill.index)
        if page is None:
            page = self._pages[prefill.index] = await self._ask(handoff, path)
        engine_id = self.transfer.read_bootstrap(page, handoff.prefill_rank)
        if engine_id is None:
            self.forget(prefill.index)
            msg = f"{prefill.key} does not say at port {handoff.bootstrap_port} which engine it is"
            raise WorkerFailedError(msg)
        return handoff._replace(engine_id=engine_id)

    def forget(self, worker: WorkerIndex) -> None:
        """Ask again who a worker is that prefills: it may be another by now."""
        self._pages.pop(worker, None)

    def forget_pages(self) -> None:
        """Ask all workers that prefill again who they are, as they may be reached otherwise."""
        self._pages.clear()

    def is_out(self, worker: WorkerIndex) -> bool:
        """Tell whether a worker was taken out: what it has prefilled is not to be had."""
        return self.group.group.roster.is_out(self.group.member(worker))

    async def collected(
        self, worker: WorkerIndex, request: bytes, *, bytes_max: int, wants_body: bool
    ) -> Reply:
        """Return what a worker answers to a prefill that goes beside a decode leg; raises WorkerFailedError.

        That ends it also where checks take the worker out.
        """
        member, endpoint = self.group.reach(worker)
        try:
            async with asyncio.timeout(None) as scope:
                self._running[scope] = member
                try:
                    return await collected(endpoint, request, bytes_max=bytes_max, wants_body=wants_body)
                finally:
                    del self._running[scope]
        except TimeoutError as error:
            msg = f"{member.key} is unhealthy: {member.health.reason}"
            raise WorkerFailedError(msg) from error
        except WorkerFailedError as error:
            self._unreachable(endpoint, error)
            raise

    def _unreachable(self, endpoint: Endpoint, error: WorkerFailedError) -> None:
        """Take note that no connection could be opened to a worker that prefills, if that is what failed."""
        if error.unreachable and self.limits.health_checks and not isinstance(error, ShortageError):
            now_s = self.group.driver.clock.now_s()
            self.group.record(endpoint, ok=False, reason=str(error), now_s=now_s, refused=error.refused)

    async def _ask(self, handoff: Handoff, path: str) -> bytes:
        host = f"[{handoff.prefill_host}]" if ":" in handoff.prefill_host else handoff.prefill_host
        endpoint = self._connect(f"http://{host}:{handoff.bootstrap_port}")
        try:
            reply = await ask(endpoint, Question(path, self.limits.free_timeout_s, _PAGE_BYTES_MAX))
        finally:
            endpoint.close()
        return reply.body

    def handoff(self, request_id: bytes, prefill: Member | None) -> Handoff:
        """Return what the legs of a request share, new for each try; None: nobody is to prefill yet."""
        room = self._draw(ROOMS)
        transfer_id = f"{request_id.decode('latin-1')}-{room:x}"
        metaserver = ""
        if self.transfer.ORDER is _DECODE_FIRST:
            metaserver = f"{self.limits.metaserver_url}{PATH}?{urlencode({NAME: transfer_id})}"
        if prefill is None:
            return Handoff(transfer_id, room, metaserver=metaserver)
        return Handoff(
            transfer_id,
            room,
            _host(prefill.origin),
            self._bootstrap_ports.get(prefill.origin),
            line_number(prefill.lines),
            len(self.group.behind(self.group.reach(prefill.index)[1])),
            metaserver=metaserver,
        )

    def document(self, incoming: Incoming) -> JsonObject:
        """Return the client's body as both legs are made of it, read once; raises TransferError."""
        upload = incoming.upload
        body, document = upload.beginning or b"", upload.document
        # It may be another by now: one that asks for usage, or has the text so far.
        if document is None or document.body is not body:
            document = upload.document = self.transfer.read(incoming.path, body)
        return document

    def in_background(self, work: asyncio.Task[None]) -> None:
        """Keep a task that nobody waits for, and log what it raises."""
        self._tasks.add(work)
        work.add_done_callback(self._done)

    def may_free(self) -> bool:
        """Tell whether one more prompt may be freed by a decode leg now."""
        return self.transfer.frees_by_decode() and len(self._tasks) < self.limits.free_at_once_max

    @property
    def is_busy(self) -> bool:
        """Whether anything is done in the background, or prefilled beside a decode leg."""
        return bool(self._tasks or self._running)

    def end_prefills(self) -> None:
        """End what is prefilled beside decode legs, as if the workers were out."""
        self._end_prefills(self._running.values())

    async def close(self) -> None:
        """End what is done in the background."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _member_changed(self, member: Member, change: Change) -> None:
        # Who is back may be another engine, and an index is given to the next that comes.
        self.forget(member.index)
        is_sequential = self.transfer.ORDER is Order.PREFILL_FIRST
        if is_sequential and self.transfer.DECODES_ALONE and not any(self.routable()):
            # As those that come now, they are not split.
            self.group.driver.give_up(NotPrefilledError("no worker that prefills is left"))
        if change is Change.OUT:
            self._end_prefills([member])

    def _end_prefills(self, members: Collection[Member]) -> None:
        for scope, member in self._running.items():
            if member in members and not scope.expired():
                scope.reschedule(asyncio.get_running_loop().time())

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        if not isinstance(error, WorkerFailedError):
            log.error("a prompt that was left with a prefill worker could not be freed", exc_info=error)
