"""Clients that do what a scenario says, and that judge what they are answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import NamedTuple

from brproxy.proxy.commented import COMMENT
from tests.brproxy.wire import Answer as Received
from tests.brproxy.wire import AnswerReader, WireError, read_answer
from tests.simulation.actions import Ask, Visit
from tests.simulation.loop import VirtualLoop
from tests.simulation.messages import NAME, request
from tests.simulation.transport import PROXY
from tests.simulation.wire import Wire
from tests.simulation.workers import Attempt, Record

OWN_STATUS = frozenset({400, 404, 408, 411, 413, 414, 417, 429, 431, 502, 503, 504})
"""What the proxy itself may answer; anything else is a worker's."""

_COMMENTED = b"text/event-stream; charset=utf-8"
_ERROR_EVENT = b'data: {"error"'
_STALL_IS_NOTICED_S = 3.0


class Outcome(NamedTuple):
    """What came for one request: an answer, or what there was of one (``partial``)."""

    answer: Received | None
    partial: bytes = b""


class Client:
    """One visit. ``wrong`` is told what no client should have to see."""

    def __init__(
        self,
        loop: VirtualLoop,
        visit: Visit,
        records: dict[int, Record],
        wrong: Callable[[str, str], None],
        own_status: frozenset[int] = OWN_STATUS,
    ) -> None:
        self._loop = loop
        self._visit = visit
        self._own_status = own_status
        self._records = records
        self._wrong = wrong
        self._wire: Wire
        self._received_bytes = self._sent_bytes = 0
        self._stall: asyncio.TimerHandle | None = None
        self._excused = (
            visit.sends_max is not None or visit.stall_s > _STALL_IS_NOTICED_S or visit.half_closes
        )
        self._upheavals_before = loop.upheavals
        self.answered = 0

    async def run(self) -> None:
        """Connect, ask, read, judge, leave."""
        visit = self._visit
        wire = _Told(self._came)
        try:
            _, self._wire = await self._loop.network.connect(lambda: wire, *PROXY)
        except ConnectionRefusedError:
            if not self._is_excused:
                self._wrong("answered", "the proxy takes no connections")
            return
        timers = []
        if visit.leaves_after_s is not None:
            timers.append(self._loop.call_later(visit.leaves_after_s, self._leave))
        sending = self._loop.create_task(self._send_all()) if visit.pipelined else None
        try:
            for position, ask in enumerate(visit.asks):
                if sending is None:
                    await self._send(request(ask), last=position == len(visit.asks) - 1)
                outcome = await self._answer(ask)
                self._judge(ask, outcome)
                if outcome.answer is None or not _keeps(ask, outcome.answer):
                    # Whoever is behind it in the same connection is not answered.
                    break
        finally:
            for timer in timers:
                timer.cancel()
            if self._stall is not None:
                self._stall.cancel()
            if sending is not None:
                sending.cancel()
            self._wire.transport.close()

    # What it does.

    async def _send_all(self) -> None:
        await self._send(b"".join(map(request, self._visit.asks)), last=True)

    async def _send(self, data: bytes, *, last: bool) -> None:
        visit, wire = self._visit, self._wire
        if visit.sends_max is not None:
            data = data[: max(0, visit.sends_max - self._sent_bytes)]
            self._sent_bytes += len(data)
        if visit.piece:
            # The first kilobyte: a crawl through megabytes would be the whole run.
            for start in range(0, min(len(data), 1024), visit.piece):
                if wire.ended:
                    return
                await wire.send(data[start : min(start + visit.piece, 1024)])
                await asyncio.sleep(visit.piece_gap_s)
            data = data[1024:]
        if data:
            await wire.send(data)
        if last and visit.half_closes and visit.sends_max is None and not wire.lost:
            wire.transport.write_eof()

    def _came(self, size: int) -> None:
        """Leave or stall once enough has come."""
        visit = self._visit
        self._received_bytes += size
        if visit.leaves_at_bytes is not None and self._received_bytes >= visit.leaves_at_bytes:
            self._leave()
        if (
            visit.stalls_at_bytes is not None
            and self._stall is None
            and self._received_bytes >= visit.stalls_at_bytes
        ):
            self._wire.transport.pause_reading()
            self._stall = self._loop.call_later(visit.stall_s, self._wire.transport.resume_reading)

    def _leave(self) -> None:
        self._excused = True
        for ask in self._visit.asks:
            self._records[ask.id].left_s = self._loop.time()
        if self._visit.resets:
            self._wire.transport.reset()
        else:
            self._wire.transport.close()

    async def _answer(self, ask: Ask) -> Outcome:
        """Return the final response to ``ask``, or what there is of it at the connection's end."""
        wire, reader = self._wire, AnswerReader(ask.method)
        while True:
            try:
                answer, rest = reader.read(wire.received, closed=wire.ended)
            except WireError as error:
                if not wire.ended:
                    self._wrong("well-formed", f"request {ask.id}: {error}")
                return Outcome(None, bytes(wire.received))
            if answer is None and wire.ended:
                return Outcome(None, bytes(wire.received))
            if answer is not None:
                if answer.status == 101:
                    await wire.gone()
                    wire.received.clear()
                    return Outcome(answer)
                wire.received[:] = rest
                if answer.status >= 200:
                    return Outcome(answer)
                reader = AnswerReader(ask.method)
                continue
            await wire.more()

    # What it thinks of it.

    @property
    def _is_excused(self) -> bool:
        """Whether it need not be answered: it did something itself, or an upheaval broke it off."""
        return self._excused or self._loop.upheavals > self._upheavals_before

    def _judge(self, ask: Ask, outcome: Outcome) -> None:
        if outcome.answer is None:
            self._judge_partial(ask, outcome.partial)
            return
        self.answered += 1
        answer = outcome.answer
        if _is_commented(answer):
            self._judge_commented(ask, answer)
            return
        attempt = self._attempt(ask, answer)
        if ask.kind in {"bad", "page"}:
            # Models may be answered with what a worker said of them.
            if b"Server got itself in trouble" in answer.body and 500 not in self._own_status:
                self._wrong("no-500", f"request {ask.id} ({ask.kind}) is answered {answer.status}")
        elif attempt is None:
            self._judge_own(ask, answer)
        else:
            self._judge_whole(ask, answer, attempt)

    def _attempt(self, ask: Ask, answer: Received) -> Attempt | None:
        """Return the attempt that an answer comes from, None for the proxy's own."""
        named = answer.one(NAME)
        if named is None:
            return None
        number, _, attempt = named.partition(b".")
        if int(number) != ask.id:
            self._wrong("own-answer", f"request {ask.id} is answered what request {int(number)} should be")
        attempts = self._records[int(number)].attempts
        found = next(one for one in attempts if one.number == int(attempt))
        if found.is_prefill and answer.status < 400:
            self._wrong("own-answer", f"request {ask.id} is answered what only its prefill was")
        return found

    def _judge_own(self, ask: Ask, answer: Received) -> None:
        if answer.status not in self._own_status:
            self._wrong(
                "no-500", f"request {ask.id} is answered {answer.status} by the proxy: {answer.body[:80]!r}"
            )
        elif ask.method != "HEAD":
            try:
                json.loads(answer.body)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                if answer.status not in {400, 417, 500}:
                    self._wrong(
                        "no-500", f"request {ask.id}: {answer.status} without words: {answer.body[:80]!r}"
                    )

    def _judge_whole(self, ask: Ask, answer: Received, attempt: Attempt) -> None:
        response = attempt.response
        if answer.status != response.status:
            self._wrong("own-answer", f"request {ask.id}: {response.status} arrives as {answer.status}")
        elif answer.status == 101 or ask.method == "HEAD":
            return
        elif response.is_refusal:
            self._records[ask.id].was_refused = True
        elif _lacks_its_end(answer, attempt):
            self._wrong("no-whole-cut", f"request {ask.id}: a stream without its end arrives as a whole one")
        elif answer.body in response.bodies:
            shows_end = "close" not in {answer.framing, attempt.answer.framing}
            if shows_end and not attempt.sent_all:
                self._wrong("no-whole-cut", f"request {ask.id}: a cut answer arrives as a whole one")
        elif answer.framing == "close" or attempt.answer.framing == "close":
            self._judge_prefix(ask, answer.body, response.bodies)
        elif not response.is_whole or not attempt.sent_all:
            self._wrong(
                "no-whole-cut",
                f"request {ask.id}: a broken answer arrives as a whole one: {answer.body[-80:]!r}",
            )
        else:
            self._wrong("same-bytes", f"request {ask.id}: {answer.body!r} arrives of {response.bodies[0]!r}")

    def _judge_partial(self, ask: Ask, raw: bytes) -> None:
        """Judge an answer that breaks off, or none at all."""
        _, found, _ = raw.partition(b"\r\n\r\n")
        if not found:
            if not self._is_excused and not self._may_be_silent(ask):
                self._wrong("answered", f"request {ask.id} is not answered: {raw[:80]!r}")
            return
        try:
            read_answer(raw, ask.method, closed=True)
        except WireError as error:
            answer = error.answer
        else:
            return
        if answer is None:
            return
        if _is_commented(answer):
            self._judge_commented(ask, answer, is_whole=False)
            return
        attempt = self._attempt(ask, answer)
        if attempt is None:
            # What looks bad may be good enough for a worker, whose answer does not say whose it is.
            is_own = ask.kind != "bad" or answer.status >= 400
            if is_own and not self._is_excused and not self._wire.was_reset:
                self._wrong("answered", f"request {ask.id}: the proxy's own {answer.status} breaks off")
            return
        self._judge_prefix(ask, answer.body, attempt.response.bodies)
        broke = attempt.may_be_lost or not attempt.sent_all or not attempt.response.is_whole
        if not broke and not self._is_excused and not self._wire.was_reset:
            self._wrong(
                "answered", f"request {ask.id}: a whole answer breaks off at {len(answer.body)} bytes"
            )

    def _judge_prefix(self, ask: Ask, body: bytes, bodies: tuple[bytes, ...]) -> None:
        """See that ``body`` is the beginning of one of ``bodies``, and then an error event at most."""
        said, found, _ = body.rpartition(_ERROR_EVENT)
        if found and any(one.startswith(said) for one in bodies):
            return
        if self._excused and any(
            _ERROR_EVENT.startswith(body[at:]) and any(one.startswith(body[:at]) for one in bodies)
            for at in range(max(0, len(body) - len(_ERROR_EVENT)), len(body))
        ):
            # It left within the event.
            return
        if not any(one.startswith(body) for one in bodies):
            self._wrong("same-bytes", f"request {ask.id}: {body!r} is no beginning of {bodies[0]!r}")

    def _judge_commented(self, ask: Ask, answer: Received, *, is_whole: bool = True) -> None:
        """Judge an answer that begins with the proxy's comments: then comes that of one attempt, or an error.

        Its head names no attempt, so that any may be it.
        """
        if not ask.stream or ask.kind not in {"chat", "completion"} or answer.status != 200:
            self._wrong("own-answer", f"request {ask.id} ({ask.kind}) is answered with comments")
        body = answer.body
        while body.startswith(COMMENT):
            body = body.removeprefix(COMMENT)
        attempts = [
            one for one in self._records[ask.id].attempts if not one.is_prefill or one.response.status >= 400
        ]
        bodies = [one for attempt in attempts for one in attempt.response.bodies]
        if is_whole and answer.framing != "close":
            # Where only the connection's end or [DONE] shows the end, that is enough.
            if any(
                body in attempt.response.bodies
                and (
                    body.endswith(b"[DONE]\n\n")
                    if attempt.answer.framing == "close"
                    else attempt.sent_all and attempt.response.is_whole
                )
                for attempt in attempts
            ):
                return
            self._wrong("no-whole-cut", f"request {ask.id}: a whole answer is none: {body[-80:]!r}")
        elif COMMENT.startswith(body) or any(self._may_be_of(body, _as_event(one)) for one in bodies):
            return
        elif not (_ERROR_EVENT.startswith(body) or body.startswith(_ERROR_EVENT)):
            self._judge_prefix(ask, body, tuple(bodies) or (b"",))

    def _may_be_of(self, body: bytes, event: bytes) -> bool:
        """Tell whether ``body`` is what arrives of an event that is written at once."""
        may_end_within = self._is_excused or self._wire.was_reset
        return event.startswith(body) if may_end_within else event == body

    def _may_be_silent(self, ask: Ask) -> bool:
        """Tell whether a connection may end without an answer."""
        return self._wire.was_reset or ask.kind == "bad"


class _Told(Wire):
    """Tells how many bytes have come."""

    def __init__(self, came: Callable[[int], None]) -> None:
        super().__init__()
        self._came = came

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._came(len(data))


def _is_commented(answer: Received) -> bool:
    """Tell whether the proxy's comments are ahead of an answer: then its head is the proxy's as well."""
    return answer.one(NAME) is None and answer.one(b"content-type") == _COMMENTED


def _as_event(body: bytes) -> bytes:
    """Return an answer that is no stream as it comes behind comments."""
    return b"".join(b"data: %b\n" % line for line in body.splitlines()) + b"\n"


def _lacks_its_end(answer: Received, attempt: Attempt) -> bool:
    """Tell whether a stream that was to say where it ends does not, in an answer that looks whole."""
    shows_nothing = attempt.answer.framing == "close" and answer.framing != "close"
    return shows_nothing and attempt.response.is_stream and not answer.body.rstrip(b"\n").endswith(b"[DONE]")


def _keeps(ask: Ask, answer: Received) -> bool:
    connection = (answer.one(b"connection") or b"").lower()
    if answer.status == 101 or answer.framing == "close" or connection == b"close":
        return False
    is_old = ask.http10 or answer.version == b"HTTP/1.0"
    return not ask.closes and (not is_old or connection == b"keep-alive")
