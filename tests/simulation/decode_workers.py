"""Workers that fetch what others have prefilled, and answer."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from tests.simulation.actions import KEEP, Ask
from tests.simulation.kv import FREED_BY_DECODE, MAY_ASK_AGAIN, TOGETHER, Kept
from tests.simulation.leg_workers import HANDLES, ID, PARAMS, LegWorker, without
from tests.simulation.messages import request_body, respond
from tests.simulation.metaserver import Posts
from tests.simulation.wire import Wire
from tests.simulation.workers import Attempt, Record

OUT_S = 3
"""For how long a prefill worker may be out when it is to be fetched from: a connection takes some time."""


class DecodeWorker(LegWorker):
    """Fetches what others have prefilled, and answers."""

    async def _serve_leg(
        self, wire: Wire, known: dict[bytes, bytes], record: Record, number: int, document: Any
    ) -> bool:
        ask = record.ask
        marks = (
            document is not None and ("bootstrap_room" if self._transfer == "sglang" else PARAMS) in document
        )
        handles = {name: document[name] for name in HANDLES if name in document} if marks else {}
        if handles and self._only_frees(record, document):
            return await self._free(wire, handles)
        answer = ask.answers[min(len(record.made(prefill=False)), len(ask.answers) - 1)]
        if answer.kind == "refusal-event" and not ask.stream:
            # There is no event to say it in.
            answer = replace(answer, kind="refusal")
        asked_usage = ask.own_usage or "stream_options" in (document or {})
        response = respond(ask, answer, number, asked_usage=asked_usage)
        attempt = Attempt(number, self.index, answer, response, wire)
        if handles and self._transfer in TOGETHER:
            _, attempt.key = self._place(handles)
        with self._at_work(record, attempt):
            if document is not None:
                self._see_parameters(ask, document)
                self._see_handles(record, handles)
            return await self._run(wire, known, record, attempt, handles, asked_usage=asked_usage)

    async def _run(
        self,
        wire: Wire,
        known: dict[bytes, bytes],
        record: Record,
        attempt: Attempt,
        handles: dict[str, Any],
        *,
        asked_usage: bool,
    ) -> bool:
        ask, answer, number = record.ask, attempt.answer, attempt.number
        if handles and answer.kind not in {"answer", "garbage-body"}:
            is_there, _ = await self._unless_left(wire, self._pause(answer.late_s))
            attempt.answer = replace(answer, late_s=0.0)
            if not is_there:
                self._let_go(handles)
        elif handles:
            was_there, came = await self._unless_left(wire, self._fetch(known, ask, handles))
            if not was_there:
                attempt.was_run = False
                return False
            attempt.has_asked = came and self._transfer == "ascend-layerwise"
            if not came:
                kind = "error-event" if answer.fails_in_event else "error"
                attempt.was_run = False
                attempt.answer = replace(answer, kind=kind, stop_at=None, ending=KEEP, length_said=None)
                attempt.response = respond(ask, attempt.answer, number, asked_usage=asked_usage)
        goes_on = await self._answer(wire, attempt)
        is_scripted = answer.kind not in {"answer", "garbage-body"}
        if handles and wire.ended and not attempt.sent_all and is_scripted:
            # As an engine does with a request that is ended before it has fetched.
            self._let_go(handles)
        return goes_on

    def _only_frees(self, record: Record, document: Any) -> bool:
        """Tell whether a leg is no client's, but one that only has KV freed."""
        said, sent = dict(document), json.loads(request_body(record.ask))
        is_one = said.get("max_tokens") == 1 and said.get("stream") is False and "stream_options" not in said
        return is_one and (bool(sent.get("stream")) or sent.get("max_tokens") != 1 or record.has_ended)

    def _see_parameters(self, ask: Ask, document: Any) -> None:
        """See that a decode leg has the client's own parameters."""
        sent = json.loads(request_body(ask))
        of_proxy = {*HANDLES, *(() if ask.own_usage else ("stream_options",))}
        options = document.get("stream_options")
        if options and self._transfer in MAY_ASK_AGAIN:
            # Of a completion that may have to go on elsewhere each event says how far it is.
            document = document | {"stream_options": without(options, {"continuous_usage_stats"})}
        if without(sent, of_proxy) != without(document, of_proxy):
            self._wrong("same-request", f"request {ask.id} came as {document}, not {sent}")

    def _see_handles(self, record: Record, handles: dict[str, Any]) -> None:
        """See that what was prefilled is to be fetched, and is not gone long since."""
        if self._transfer not in FREED_BY_DECODE:
            return
        kept, late_s = record.kept, self._cluster.late_s
        if not handles:
            before = record.made(prefill=False)[:-1]
            # Who has failed may not have been able to fetch it, and does it all; one that broke off may have
            # taken it along, with nobody left to prefill it again.
            failed = bool(before) and (
                before[-1].answer.kind in {"error", "error-event"} or not before[-1].sent_all
            )
            if kept is not None and kept.is_told and not (failed or self._may_be_gone(record, kept)):
                self._wrong("own-leg", f"request {record.ask.id} is decoded without its prefill")
            return
        name, key = self._place(handles)
        engine = self._cluster.engines[name]
        if late_s is not None and engine.ended_s(key) > late_s:
            self._wrong(
                "lease", f"{key} is to be fetched {engine.ended_s(key):g} s after the end of its lease"
            )
        before = record.fetches.get(key)
        if before is not None and not before.may_be_stale:
            self._wrong("own-leg", f"{key} is to be fetched once more")
        record.fetches[key] = record.attempts[-1]
        host = name.rpartition("-")[0]
        if late_s is not None and self._cluster.out_s(host) > OUT_S:
            self._wrong("own-leg", f"{key} is to be fetched from {host}, which is out")

    def _may_be_gone(self, record: Record, kept: Kept) -> bool:
        """Tell whether the proxy may take KV for gone, and may have reached nobody to prefill it again."""
        is_to_be_had = self._cluster.is_to_be_had(kept) and kept.key not in record.fetches
        return not (self._cluster.is_calm or is_to_be_had)

    async def _free(self, wire: Wire, handles: dict[str, Any]) -> bool:
        await self._pause(0.001)
        self._let_go(handles)
        body = b'{"object":"answer","text":""}'
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        return True

    def _place(self, handles: dict[str, Any]) -> tuple[str, str]:
        """Return the engine that has a leg's KV, and the key."""
        params = handles.get(PARAMS) or {}
        if self._transfer == "mooncake":
            return str(params["remote_engine_id"]), str(params["transfer_id"])
        if self._transfer == "sglang":
            host, room = handles["bootstrap_host"], str(handles["bootstrap_room"])
            alive = [one.name for one in self._cluster.engines.values() if one.is_alive]
            return next((name for name in alive if name.rpartition("-")[0] == host), ""), room
        return str(params["remote_engine_id"]), str(params["remote_request_id"])

    def _let_go(self, handles: dict[str, Any]) -> None:
        if self._transfer == "ascend-layerwise":
            return
        engine, key = self._place(handles)
        self._cluster.free(engine, key, self._transfer)

    async def _fetch(self, known: dict[bytes, bytes], ask: Ask, handles: dict[str, Any]) -> bool:
        """Have KV come; whoever leaves before has it freed."""
        if self._transfer == "ascend-layerwise":
            posts = Posts(self._loop, self._cluster, self._wrong)
            return await posts.have_prefilled(self.host, known[ID], ask, handles[PARAMS])
        engine, key = self._place(handles)
        came = False
        try:
            came = await self._cluster.fetch(engine, key, self._transfer)
        finally:
            if not came:
                self._let_go(handles)
        return came
