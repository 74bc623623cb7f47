"""Workers that run prompts, and keep their KV for those that decode."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from tests.simulation.actions import KEEP, Answer, Ask
from tests.simulation.kv import FREED_BY_DECODE, Engine, Kept
from tests.simulation.leg_workers import HANDLES, PARAMS, LegWorker, without
from tests.simulation.messages import RANK, request_body, respond
from tests.simulation.wire import Wire
from tests.simulation.workers import PORT, SCRIPT, Attempt, Record

BOOTSTRAP_PORT = 8998


class PrefillWorker(LegWorker):
    """Runs prompts, and keeps their KV under a lease."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.page = "well"
        self._engine: Engine = self._cluster.start(self.host)
        self._loop.network.listen(lambda: _Asked(self), self.host, BOOTSTRAP_PORT)

    def door(self, mode: str) -> None:
        """See Worker.door."""
        super().door(mode)
        self._loop.network.doors[self.host, BOOTSTRAP_PORT].mode = mode

    def die(self) -> None:
        """See Worker.die; what it kept is gone, and another engine takes its place."""
        super().die()
        self._engine.is_alive = False
        self._engine = self._cluster.start(self.host)
        self._engine.is_frozen = self._thaw is not None
        self._cluster.board.changed()

    def freeze(self) -> None:
        """See Worker.freeze."""
        super().freeze()
        self._engine.is_frozen = True

    def thaw(self) -> None:
        """See Worker.thaw."""
        super().thaw()
        self._engine.is_frozen = False
        self._cluster.board.changed()

    def engine_page(self) -> bytes:
        """Return who its ranks are, as the page at the bootstrap port has it."""
        ranks = sorted(int(rank) for rank in self._ranks) or [0]
        return json.dumps({str(rank): {"engine_id": self._engine.name} for rank in ranks}).encode()

    async def _serve_leg(
        self, wire: Wire, known: dict[bytes, bytes], record: Record, number: int, document: Any
    ) -> bool:
        ask = record.ask
        answer = ask.prefills[min(len(record.made(prefill=True)), len(ask.prefills) - 1)]
        attempt = Attempt(number, self.index, answer, respond(ask, answer, number, asked_usage=False), wire)
        attempt.is_prefill = True
        self._see_need(record)
        record.kept = None
        with self._at_work(record, attempt):
            self._see_leg(ask, document)
            attempt.key = self._key(known, ask, document or {})
            return await self._run(wire, known, record, attempt, document)

    async def _run(
        self, wire: Wire, known: dict[bytes, bytes], record: Record, attempt: Attempt, document: Any
    ) -> bool:
        ask, answer, number = record.ask, attempt.answer, attempt.number
        if answer.kind != "answer":
            attempt.response = self._response(ask, answer, number, b"null")
            return await self._answer(wire, attempt)
        came, handles = await self._unless_left(wire, self._prefill(ask, attempt, document))
        if not came:
            return False
        if handles is None:
            attempt.answer = answer = replace(answer, kind="error", stop_at=None, ending=KEEP)
            handles = b"null"
        attempt.answer = answer = replace(answer, late_s=0.0)
        attempt.response = self._response(ask, answer, number, handles)
        for kept in self._engine.kept.values():
            if kept.wire is wire and kept.until_bytes is None:
                record.kept = kept
                kept.until_bytes = wire.transport.written_bytes + sum(map(len, attempt.response.pieces))
        return await self._answer(wire, attempt)

    @staticmethod
    def _response(ask: Ask, answer: Answer, number: int, handles: bytes) -> Any:
        return respond(replace(ask, stream=False), answer, number, asked_usage=False, handles=handles)

    def _see_leg(self, ask: Ask, document: Any) -> None:
        """See that a prefill is asked for, of the prompt that the client sent, and nothing else."""
        if document is None:
            self._wrong("own-leg", f"{self.host} only prefills, and is asked for {ask.kind}")
            return
        sent, limits = json.loads(request_body(ask)), {"max_tokens", "max_completion_tokens", "min_tokens"}
        of_proxy = {*HANDLES, "stream", "stream_options"} | (set() if self._transfer == "sglang" else limits)
        if without(sent, of_proxy) != without(document, of_proxy):
            self._wrong("same-request", f"the prefill of request {ask.id} is another's: {document}")
        if document.get("stream") or "stream_options" in document:
            self._wrong("own-leg", f"the prefill of request {ask.id} is to stream")
        if self._transfer != "sglang" and document.get("max_tokens") != 1:
            self._wrong(
                "own-leg", f"the prefill of request {ask.id} is to make more than a token: {document}"
            )

    def _see_need(self, record: Record) -> None:
        """See that nothing is prefilled again that can be had and that no decode worker has had."""
        kept, cluster = record.kept, self._cluster
        if self._transfer not in FREED_BY_DECODE or not cluster.is_calm or kept is None or not kept.is_told:
            return
        if cluster.is_to_be_had(kept) and kept.key not in record.fetches:
            self._wrong("own-leg", f"{kept.key} is kept, and request {record.ask.id} is prefilled again")

    async def _prefill(self, ask: Ask, attempt: Attempt, document: Any) -> bytes | None:
        """Run the prompt and keep its KV; return the handles, None where nobody came for it."""
        transfer, engine, board = self._transfer, self._engine, self._cluster.board
        params = document.get(PARAMS) or {}
        key, wait_s = attempt.key, self._cluster.parted.wait_s
        kept = Kept(ask.id, self.host, key, attempt.wire)
        if transfer == "sglang" and not await board.until(lambda: key in engine.fetching, wait_s):
            return None
        await self._pause(attempt.answer.late_s)
        if not engine.hold(key, kept):
            return None if transfer == "sglang" else b"null"
        board.changed()
        if transfer == "sglang":
            try:
                await board.until(lambda: not engine.holds(key), wait_s)
            finally:
                # Who leaves while it is fetched ends both.
                engine.free(key, ahead=False)
            return b"null"
        if transfer == "ascend-layerwise":
            try:
                attempt.to = str(params["remote_engine_id"])
                attempt.was_sent = await self._cluster.send(attempt.to)
            finally:
                engine.free(key, ahead=False)
            return b"null" if attempt.was_sent else None
        if transfer == "mooncake":
            return b"null"
        return json.dumps(
            {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_block_ids": [[1, 2]],
                "remote_engine_id": engine.name,
                "remote_request_id": key,
                "remote_host": self.host,
                "remote_port": PORT,
                "transfer_mode": "push" if ask.id % 2 else "pull",
            }
        ).encode()

    def _key(self, known: dict[bytes, bytes], ask: Ask, document: Any) -> str:
        """Return the name of what a leg has kept."""
        if self._transfer == "sglang":
            return self._room(known, document)
        if self._transfer == "mooncake":
            return str(document[PARAMS]["transfer_id"])
        return self._cluster.name(f"kv-of-{ask.id}")

    def _room(self, known: dict[bytes, bytes], document: Any) -> str:
        """Return the room of a leg, which must name the rank that it went to.

        A room of another rank is one where one of them has left the proxy, which then counts fewer: that does
        no harm where the rank is named.
        """
        room, ranks = document["bootstrap_room"], len(self._ranks)
        if document["bootstrap_host"] != self.host:
            self._wrong("own-leg", f"{self.host} is asked for a room at {document['bootstrap_host']}")
        if ranks:
            rank = int(known[RANK])
            if document["disagg_prefill_dp_rank"] != rank:
                self._wrong("own-rank", f"room {room} names another rank than {rank} of {ranks}")
        return str(room)

    async def serve_page(self, wire: Wire) -> None:
        """Answer one who asks who its ranks are."""
        while b"\r\n\r\n" not in wire.received:
            if not await wire.more():
                return
        await self._pause(0.0)
        if self.page == "silent":
            await wire.gone()
            return
        page = {"garbage": b'{"7":', "empty": b"{}"}.get(self.page, self.engine_page())
        status = b"500 Broken" if self.page == "error" else b"200 OK"
        await wire.send(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(page), page))
        await wire.gone()

    def accept_page(self, wire: Wire) -> None:
        """Answer on a new connection to the bootstrap port."""
        script = self._loop.create_task(self._serve_page(wire), name=SCRIPT)
        self._scripts[script] = wire
        script.add_done_callback(self._scripts.pop)

    async def _serve_page(self, wire: Wire) -> None:
        try:
            await self.serve_page(wire)
        finally:
            wire.transport.close()


class _Asked(Wire):
    """The worker's end of a new connection to its bootstrap port."""

    def __init__(self, worker: PrefillWorker) -> None:
        super().__init__()
        self._worker = worker

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._worker.accept_page(self)
