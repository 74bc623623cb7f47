"""One request's way to a worker: does what its journey says, and tells it what came of that."""

from __future__ import annotations

import asyncio
import logging
from typing import ClassVar

from brproxy.journey import RULES, Action, Event, Journey
from brproxy.proxy import errors
from brproxy.proxy.accounting import Account
from brproxy.proxy.driver import Lease
from brproxy.proxy.errors import ProxyError
from brproxy.proxy.exchange.client_sink import ClientSink
from brproxy.proxy.exchange.deciding import WorkerAnswer
from brproxy.proxy.incoming import Incoming
from brproxy.proxy.service import GroupService, Service
from brproxy.relay.endpoint import Endpoint
from brproxy.relay.errors import ClientGoneError, ShortageError, WorkerFailedError
from brproxy.relay.request import body_length, request_head
from brproxy.roster import Member
from brproxy.types import WorkerIndex

log = logging.getLogger(__name__)

_IDENTITY = b"Accept-Encoding: identity\r\n"

# As plain names: looking a member of an enumeration up costs more than comparing it.
_SEND, _SEND_AFRESH, _WAIT = Action.SEND, Action.SEND_AFRESH, Action.WAIT
_ANSWER, _NOTHING = Action.ANSWER, Action.NOTHING
_BEGUN, _FINISHED, _UNREACHABLE = Event.BEGUN, Event.FINISHED, Event.UNREACHABLE


class Attempts:
    """One request's attempts on workers, one after another.

    ``ASKS_USAGE``: a stream is asked for usage where its client has said nothing about it. ``ANSWER`` is
    what takes an answer.
    """

    ASKS_USAGE: ClassVar[bool] = True
    ANSWER: ClassVar[type[WorkerAnswer]] = WorkerAnswer

    __slots__ = (
        "_error",
        "_group",
        "_incoming",
        "_journey",
        "_lease",
        "_outcome",
        "_service",
        "_sink",
        "_usage_was_added",
        "_worker",
    )

    def __init__(
        self, service: Service, group: GroupService, lease: Lease, incoming: Incoming, sink: ClientSink
    ) -> None:
        self._service = service
        self._group = group
        self._lease = lease
        self._incoming = incoming
        self._sink = sink
        generates = incoming.facts.sequences > 0
        self._journey = Journey(service.limits.retries_max, incoming.runs, generates=generates)
        self._outcome: asyncio.Future[Action]
        self._error: Exception | None = None
        self._worker: WorkerIndex
        self._usage_was_added = False
        upload = incoming.upload
        if self.ASKS_USAGE and incoming.facts.usage_can_be_asked and service.ask_usage and upload.is_whole:
            self._usage_was_added = True
            upload.beginning = group.dialect.ask_usage(upload.beginning or b"")

    async def run(self) -> None:
        """Answer the client; raises ProxyError when nobody can, ClientGoneError when it has left."""
        journey, lease = self._journey, self._lease
        while True:
            worker = lease.worker_now()
            if worker is None:
                worker = await lease.worker()
            self._worker = worker
            action = journey.bound()
            while action is _SEND or action is _SEND_AFRESH:
                action = await self._send(afresh=action is _SEND_AFRESH)
            if action is not _WAIT:
                break
            await self._move()
        if action is _ANSWER:
            raise self._failure()

    # What an answer tells (see deciding.Attempt).

    def may_move(self, event: Event) -> bool:
        """See deciding.Attempt.may_move."""
        return self._journey.may_move(event, repeatable=self._is_repeatable, others=self._lease.has_others())

    def put_off_s(self, member: Member, kept_s: float) -> float:
        """See deciding.Attempt.put_off_s."""
        signals, bound_s = self._group.signals, self._lease.entry.bound_s
        if signals is None or bound_s is None:
            return 0.0
        limits = self._service.relay_limits
        now_s = self._service.clock.now_s()
        return signals.put_off_s(member, bound_s, now_s, kept_s, (limits.stall_s, limits.paused_s_max))

    def begun(self, *, is_long: bool) -> None:
        """See deciding.Attempt.begun."""
        self._journey.happened(_BEGUN)
        if is_long:
            self._incoming.upload.forget()
            self._incoming.lines = b""

    def settle(self, event: Event, error: Exception | None) -> None:
        """See deciding.Attempt.settle."""
        if not self._outcome.done():
            self._outcome.set_result(self._after(event, error))

    def finished(self) -> None:
        """See deciding.Attempt.finished."""
        if not self._outcome.done():
            self._journey.happened(_FINISHED)
            self._outcome.set_result(_NOTHING)

    # How it is done.

    @property
    def _is_repeatable(self) -> bool:
        return not self._incoming.upload.is_spent

    def _after(self, event: Event, error: Exception | None) -> Action:
        self._error = error
        if event in RULES or event is Event.STALE:
            return self._journey.failed(
                event, repeatable=self._is_repeatable, others=self._lease.has_others()
            )
        self._journey.happened(event)
        return Action.ANSWER

    async def _send(self, *, afresh: bool) -> Action:
        """Send the request to its worker and return what is to be done when that has come to an end."""
        service, group, upload = self._service, self._group, self._incoming.upload
        member, endpoint = group.reach(self._worker)
        # What cannot be sent twice does not go where it may find a closed door.
        connection = endpoint.take_idle() if upload.is_whole and not afresh else None
        if connection is None:
            try:
                connection = await endpoint.connect()
            except WorkerFailedError as error:
                return self._not_connected(endpoint, error)
        if member in group.roster.out and self.may_move(_UNREACHABLE):
            # Since it was chosen: whoever tells what is with it did not know of this request yet.
            connection.abandon()
            return self._after(_UNREACHABLE, WorkerFailedError(f"it is unhealthy: {member.health.reason}"))
        self._outcome = service.watch.loop.create_future()
        answer = self._answer_of(member)
        if group.in_band is not None:
            answer.load_taker = group.in_band.taker(self._incoming.lines)
        # Put together there and not kept: the frame stays as long as the stream.
        answer.send(connection, self._request(member, endpoint), whole=upload.is_whole)
        service.watch.add(answer)
        try:
            if not upload.is_whole:
                await upload.pass_on(connection, answer, self._outcome)
            return await self._outcome
        finally:
            service.watch.discard(answer)
            answer.close()

    def _answer_of(self, member: Member, account_kind: type[Account] = Account) -> WorkerAnswer:
        """Return what takes the answer of this worker; ``account_kind`` makes what books it."""
        service, sink, incoming = self._service, self._sink, self._incoming
        account = account_kind(
            self._lease,
            self._group.dialect,
            incoming.facts,
            service.estimator,
            usage_was_added=self._usage_was_added,
        )
        return self.ANSWER(
            self,
            sink,
            account,
            service.relay_limits,
            path=incoming.path,
            member=member,
            bodiless=sink.client.method == "HEAD",
        )

    def _request(self, member: Member, endpoint: Endpoint) -> bytes:
        """Return the request as this worker gets it, as far as it has been read."""
        framing, beginning = self._incoming.upload.framed(self._sink.client.method)
        # What the proxy asked for must be found in the stream, to be taken out again.
        return self._head(member, endpoint, framing, is_read=self._usage_was_added) + beginning

    def _leg(self, member: Member, endpoint: Endpoint, body: bytes, *, is_read: bool) -> bytes:
        """Return the request with ``body`` in place of the client's; ``is_read``: see _head."""
        framing = body_length(self._sink.client.method, body)
        return self._head(member, endpoint, framing, is_read=is_read) + body

    def _head(self, member: Member, endpoint: Endpoint, framing: bytes, *, is_read: bool) -> bytes:
        """Return the head of the request; ``is_read``: what answers it is looked into, and is not coded."""
        incoming = self._incoming
        target, lines = incoming.target, incoming.lines
        if not endpoint.is_plain:
            target, lines = endpoint.adapted(target, lines)
        if self._group.in_band is not None:
            lines = self._group.in_band.asking(lines)
        lines += member.lines + framing
        if incoming.accept_encoding:
            lines += _IDENTITY if is_read else b"Accept-Encoding: %b\r\n" % incoming.accept_encoding
        return request_head(self._sink.client.method, target, endpoint.host_field, lines)

    def _not_connected(self, endpoint: Endpoint, error: WorkerFailedError) -> Action:
        if isinstance(error, ShortageError):
            return self._after(
                Event.SHORTAGE, errors.no_connection_left(str(error), self._service.limits.retry_after_s)
            )
        # Without active checks nothing would ever bring the worker back.
        if self._service.health_checks:
            now_s = self._service.clock.now_s()
            self._group.record(endpoint, ok=False, reason=str(error), now_s=now_s, refused=error.refused)
        # Of one server that nobody can reach the other ranks are no others.
        self._lease.avoid(member.index for member in self._group.behind(endpoint))
        return self._after(_UNREACHABLE, error)

    async def _move(self) -> None:
        """Take the request back from its worker, so that another gets it."""
        name, limits = self._group.member(self._worker).key, self._service.limits
        log.warning("worker %s failed before its first byte: %s", name, self._error)
        # Whoever has just failed need not be the only one: all at once would be a storm.
        await asyncio.sleep(self._journey.wait_s(limits.retry_wait_s, limits.retry_wait_s_max))
        self._lease.retry()

    def _failure(self) -> Exception:
        error = self._error
        if isinstance(error, ProxyError | ClientGoneError):
            return error
        failure = errors.workers_failed(f"No worker took the request: {error}.")
        failure.__cause__ = error
        return failure
