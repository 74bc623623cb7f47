"""What the engines of one barrier group have said of their load, and what follows from it. No I/O.

A page that was read moves offsets in the ledger and fills in limits that the configuration leaves out. What
is missing, renamed, or contradicts the configuration is said once for each worker, not at each reading.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from brproxy.engines.load import LoadReading, LoadReport, matched
from brproxy.engines.load_field import FieldLoad
from brproxy.ledger import Ledger
from brproxy.logs import SparingLog
from brproxy.offsets import Offset, OffsetSettings
from brproxy.roster import Change, Member
from brproxy.silences import Tally, put_off_s
from brproxy.types import TOKENS_MAX

log = logging.getLogger(__name__)

CONTRADICTS = 0.1
"""Share by which the KV capacity that was configured may differ from the engine's without a warning."""

SLOTS_SEEN_MAX = 1 << 14
"""Most slots that are taken up from what a worker was seen to run (requests): more is no engine's."""

IN_BAND_S = 0.25
"""Least time between two reports of a worker that come with responses (seconds): each costs a look at all
that is bound, and two that are believed must not be one and the same."""

_STAND_IN = {
    "kv_used_tokens": "the booked load alone stands in",
    "kv_capacity_tokens": "kv_capacity_tokens of the configuration stands in, without it room is not watched",
    "waiting": "the engine's load is taken up only where it is more than what is booked",
}
_PAGE = "page"
_RAN = "ran"
_NO_STAND_IN = "it is not shown, and decides nothing"


@dataclass(slots=True)
class WorkerSignals:
    """What is known of one worker: its last ``report``, when it was asked for, and what it does not say.

    ``missing`` and ``renamed`` are figures of the report, see LoadReading. ``filed_tokens`` is the KV
    capacity that the configuration says, None where it leaves it to the engine; ``found_tokens`` is the
    engine's. ``assumed_slots`` are those that were assumed first, None where somebody says them. ``said`` is
    what was logged already. ``engines``: how many its last page was of.
    """

    offset: Offset
    tally: Tally
    filed_tokens: int | None
    found_tokens: int | None = None
    assumed_slots: int | None = None
    restarts: SparingLog = field(default_factory=lambda: SparingLog(log))
    capacities: SparingLog = field(default_factory=lambda: SparingLog(log))
    slots: SparingLog = field(default_factory=lambda: SparingLog(log))
    report: LoadReport | None = None
    read_s: float | None = None
    missing: frozenset[str] = frozenset()
    renamed: frozenset[str] = frozenset()
    said: set[str] = field(default_factory=set)
    engines: int = 0
    in_band_s: float = float("-inf")


class GroupSignals:
    """The signals of each member of the group that ``ledger`` is of, as they come and go.

    ``restarted`` is told of a member whose engine has started anew. ``silences_kept`` and ``in_band`` count
    time-outs that were put off, and reports that came with responses ("taken", "bad").
    """

    def __init__(
        self,
        ledger: Ledger,
        settings: OffsetSettings,
        restarted: Callable[[Member], None] = lambda _: None,
    ) -> None:
        self._restarted = restarted
        self._ledger = ledger
        self._roster = ledger.roster
        self._settings = settings
        self._workers: dict[Member, WorkerSignals] = {}
        self.silences_kept = 0
        self.in_band: Counter[str] = Counter(taken=0, bad=0)
        self._silences = SparingLog(log)
        for member in self._roster.members:
            self._member_changed(member, Change.ADDED)
        self._roster.observe(self._member_changed)

    def offsets(self) -> tuple[int, ...]:
        """Return the offset of each worker that decisions see now, by index (KV tokens)."""
        return self._ledger.offset

    def known(self) -> list[tuple[Member, WorkerSignals]]:
        """Return what is known of each member that is there."""
        return list(self._workers.items())

    def asked(self, members: Sequence[Member], now_s: float) -> None:
        """Note what is booked on ``members`` while they are asked."""
        kv_tokens, begun = self._ledger.kv_tokens, self._ledger.begun()
        requests, sequences = self._ledger.requests, self._ledger.sequences
        for member, signals in self._there(members):
            index = member.index
            signals.offset.booked(now_s, kv_tokens[index], begun[index])
            # Of a request with several sequences some may have ended, and one with none may be in no engine.
            few, many = sorted((requests[index], sequences[index]))
            signals.tally.bound(now_s, few, few if few == many else few + many)

    def told(self, members: Sequence[Member], reading: LoadReading, now_s: float) -> None:
        """Take in what the page of ``members``, all behind one endpoint, says; ``asked`` has just been."""
        reports = matched([member.rank for member in members], reading.reports)
        for member, report in zip(members, reports, strict=True):
            signals = self._workers.get(member)
            if signals is not None:
                signals.engines = len(reading.reports)
                self._take_in(member, signals, reading, report or LoadReport(), now_s)

    def told_in_band(self, member: Member, load: FieldLoad, now_s: float) -> None:
        """Take in what a response of ``member`` says of its load, which its page has told of before.

        Nothing of a member behind which several engines are: whose load it is is not said.
        """
        self.in_band["bad"] += load.is_bad
        signals = self._workers.get(member)
        if signals is None or signals.report is None or signals.engines != 1:
            return
        if now_s < signals.in_band_s + IN_BAND_S or load == FieldLoad(is_bad=load.is_bad):
            return
        self.in_band["taken"] += 1
        signals.in_band_s = signals.read_s = now_s
        report, capacity = signals.report, signals.report.kv_capacity_tokens
        if load.waiting is not None:
            report = replace(report, waiting=load.waiting)
        if load.usage is not None and capacity is not None:
            report = replace(report, kv_used_tokens=round(load.usage * capacity))
            self.asked((member,), now_s)
            signals.offset.told(now_s, report.kv_used_tokens or 0, report.waiting)
        signals.report = report
        self.settle((member,), now_s)

    def put_off_s(
        self, member: Member, bound_s: float, now_s: float, kept_s: float, limits: tuple[float, float]
    ) -> float:
        """Return how long a request that is silent is kept beyond its time-out, 0 where it is to be cut.

        It was bound to ``member`` at ``bound_s`` and has been kept for ``kept_s``. ``limits`` are after how
        long it is looked at again, and how long it is kept at most (seconds).
        """
        signals = self._workers.get(member)
        more_s = put_off_s(kept_s, *limits)
        if not more_s or signals is None or not signals.tally.has(bound_s, now_s, self._settings.stale_s):
            return 0.0
        if not kept_s:
            self.silences_kept += 1
            report = signals.report or LoadReport()
            text = "worker %s is silent on a request that its engine has still (%s run, %s wait): it is kept"
            self._silences.log(logging.INFO, text, member.key, report.running, report.waiting)
        return more_s

    def silent(self, members: Sequence[Member], wanted: Sequence[str], reason: str) -> None:
        """Note that ``members`` tell nothing of their load, for ``reason``, and say so once for each."""
        for member, signals in self._there(members):
            signals.report = None
            signals.engines = 0
            signals.tally.forget()
            signals.missing, signals.renamed = frozenset(wanted), frozenset()
            if _PAGE not in signals.said:
                signals.said.add(_PAGE)
                text = "worker %s does not tell its load: %s; the booked load alone stands in"
                log.warning(text, member.key, reason)

    def settle(self, members: Sequence[Member], now_s: float) -> None:
        """Have the ledger know the offsets of ``members`` as they are now."""
        for member, signals in self._there(members):
            capacity = member.limits.kv_capacity_tokens or TOKENS_MAX
            offset = signals.offset.value(now_s, capacity)
            if offset != self._ledger.offset[member.index]:
                self._ledger.set_offset(member.index, offset)

    def _there(self, members: Sequence[Member]) -> list[tuple[Member, WorkerSignals]]:
        return [(member, self._workers[member]) for member in members if member in self._workers]

    def _take_in(
        self, member: Member, signals: WorkerSignals, reading: LoadReading, report: LoadReport, now_s: float
    ) -> None:
        if signals.report is not None and report.started_anew(signals.report):
            signals.restarts.log(logging.INFO, "the engine of worker %s started anew", member.key)
            signals.offset.forget()
            signals.tally.started_anew(now_s)
            signals.said.clear()
            self._restarted(member)
            self._forget_slots(member, signals)
        elif signals.report is not None:
            self._ran(member, signals, report, signals.report)
        says_nothing = report == LoadReport()
        running, waiting = report.running, report.waiting
        held = None if running is None or waiting is None else running + waiting
        signals.tally.told(now_s, held, is_news=report != signals.report)
        signals.report = None if says_nothing else report
        signals.missing = reading.missing(report)
        signals.renamed = frozenset(reading.renamed) - signals.missing
        if not says_nothing:
            signals.read_s = now_s
            signals.said.discard(_PAGE)
        if report.kv_used_tokens is not None:
            signals.offset.told(now_s, report.kv_used_tokens, report.waiting)
        # Compared at each reading: after a restart it may be another.
        if report.kv_capacity_tokens not in {None, signals.found_tokens}:
            signals.found_tokens = report.kv_capacity_tokens
            self._capacity_found(member, signals, report.kv_capacity_tokens or 0)
        self._say(member, signals, reading)

    def _capacity_found(self, member: Member, signals: WorkerSignals, found_tokens: int) -> None:
        filed_tokens = signals.filed_tokens
        if filed_tokens is None:
            limits = replace(member.limits, kv_capacity_tokens=found_tokens, capacity_is_found=True)
            self._roster.set_limits_of(member, limits)
            text = "worker %s has a KV capacity of %d tokens, says its engine"
            signals.capacities.log(logging.INFO, text, member.key, found_tokens)
        elif abs(found_tokens - filed_tokens) > CONTRADICTS * filed_tokens:
            signals.capacities.warning(
                "worker %s: kv_capacity_tokens = %d is configured, and its engine says %d; "
                "what is configured counts",
                member.key,
                filed_tokens,
                found_tokens,
            )

    def _ran(self, member: Member, signals: WorkerSignals, report: LoadReport, before: LoadReport) -> None:
        """Look whether a worker runs more at once than it has slots, as far as anybody knows."""
        limits, running = member.limits, min(report.running or 0, before.running or 0)
        if running <= limits.slots:
            return
        if _RAN not in signals.said:
            signals.said.add(_RAN)
            known = "that are assumed" if limits.slots_are_assumed else "that are configured"
            text = "worker %s ran %d requests at once, more than the %d slots %s (vLLM: --max-num-seqs)"
            log.warning(text, member.key, running, limits.slots, known)
        # With none waiting it says how many came, not how many the engine takes.
        if limits.slots_are_assumed and report.waiting and before.waiting:
            slots = min(running, SLOTS_SEEN_MAX)
            if slots > limits.slots:
                self._roster.set_limits_of(member, replace(limits, slots=slots))
                text = "worker %s is taken to have %d slots: it ran as many while others waited in it"
                signals.slots.log(logging.INFO, text, member.key, slots)

    def _forget_slots(self, member: Member, signals: WorkerSignals) -> None:
        """Assume what was assumed first: another engine may run fewer."""
        if signals.assumed_slots is not None:
            self._roster.set_limits_of(member, replace(member.limits, slots=signals.assumed_slots))

    def _say(self, member: Member, signals: WorkerSignals, reading: LoadReading) -> None:
        """Say what is missing or renamed, each once; what is missing only where it should be there."""
        for figure, name in reading.renamed.items():
            if name not in signals.said:
                signals.said.add(name)
                text = "worker %s tells %s by another name, %s, which is read instead"
                log.info(text, member.key, figure, name)
        # Engines have some gauges only from their first request on.
        if not signals.offset.was_busy:
            return
        for figure in sorted(signals.missing - signals.said):
            signals.said.add(figure)
            text = "worker %s serves requests and does not tell %s: %s"
            log.warning(text, member.key, figure, _STAND_IN.get(figure, _NO_STAND_IN))

    def _member_changed(self, member: Member, change: Change) -> None:
        if change is Change.ADDED:
            offset = Offset(self._settings)
            tally = Tally(self._settings.lag_s)
            filed, assumed = _filed(member), _assumed(member)
            self._workers[member] = WorkerSignals(offset, tally, filed, assumed_slots=assumed)
        elif change is Change.GONE:
            self._workers.pop(member, None)
        elif change is Change.LIMITS and member in self._workers:
            # Somebody has configured it, left it out again, or has asked the engine, which may tell of its
            # smallest rank. What is found as it is told need not be found again.
            signals, limits = self._workers[member], member.limits
            signals.filed_tokens = _filed(member)
            signals.found_tokens = limits.kv_capacity_tokens if limits.capacity_is_found else None
            if signals.assumed_slots is None or not limits.slots_are_assumed:
                signals.assumed_slots = _assumed(member)


def _filed(member: Member) -> int | None:
    """Return the KV capacity that the configuration says, None where it leaves that to the engine."""
    return None if member.limits.capacity_is_found else member.limits.kv_capacity_tokens


def _assumed(member: Member) -> int | None:
    """Return the slots that are assumed, None where somebody says them."""
    return member.limits.slots if member.limits.slots_are_assumed else None
