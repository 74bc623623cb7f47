"""What workers have in common that do one half of a request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from tests.simulation.actions import KEEP
from tests.simulation.kv import Cluster
from tests.simulation.loop import VirtualLoop
from tests.simulation.messages import OTHERS
from tests.simulation.wire import Wire
from tests.simulation.workers import SCRIPT, Attempt, Record, Worker

PARAMS = "kv_transfer_params"
HANDLES = (
    *(PARAMS, "bootstrap_host", "bootstrap_port", "bootstrap_room"),
    *("disagg_prefill_dp_rank", "routed_dp_rank", "data_parallel_rank"),
)
"""Members that only workers and the proxy give."""

ID = b"x-request-id"


class LegWorker(Worker):
    """A worker that hands KV over by ``transfer``."""

    def __init__(
        self,
        loop: VirtualLoop,
        index: int,
        records: dict[int, Record],
        wrong: Callable[[str, str], None],
        ranks: int,
        cluster: Cluster,
        transfer: str,
    ) -> None:
        super().__init__(loop, index, records, wrong, ranks)
        self._cluster = cluster
        self._transfer = transfer
        self.running: dict[int, tuple[Record, Attempt]] = {}

    async def _serve_attempt(
        self, wire: Wire, known: dict[bytes, bytes], record: Record, number: int
    ) -> bool:
        body = await self._body(wire, known)
        if body is None:
            return False
        if record.ask.kind in {"chat", "completion"} and record.ask.method == "POST":
            record.ids.add(known.get(ID, b""))
            if len(record.ids) > 1:
                self._wrong("same-request", f"request {record.ask.id} comes with the ids {record.ids}")
            document = json.loads(body)
            if self._names_others(document):
                self._wrong("same-request", f"request {record.ask.id} comes with its client's own handles")
        else:
            document = None
            self._compare(record.ask, body)
        return await self._serve_leg(wire, known, record, number, document)

    def _names_others(self, document: Any) -> bool:
        """Tell whether a request says that its KV is where only its client knows of it."""
        if self._transfer == "sglang":
            return bool(document.get("bootstrap_host") == OTHERS)
        return bool((document.get(PARAMS) or {}).get("remote_engine_id") == OTHERS)

    async def _serve_leg(
        self, wire: Wire, known: dict[bytes, bytes], record: Record, number: int, document: Any
    ) -> bool:
        """Serve a request whose body has come, None for one that is no leg."""
        raise NotImplementedError

    async def _unless_left(self, wire: Wire, work: Coroutine[Any, Any, Any]) -> tuple[bool, Any]:
        """Do ``work`` unless who asked for it leaves first; return whether it was done, and its result."""
        doing = self._loop.create_task(work, name=SCRIPT)
        leaving = self._loop.create_task(wire.gone(), name=SCRIPT)
        try:
            await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
            return (True, doing.result()) if doing.done() else (False, None)
        finally:
            doing.cancel()
            leaving.cancel()

    @contextmanager
    def _at_work(self, record: Record, attempt: Attempt) -> Iterator[None]:
        """Have an attempt be one that is being worked on."""
        record.attempts.append(attempt)
        self.running[id(attempt)] = record, attempt
        try:
            yield
        finally:
            del self.running[id(attempt)]

    async def _answer(self, wire: Wire, attempt: Attempt) -> bool:
        answer = attempt.answer
        if not await self._send(wire, answer, attempt):
            return False
        return not attempt.response.closes and answer.ending == KEEP


def without(document: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Return a document but for the members of these names."""
    return {name: value for name, value in document.items() if name not in names}
