"""The promises about requests in two legs: what is left behind, and how often which leg comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from brproxy.proxy.service import Service
from tests.simulation.actions import Scenario, Trouble
from tests.simulation.kv import FREED_BY_DECODE, Cluster
from tests.simulation.leg_workers import LegWorker
from tests.simulation.workers import Attempt, Record

CANCELLED_S = 1.0
"""Within which a leg ends whose client has left (seconds)."""

FREED_S = 4.0
"""Within which what a request has left behind is freed: longer than a prefill is waited for (seconds)."""

ANSWERED_S = 0.1
"""More than an answer takes that is there (seconds)."""

RUNS_MAX = 2
"""Times that workers may have worked on a request, in either leg, but for prefills that were used."""


class LegChecks:
    """Looks at what becomes of the two legs of ``scenario``; ``wrong`` is told what should not be."""

    def __init__(
        self,
        scenario: Scenario,
        cluster: Cluster,
        records: dict[int, Record],
        wrong: Callable[[str, str], None],
    ) -> None:
        self._cluster = cluster
        self._records = records
        self._wrong = wrong
        self._transfers = dict(cluster.parted.transfers)
        troubles = {action.kind for action in scenario.actions if isinstance(action, Trouble)}
        self._is_calm = cluster.is_calm = not troubles
        if troubles:
            # Connecting may take a second; who stands still reads late.
            cluster.late_s = None if troubles & {"freeze", "clock-jump"} else 1.5
        limits: dict[str, Any] = scenario.settings.get("prefill_decode", {})
        cluster.trusted_s = limits.get("lease_s", cluster.parted.lease_s)
        self._frees_all = limits.get("free_at_once_max", 64) == 64
        self._finish_s = limits.get("finish_prefill_s", 0.0)

    def look(self, ids: Iterable[int]) -> None:
        """See that what requests have left behind was freed, and not only when its lease ends.

        Where nobody was in trouble, and the proxy has been told how to have it freed.
        """
        if not (self._is_calm and self._frees_all):
            return
        for ask_id in ids:
            transfer = self._transfers.get(self._records[ask_id].ask.model)
            if transfer not in FREED_BY_DECODE:
                continue
            for key, kept in self._cluster.left(ask_id):
                if kept.is_told:
                    self._wrong("freed", f"{key} of request {ask_id} is kept although nobody will fetch it")
            self._look_at_prefills(self._records[ask_id])

    def _look_at_prefills(self, record: Record) -> None:
        """See that prefills were waited for whose client had left: only their answers say how to free KV."""
        for prefill in record.made(prefill=True) if record.left_s is not None else []:
            done_s = prefill.came_s + prefill.answer.late_s + ANSWERED_S
            is_due = prefill.answer.kind == "answer" and done_s < record.left_s + self._finish_s
            if is_due and not self._cluster.was_kept(prefill.key):
                self._wrong("freed", f"a prefill of request {record.ask.id} is ended as its client leaves")

    def look_at_work(self, ids: Iterable[int], workers: Iterable[LegWorker]) -> None:
        """See that nobody works for those who have left, where nobody was in trouble.

        A prefill that was begun is waited for, where its KV can be freed then.
        """
        if not self._is_calm:
            return
        gone = set(ids)
        for worker in workers:
            for record, attempt in worker.running.values():
                is_adopted = attempt.is_prefill and self._transfers.get(record.ask.model) in FREED_BY_DECODE
                # Who has sent all, and is silent then, has nothing left to do.
                is_at_work = not (attempt.wire.ended or attempt.sent_all)
                if record.ask.id in gone and is_at_work and not is_adopted:
                    self._wrong("both-end", f"{worker.host} still works on request {record.ask.id}")

    def count(self, record: Record, retries_max: int) -> None:
        """See that neither leg of a request came to workers too often."""
        # One that cannot fetch is asked once more, to prefill by itself.
        is_first = self._transfers.get(record.ask.model) in FREED_BY_DECODE
        ask, most = record.ask, (retries_max + 2) * (retries_max + 1) + is_first
        decodes, prefills = record.made(prefill=False), record.made(prefill=True)
        if len(decodes) > most or len(prefills) > most * (retries_max + 1):
            self._wrong("deliveries", f"request {ask.id}: {len(prefills)} prefills, {len(decodes)} decodes")
        ran = [one for one in decodes if one.was_run and not one.response.is_refusal and self._was_kept(one)]
        # What is lost while the other leg is refused may have been ended by that.
        refused = {one.key for one in decodes if one.response.is_refusal and one.sent_bytes}
        # Whoever has all is sent no more, if the proxy cannot know that and asks for it once more.
        served = {one.to for one in prefills if one.was_sent and one.may_be_stale}
        lost = [one for one in prefills if _is_lost(one) and one.key not in refused and one.to not in served]
        runs = [one for one in (*ran, *lost) if not one.may_be_stale]
        # Two workers that have met have one run.
        met = {one.key for one in runs} - {""}
        if len(met) + sum(not one.key for one in runs) > RUNS_MAX + is_first:
            where = [one.worker for one in runs]
            self._wrong("runs", f"request {ask.id} may have run on workers {where}")

    def _was_kept(self, decode: Attempt) -> bool:
        """Tell whether what a decode leg waits for came to be: else it has not run."""
        return not decode.key or self._cluster.was_kept(decode.key)

    def idle(self, service: Service) -> None:
        """See that nothing of a request is left where the two legs meet."""
        tasks = [len(one.handover._tasks) for one in service.groups.values() if one.handover]
        if len(service.metaserver) or any(tasks):
            self._wrong(
                "nothing-left", f"{len(service.metaserver)} names are waited for, {tasks} tasks free KV"
            )


def _is_lost(prefill: Attempt) -> bool:
    """Tell whether a prefill was begun and came to nothing."""
    response, answer = prefill.response, prefill.answer
    has_head = prefill.sent_bytes >= len(response.pieces[0])
    # By its head: what breaks off behind that is a refusal all the same.
    has_refused = response.is_refusal and has_head
    # Nobody can tell from a whole one what ends with its connection, but of a reset.
    is_well = response.is_http and response.status < 500
    seems_whole = is_well and has_head and answer.framing == answer.ending == "close"
    has_failed = prefill.sent_all and response.status >= 500
    return not (prefill.was_sent or has_refused or seems_whole) and (prefill.broke or has_failed)
