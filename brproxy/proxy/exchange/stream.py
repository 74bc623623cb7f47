"""A stream of server-sent events on its way to the client.

Its first event is held until it shows whether the worker took the request (an engine may refuse, or tell that
it is dead, with status 200); an incomplete event is held until it is whole; and a stream that breaks off ends
with an error event and no clean end. Comments before the first event go on after a second at most, and the
head with them: what follows them may still come from another worker.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from brproxy.engines.dialect import EventFacts
from brproxy.journey import Event
from brproxy.proxy.errors import stream_broke_off
from brproxy.proxy.events import EventReader
from brproxy.proxy.plain_chunks import plain_chunk_taker
from brproxy.relay.framing import LENGTH, Framing, choose_framing
from brproxy.relay.response import ResponseHead

if TYPE_CHECKING:
    from brproxy.proxy.exchange.deciding import WorkerAnswer

COMMENTS_S = 0.8
"""How long comments before the first event are held: clients count them as a sign of life (seconds)."""


class Stream:
    """One stream: plain events pass after a glance, all others after a close look."""

    __slots__ = (
        "_account",
        "_answer",
        "_events",
        "_head",
        "_is_turned_down",
        "_is_whole",
        "_sink",
        "_timer",
        "_write",
    )

    def __init__(self, answer: WorkerAnswer, head: ResponseHead) -> None:
        self._answer = answer
        self._account = answer.account
        self._sink = answer.sink
        self._write = answer.sink.write
        self._head = head
        self._events = EventReader(answer.account, answer.limits.event_bytes_max)
        self._is_turned_down = False
        # Between two events, and the client has had all of it.
        self._is_whole = False
        self._timer: asyncio.TimerHandle | None = None

    def receive(self, payload: bytes) -> None:
        """See Kind.receive."""
        self._answer.progressed = True
        account = self._account
        events = account.plain.count(payload) if self._is_whole and account.plain is not None else 0
        if not events:
            self._receive_exactly(payload)
            return
        account.count(events)
        self._sink.pass_on(payload)

    def end(self, piece: bytes, trailers: bytes) -> None:
        """See Kind.end."""
        sink, events = self._sink, self._events
        sink.is_corked = True
        self._is_whole = False
        if piece:
            self._receive_exactly(piece)
        if self._is_turned_down:
            return
        if not self._head.is_framed and not events.ends_properly(self._answer.path):
            self._end_broken()
            return
        facts = events.end()
        if facts is not None and self._turns_down(facts):
            return
        if not self._answer.has_begun:
            self._begin()
        sink.pass_on(events.take())
        self._account.learn()
        self._answer.complete(trailers)

    def rest(self) -> bytes:
        """Return what is held that the client gets although the stream breaks off."""
        return self._events.rest()

    def _pass_plain(self, data: bytes, events: int) -> None:
        """Pass on plain chunks as they came: the parser need not see whole chunks."""
        self._answer.progressed = True
        self._account.count(events)
        self._write(data)

    def _receive_exactly(self, payload: bytes) -> None:
        answer, events = self._answer, self._events
        facts = events.read(payload)
        if facts is not None and self._turns_down(facts):
            return
        if events.is_taken:
            if not answer.has_begun:
                self._begin()
            self._sink.pass_on(events.take())
        elif self._timer is None and events.has_held and not self._sink.is_corked:
            self._timer = asyncio.get_running_loop().call_later(COMMENTS_S, self._pass_comments)
        self._is_whole = events.is_between
        plain = self._account.plain
        if plain is not None and self._is_whole and self._sink.chunked and not self._sink.is_corked:
            answer.take_chunks = plain_chunk_taker(plain, self._pass_plain)
        else:
            answer.take_chunks = None

    def _turns_down(self, facts: EventFacts) -> bool:
        """Tell whether another worker gets the request that ``facts`` turn down; else they are the answer."""
        event = Event.DIED if facts.died else Event.REFUSED
        if self._answer.may_move(event):
            self._is_turned_down = True
            self._stop_timer()
            reason = "its engine is dead" if facts.died else "it refused the request in its stream"
            self._answer.moves_on(event, reason)
            return True
        self._account.refused()
        self._events.go_on()
        return False

    def _end_broken(self) -> None:
        """Treat a stream that nothing but the connection's end has ended, too early, as what it is."""
        self._stop_timer()
        if self._answer.has_begun:
            self._answer.break_off(stream_broke_off())
        else:
            self._answer.moves_on(Event.CUT, "its stream ended without [DONE] before its first event")

    def _begin(self) -> None:
        """Send the head, if the client has none: from here on nothing can be retried."""
        if self._timer is not None:
            self._stop_timer()
        # A stream takes minutes: a thousand of them should not hold what nobody needs.
        self._answer.begins(is_long=True)
        self._sink.begin(self._head, self._framing(), is_stream=True)
        self._head = self._head.framing_only()

    def _framing(self) -> Framing:
        http10, rewritten = self._sink.client.is_http10, self._account.usage_was_added
        return choose_framing(self._head, http10=http10, bodiless=False, rewritten=rewritten)

    def _pass_comments(self) -> None:
        """Pass on the comments that have come so far, in a head's wake; the request may still move on."""
        self._timer = None
        framing = self._framing()
        # Another worker's stream would have another length.
        if self._answer.is_over or self._answer.has_begun or framing is LENGTH:
            return
        self._sink.begin(self._head, framing, is_stream=True)
        self._sink.pass_on(self._events.take())

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
