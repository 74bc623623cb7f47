"""Workers that do what a scenario says: one script for each connection."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.simulation.actions import KEEP, Answer, Ask
from tests.simulation.kv import Kept
from tests.simulation.loop import VirtualLoop
from tests.simulation.messages import BATCH, NAME, RANK, Response, chunk, request_body, respond
from tests.simulation.pages import Pages
from tests.simulation.wire import Wire

PORT = 9000
SCRIPT = "script of a worker"
"""What its task is called: it is no task of the proxy."""
STALE_S = 0.2
"""Within which a kept connection closes that was closed before what came on it (seconds)."""
OWN_BYTES_MAX = 8 << 20
"""More than the proxy itself may read of what it asks a worker, and what is under way when it stops."""

_ENDLESS = bytes(1 << 16)
_NUMBER = re.compile(rb"x-sim: (\d+)")
_MODELS = b'{"object":"list","data":[{"id":"a"},{"id":"b"}]}'


@dataclass
class Attempt:
    """One request that has come to a worker: what it was answered, and how much of that was sent.

    ``number``: how many of that request had come before, to any worker; its answer names it.
    ``has_ended``: all was sent, and nobody had left before that could be seen by the connection's end;
    ``has_stopped``: no more was to be sent, from ``ended_s`` of the loop on.
    ``is_prefill``: of a worker that only prefills. ``was_run``: its KV has come, if it was to come; ``key``
    is the name of that. ``was_sent``: a prefill's has gone to who decodes, ``to``, whatever it answers.
    ``has_asked``: the proxy knows by what the worker has asked of it that the request is there.
    """

    number: int
    worker: int
    answer: Answer
    response: Response
    wire: Wire
    sent_bytes: int = 0
    has_ended: bool = False
    has_stopped: bool = False
    ended_s: float = math.inf
    is_prefill: bool = False
    was_run: bool = True
    key: str = ""
    was_sent: bool = False
    to: str = ""
    has_asked: bool = False

    def __post_init__(self) -> None:
        # Where nothing came before, the proxy cannot have found the connection closed.
        self._is_first = self.wire.requests == 1
        self.came_s = self.wire.loop.time()
        self._from_bytes = self.wire.transport.peer.taken_bytes

    @property
    def sent_all(self) -> bool:
        """Whether all that belongs to the answer was sent."""
        if self.answer.framing == "close" and not self.has_ended:
            # Its end is the connection's, which never came, or too late.
            return False
        needed = self.response.pieces[:-1] if self.answer.extra else self.response.pieces
        return self.sent_bytes >= sum(map(len, needed))

    @property
    def broke(self) -> bool:
        """Whether it was the worker that ended it, before its end."""
        if self.sent_bytes and not self.response.is_http:
            return True
        if self.has_stopped:
            return self.answer.ending in {"close", "reset"}
        return self.wire.is_killed and not self.has_ended

    @property
    def may_be_stale(self) -> bool:
        """Whether it came on a kept connection that was closed as it came, as far as the proxy can tell."""
        has_arrived = self.wire.transport.peer.taken_bytes > self._from_bytes
        ended_s = self.ended_s if self.has_stopped else self.wire.killed_s
        is_late = ended_s - self.came_s > STALE_S
        return self.broke and not (self._is_first or has_arrived or self.has_asked or is_late)

    @property
    def may_be_lost(self) -> bool:
        """Whether what was sent need not arrive: the connection may have been reset behind it.

        That is also what becomes of one that is closed with a request half read.
        """
        resets = self.answer.stop_at is not None and self.answer.ending == "reset"
        return resets or self.answer.early or self.wire.is_killed


@dataclass
class Record:
    """What workers have seen of one request, which ``came`` to them so many times.

    ``attempts`` are those whose body has come too. ``was_refused``: its client got a refusal of theirs.
    ``has_ended``: its client waits no more; it left at ``left_s`` of the loop, if so. ``ids`` are the
    request's ids that workers were told, ``kept`` is the KV of its last prefill, ``fetches`` are by the KV
    that they were to fetch.
    """

    ask: Ask
    attempts: list[Attempt] = field(default_factory=list)
    came: int = 0
    was_refused: bool = False
    has_ended: bool = False
    left_s: float | None = None
    ids: set[bytes] = field(default_factory=set)
    kept: Kept | None = None
    fetches: dict[str, Attempt] = field(default_factory=dict)

    def made(self, *, prefill: bool) -> list[Attempt]:
        """Return the attempts at one of the legs."""
        return [attempt for attempt in self.attempts if attempt.is_prefill == prefill]


class Worker:
    """Listens at ``worker-K:9000``; ``records`` of the requests are by their number and shared by all.

    ``wrong`` is told what no worker should have to see. ``ranks`` are behind it, 0: it is none of several.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        index: int,
        records: dict[int, Record],
        wrong: Callable[[str, str], None],
        ranks: int = 0,
    ) -> None:
        self.index = index
        self._ranks = {b"%d" % number for number in range(ranks)}
        self.host = f"worker-{index}"
        self.health = "well"
        self.pages = Pages()
        self._loop = loop
        self._records = records
        self._wrong = wrong
        self._scripts: dict[asyncio.Task[None], Wire] = {}
        self._thaw: asyncio.Future[None] | None = None
        loop.network.listen(lambda: _Accepted(self), self.host, PORT)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{PORT}"

    @property
    def key(self) -> str:
        """Its name in the proxy, where it is none of several."""
        return f"{self.host}:{PORT}"

    def door(self, mode: str) -> None:
        """Have attempts to connect be answered in another way, see Door."""
        self._loop.network.doors[self.host, PORT].mode = mode

    def die(self) -> None:
        """Reset every connection, as a process that is killed does."""
        for script, wire in list(self._scripts.items()):
            script.cancel()
            wire.is_killed, wire.killed_s = True, self._loop.time()
            wire.transport.reset()

    def freeze(self) -> None:
        """Stand still, as a process that is stopped does: what comes is not read, nothing is sent."""
        if self._thaw is None:
            self._thaw = self._loop.create_future()
            for wire in self._scripts.values():
                wire.transport.pause_reading()

    def thaw(self) -> None:
        """Go on."""
        if self._thaw is not None:
            self._thaw.set_result(None)
            self._thaw = None
            for wire in self._scripts.values():
                wire.transport.resume_reading()

    def unanswered(self) -> list[Record]:
        """Return the requests that are here, read or not, and that no byte has been sent for."""
        found = []
        for wire in self._scripts.values():
            if wire.transport.will_end:
                continue
            came = _NUMBER.search(bytes(wire.received) + wire.transport.unread)
            if came is not None:
                found.append(self._records[int(came[1])])
        return found

    def accept(self, wire: Wire) -> None:
        script = self._loop.create_task(self._serve(wire), name=SCRIPT)
        self._scripts[script] = wire
        script.add_done_callback(self._scripts.pop)
        if self._thaw is not None:
            wire.transport.pause_reading()

    async def _serve(self, wire: Wire) -> None:
        try:
            while await self._serve_one(wire):
                pass
        finally:
            wire.transport.close()

    async def _serve_one(self, wire: Wire) -> bool:
        """Answer one request; return whether to wait for another."""
        while b"\r\n\r\n" not in wire.received:
            if not await wire.more():
                return False
        head, _, rest = bytes(wire.received).partition(b"\r\n\r\n")
        wire.received[:] = rest
        line, *lines = head.split(b"\r\n")
        known = {name.lower(): value.strip() for name, _, value in (one.partition(b":") for one in lines)}
        wire.requests += 1
        if NAME not in known:
            return await self._serve_proxy(wire, line, known)
        self._see_rank(lines)
        if BATCH in known:
            self._wrong("own-batch", f"{self.host} is told of the batch {known[BATCH]!r}")
        record = self._records[int(known[NAME])]
        number = record.came
        record.came += 1
        return await self._serve_attempt(wire, known, record, number)

    async def _serve_attempt(
        self, wire: Wire, known: dict[bytes, bytes], record: Record, number: int
    ) -> bool:
        """Answer a client's request, whose head has come; return whether to wait for another."""
        answer = record.ask.answers[min(number, len(record.ask.answers) - 1)]
        body = None if answer.early else await self._body(wire, known)
        asked_usage = record.ask.own_usage or (body is not None and b'"include_usage":true' in body)
        response = respond(record.ask, answer, number, asked_usage=asked_usage)
        attempt = Attempt(number, self.index, answer, response, wire)
        record.attempts.append(attempt)
        if body is not None:
            self._compare(record.ask, body)
        if not await self._send(wire, answer, attempt):
            return False
        if response.closes or answer.ending != KEEP:
            return False
        if answer.early:
            # Nothing but the rest of this request may come before the next.
            body = await self._body(wire, known)
            if body is None:
                return False
            self._compare(record.ask, body)
        return True

    def _see_rank(self, lines: list[bytes]) -> None:
        """See that the proxy says for which rank a request is, and its client does not."""
        fields = [line.partition(b":") for line in lines]
        said = [value.strip() for name, _, value in fields if name.lower() == RANK]
        if len(said) != bool(self._ranks) or not self._ranks.issuperset(said):
            self._wrong("own-rank", f"{self.host} with the ranks {self._ranks} is asked for {said}")

    def _compare(self, ask: Ask, body: bytes) -> None:
        """See that a client's body has come as it was sent."""
        sent = request_body(ask)
        asking = b'"stream_options":{"include_usage":true},'
        if body != sent and (body.replace(asking, b"", 1) != sent or ask.own_usage):
            self._wrong(
                "same-request", f"request {ask.id} came with another body: {body[:80]!r}, not {sent[:80]!r}"
            )

    async def _body(self, wire: Wire, known: dict[bytes, bytes]) -> bytes | None:
        """Return the body as it was before it was framed; None when it breaks off."""
        if b"chunked" in known.get(b"transfer-encoding", b""):
            body = bytearray()
            while True:
                line = await wire.line()
                if not line:
                    return None
                size = int(line, 16)
                piece = await wire.exactly(size + 2)
                if len(piece) < size + 2:
                    return None
                body += piece[:-2]
                if not size:
                    return bytes(body)
        length = int(known.get(b"content-length", b"0"))
        body = await wire.exactly(length)
        return bytes(body) if len(body) == length else None

    async def _send(self, wire: Wire, answer: Answer, attempt: Attempt) -> bool:
        """Send an answer, or as much as there is of it; return whether the connection is still of use."""
        await self._pause(answer.late_s)
        left = answer.stop_at
        for piece in attempt.response.pieces:
            await self._pause(answer.gap_s)
            if wire.lost:
                return False
            if left is not None and len(piece) >= left:
                attempt.sent_bytes += left
                await wire.send(piece[:left])
                attempt.has_stopped, attempt.ended_s = True, self._loop.time()
                await self._end_early(wire, answer)
                attempt.has_ended = answer.ending == "cut" and not wire.lost
                return False
            left = None if left is None else left - len(piece)
            attempt.sent_bytes += len(piece)
            await wire.send(piece)
        if attempt.response.status == 101:
            await self._echo(wire)
            return False
        if answer.ending == "stale":
            await self._pause(0.1)
        attempt.has_ended = not wire.lost
        return answer.ending != "stale"

    async def _end_early(self, wire: Wire, answer: Answer) -> None:
        if answer.ending == "hang":
            await wire.gone()
        elif answer.ending == "reset":
            wire.transport.reset()

    async def _echo(self, wire: Wire) -> None:
        while True:
            data = bytes(wire.received)
            wire.received.clear()
            await wire.send(data)
            if not await wire.more():
                return

    async def _pause(self, seconds: float) -> None:
        if seconds:
            await asyncio.sleep(seconds)
        if self._thaw is not None:
            await asyncio.shield(self._thaw)

    async def _serve_proxy(self, wire: Wire, line: bytes, known: dict[bytes, bytes]) -> bool:
        """Answer what the proxy itself asks: health and models, and how long a prompt is."""
        await self._pause(0.0)
        if line.startswith(b"POST /tokenize "):
            return await self._count(wire, known)
        # What a client has sent without a number is no check.
        health = self.health if line.startswith((b"GET", b"HEAD")) else "well"
        if health == "health-never":
            await wire.gone()
            return False
        if health == "health-late":
            await self._pause(1.5)
        if health == "health-endless":
            await self._send_for_ever(wire)
            return False
        if line.startswith(b"GET /metrics "):
            await wire.send(self.pages.load_page())
            return True
        status = b"500 Broken" if health == "health-error" else b"200 OK"
        head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (
            status,
            len(_MODELS),
        )
        await wire.send(head if line.startswith(b"HEAD") else head + _MODELS)
        return True

    async def _count(self, wire: Wire, known: dict[bytes, bytes]) -> bool:
        """Answer what the size of a prompt is: mostly some number, at times late, never or nonsense."""
        body = await self._body(wire, known)
        if body is None:
            return False
        late_s, answer = self.pages.count(len(body))
        await self._pause(late_s)
        await wire.send(answer)
        return True

    async def _send_for_ever(self, wire: Wire) -> None:
        """Send a body that has no end, as fast as it is read."""
        await wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent_bytes = 0
        while not wire.lost and not wire.ended:
            await wire.send(chunk(_ENDLESS))
            await asyncio.sleep(0.001)
            sent_bytes += len(_ENDLESS)
            if sent_bytes > OWN_BYTES_MAX:
                self._wrong(
                    "bounded-reads", f"of a check's answer the proxy reads {sent_bytes} bytes and more"
                )
                await wire.gone()


class _Accepted(Wire):
    """The worker's end of a new connection, which starts its script."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._worker = worker

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._worker.accept(self)
