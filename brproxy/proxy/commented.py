"""Comments of the proxy's own to a client whose stream has not begun (``timeouts.keepalive_comments_s``).

A request may wait in the pool, for another worker after a failure, or for its prefill, and what lies between
client and proxy may take the silence for the end. A comment of server-sent events is read by no client, and
keeps the connection. It costs the status: what a worker answers then comes as the stream that the client was
told to expect, or as an event. The request itself may move on as before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Self

from brproxy.engines.paths import path_kind
from brproxy.proxy.attempts import Attempts
from brproxy.proxy.exchange.client_sink import ClientSink
from brproxy.proxy.exchange.deciding import WorkerAnswer
from brproxy.proxy.going_on import FailoverAttempts
from brproxy.proxy.incoming import Incoming
from brproxy.proxy.legs.handover import Handover
from brproxy.proxy.service import GroupService, Service
from brproxy.relay.framing import choose_framing
from brproxy.relay.response import ResponseHead
from brproxy.types import PendingRequest

COMMENT = b": waiting\n\n"

_LINES = b"Content-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"


class Comments:
    """Tells a client that waits for a stream that it is not forgotten, while the block runs."""

    def __init__(self, service: Service, incoming: Incoming, sink: ClientSink) -> None:
        self._service = service
        # As long as it waits, whatever a reload says.
        self._interval_s = service.limits.comments_s
        self._incoming = incoming
        self._sink = sink
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        incoming, client = self._incoming, self._sink.client
        if (
            incoming.facts.stream
            and path_kind(incoming.path, client.method).streams
            and not client.wants_upgrade
        ):
            if incoming.accept_encoding:
                # A head that has been sent cannot say later that the rest is compressed.
                incoming.accept_encoding = b"identity"
            self._comment_later()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
            # It refers to this object, and all would wait for the garbage collector.
            self._timer = None

    def _comment_later(self) -> None:
        loop = self._service.watch.loop
        self._timer = loop.call_later(self._interval_s, self._comment)

    def _comment(self) -> None:
        """Send a comment, unless it would come between what a worker says, or pile up unread."""
        sink, answer = self._sink, self._sink.client.followed_by
        if isinstance(answer, WorkerAnswer) and answer.has_begun:
            return
        self._comment_later()
        if sink.client.is_paused or sink.client.transport.is_closing():
            return
        if isinstance(answer, WorkerAnswer) and not answer.may_follow_comments:
            return
        if not sink.has_head:
            head = ResponseHead(200, b"OK", _LINES + self._cors_lines(), {}, None, chunked=True)
            framing = choose_framing(head, http10=sink.client.is_http10, bodiless=False, rewritten=False)
            sink.begin(head, framing, is_stream=True)
        sink.say(COMMENT)

    def _cors_lines(self) -> bytes:
        return self._service.cors.lines(self._sink.client.page_origin)


class CommentedAttempts(Attempts):
    """Attempts with comments while the client waits."""

    __slots__ = ()

    async def run(self) -> None:
        """See Attempts.run."""
        with Comments(self._service, self._incoming, self._sink):
            await super().run()


class CommentedFailoverAttempts(CommentedAttempts, FailoverAttempts):
    """The same, and with another worker that goes on where one dies."""

    __slots__ = ()


Split = Callable[
    [Service, GroupService, Handover, PendingRequest, Incoming, ClientSink], Coroutine[None, None, None]
]
"""Has two workers answer a request, as run_split does."""


def commented(split: Split) -> Split:
    """Return ``split`` with comments while the client waits."""

    async def run(
        service: Service,
        group: GroupService,
        handover: Handover,
        request: PendingRequest,
        incoming: Incoming,
        sink: ClientSink,
    ) -> None:
        with Comments(service, incoming, sink):
            await split(service, group, handover, request, incoming, sink)

    return run
