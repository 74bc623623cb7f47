"""What follows from what engines say: offsets, limits, and each message once."""

import logging

import pytest

from brproxy.clock import VirtualClock
from brproxy.engines.load import LoadReading, LoadReport
from brproxy.engines.load_pages import VLLM_WANTED, read_vllm_metrics
from brproxy.ledger import Ledger
from brproxy.lifecycle import entry_of
from brproxy.offsets import OffsetSettings
from brproxy.roster import Roster, WorkerLimits
from brproxy.signals import SLOTS_SEEN_MAX, GroupSignals
from brproxy.telemetry.engine_metrics import EngineMetrics
from brproxy.types import PendingRequest, RequestId, WorkerIndex

FULL = LoadReport(100, 1000, running=1, waiting=0, preemptions=0)


class Group:
    """Workers whose signals the test makes, a poll each second."""

    def __init__(self, *limits):
        self.ledger = Ledger(Roster.of(limits or [WorkerLimits(8)]))
        self.roster = self.ledger.roster
        self.signals = GroupSignals(self.ledger, OffsetSettings())
        self.now_s = 0.0

    def poll(self, reports, times=1, renamed=None):
        members = self.roster.members
        for _ in range(times):
            self.now_s += 1.0
            self.signals.asked(members, self.now_s)
            self.signals.told(members, LoadReading(reports, VLLM_WANTED, renamed or {}), self.now_s)
            self.signals.settle(members, self.now_s)

    def bind(self, kv_tokens, number=0):
        entry = entry_of(RequestId(number), PendingRequest(kv_tokens), 0.0, 10**9)
        self.ledger.bind(entry, WorkerIndex(0), 0.0)
        self.ledger.grow(entry.id, 1)

    def said(self, caplog):
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages


@pytest.fixture(autouse=True)
def all_levels(caplog):
    caplog.set_level(logging.INFO)


def test_a_report_moves_the_offset_and_no_book():
    group = Group()
    group.bind(299)
    group.poll({0: LoadReport(900, 1000)}, 2)
    assert group.ledger.offset == (600,)
    assert group.ledger.kv_tokens == (300,)
    group.poll({0: LoadReport(300, 1000)}, 1)
    assert group.ledger.offset == (0,)


def test_an_offset_is_at_most_what_the_worker_holds():
    group = Group(WorkerLimits(8, 500))
    group.poll({0: LoadReport(4000, 4000)}, 3)
    assert group.ledger.offset == (500,)


@pytest.mark.parametrize("figure", VLLM_WANTED)
def test_what_is_missing_is_said_once_and_only_of_one_that_serves(figure, caplog):
    group = Group()
    said = {name: getattr(FULL, name) for name in VLLM_WANTED if name != figure}
    group.poll({0: LoadReport(**said)}, 20)
    assert not [m for m in group.said(caplog) if "does not tell" in m], (
        "engines have it from their first request"
    )
    group.bind(99)
    group.poll({0: LoadReport(**said)}, 20)
    (message,) = [m for m in group.said(caplog) if "does not tell" in m]
    assert message.startswith(f"worker 0 serves requests and does not tell {figure}: ")
    if figure == "kv_used_tokens":
        assert message.endswith("the booked load alone stands in")
    ((_, signals),) = group.signals.known()
    assert signals.missing == {figure}


def test_what_was_renamed_is_said_once(caplog):
    group = Group()
    group.poll({0: FULL}, 3, {"kv_used_tokens": "old:name"})
    assert "worker 0 tells kv_used_tokens by another name, old:name, which is read instead" in group.said(
        caplog
    )
    group.poll({0: FULL}, 3, {"kv_used_tokens": "old:name"})
    assert group.said(caplog) == []


def test_silence_is_said_once_until_it_has_spoken(caplog):
    group = Group()
    members = group.roster.members
    for _ in range(3):
        group.signals.silent(members, VLLM_WANTED, "/metrics answers 404")
    assert group.said(caplog) == [
        "worker 0 does not tell its load: /metrics answers 404; the booked load alone stands in"
    ]
    group.poll({0: FULL})
    group.said(caplog)
    group.signals.silent(members, VLLM_WANTED, "/metrics answers 404")
    assert len(group.said(caplog)) == 1


def test_a_restarted_engine_is_another_one(caplog):
    group = Group()
    group.poll({0: LoadReport(900, 1000, 1, 0, preemptions=5)}, 2)
    assert group.ledger.offset == (900,)
    assert group.roster.member(0).limits.kv_capacity_tokens == 1000
    group.poll({0: LoadReport(900, 2000, 1, 0, preemptions=0)})
    assert group.ledger.offset == (0,), "of the old one nothing is left, and the new one said it once"
    assert group.roster.member(0).limits.kv_capacity_tokens == 2000
    messages = group.said(caplog)
    assert "the engine of worker 0 started anew" in messages
    group.poll({0: LoadReport(900, 2000, 1, 0, preemptions=0)})
    assert group.ledger.offset == (900,)


@pytest.mark.parametrize(
    ("filed", "found", "warns"),
    [(1000, 1100, False), (1000, 1101, True), (1000, 900, False), (1000, 10, True)],
)
def test_only_a_contradiction_is_warned_of_and_what_is_configured_counts(filed, found, warns, caplog):
    group = Group(WorkerLimits(8, filed))
    group.poll({0: LoadReport(0, found)}, 5)
    messages = group.said(caplog)
    assert len(messages) == warns
    if warns:
        assert str(filed) in messages[0]
        assert str(found) in messages[0]
    assert group.roster.member(0).limits.kv_capacity_tokens == filed


def test_what_is_configured_later_counts_and_what_is_left_out_again_is_found_again():
    group = Group()
    member = group.roster.member(0)
    group.poll({0: FULL})
    assert member.limits == WorkerLimits(8, 1000, capacity_is_found=True)
    group.roster.set_limits_of(member, WorkerLimits(8, 700))
    group.poll({0: FULL}, 2)
    assert member.limits == WorkerLimits(8, 700)
    group.roster.set_limits_of(member, WorkerLimits(8))
    group.poll({0: FULL})
    assert member.limits == WorkerLimits(8, 1000, capacity_is_found=True)


ASSUMED = WorkerLimits(8, slots_are_assumed=True)


def runs(running, waiting, preemptions=1):
    return {0: LoadReport(100, 1000, running, waiting, preemptions=preemptions)}


@pytest.mark.parametrize(("limits", "known"), [(ASSUMED, "assumed"), (WorkerLimits(8), "configured")])
def test_more_at_once_than_slots_is_said_once(limits, known, caplog):
    group = Group(limits)
    group.poll(runs(8, 0), 3)
    assert not [m for m in group.said(caplog) if "at once" in m]
    group.poll(runs(9, 0), 3)
    group.poll(runs(12, 0), 3)
    assert [m for m in group.said(caplog) if "at once" in m] == [
        f"worker 0 ran 9 requests at once, more than the 8 slots that are {known} (vLLM: --max-num-seqs)"
    ]
    assert group.roster.member(0).limits.slots == 8, "nobody waited: it is how many came"


@pytest.mark.parametrize(
    ("limits", "polls", "slots"),
    [
        (ASSUMED, [(20, 3), (20, 3)], 20),
        (ASSUMED, [(20, 3), (18, 1), (19, 1)], 18),
        (ASSUMED, [(20, 3)], 8),
        (ASSUMED, [(20, 3), (20, 0), (20, 3)], 8),
        (ASSUMED, [(20, None), (20, None)], 8),
        (ASSUMED, [(None, 3), (20, 3)], 8),
        (ASSUMED, [(4, 3), (4, 3)], 8),
        (ASSUMED, [(20, 3), (20, 3), (4, 3), (4, 3)], 20),
        (ASSUMED, [(1 << 40, 3), (1 << 40, 3)], SLOTS_SEEN_MAX),
        (WorkerLimits(8), [(20, 3), (20, 3)], 8),
    ],
)
def test_slots_that_are_assumed_rise_to_what_ran_while_others_waited(limits, polls, slots):
    group = Group(limits)
    for running, waiting in polls:
        group.poll(runs(running, waiting))
    assert group.roster.member(0).limits.slots == slots
    assert group.ledger.slots_total == slots
    group.poll(runs(1, 0, preemptions=0))
    assert group.roster.member(0).limits.slots == 8, "another engine may run fewer"


def test_slots_that_are_configured_later_do_not_rise():
    group = Group(ASSUMED)
    group.poll(runs(20, 3), 2)
    group.roster.set_limits_of(group.roster.member(0), WorkerLimits(10))
    group.poll(runs(20, 3), 2)
    group.poll(runs(1, 0, preemptions=0))
    assert group.roster.member(0).limits.slots == 10


def test_one_that_has_gone_is_forgotten():
    group = Group(WorkerLimits(8), WorkerLimits(8))
    group.roster.member(0).rank, group.roster.member(1).rank = 0, 1
    members = group.roster.members
    group.roster.remove("0", bound=0)
    group.signals.asked(members, 1.0)
    group.signals.told(members, LoadReading({0: FULL, 1: FULL}, VLLM_WANTED), 1.0)
    group.signals.settle(members, 1.0)
    group.signals.silent(members, VLLM_WANTED, "x")
    assert [member.key for member, _ in group.signals.known()] == ["1"]


def test_a_rank_that_the_page_does_not_name_misses_all():
    group = Group(WorkerLimits(8), WorkerLimits(8))
    group.roster.member(0).rank, group.roster.member(1).rank = 0, 1
    group.poll({1: FULL})
    (_, first), (_, second) = group.signals.known()
    assert (first.missing, first.read_s) == (frozenset(VLLM_WANTED), None)
    assert (second.missing, second.read_s) == (frozenset(), 1.0)


def test_metrics_have_a_series_for_what_was_said_and_none_for_what_was_not():
    group = Group(WorkerLimits(8), WorkerLimits(8))
    group.roster.member(0).rank, group.roster.member(1).rank = 0, 1
    page = (
        b'vllm:num_requests_running{engine="0"} 3\nvllm:gpu_cache_usage_perc{engine="0"} 1\n'
        b'vllm:cache_config_info{engine="1",num_gpu_blocks="9",block_size="16"} 1\n'
    )
    for _ in range(2):
        group.now_s += 1
        group.signals.asked(group.roster.members, group.now_s)
        group.signals.told(group.roster.members, read_vllm_metrics(page), group.now_s)
    clock = VirtualClock()
    clock.advance_to(5.0)
    found = {
        (sample.name.removeprefix("brproxy_"), *sorted(sample.labels.values())): sample.value
        for family in EngineMetrics(lambda: {"g": group.signals}, clock).collect()
        for sample in family.samples
    }
    missing = {"0": {*VLLM_WANTED} - {"running"}, "1": {*VLLM_WANTED} - {"kv_capacity_tokens"}}
    assert found == {
        ("engine_running_requests", "0", "g"): 3,
        ("engine_kv_capacity_tokens", "1", "g"): 144,
        ("engine_signal_age_seconds", "0", "g"): 3.0,
        ("engine_signal_age_seconds", "1", "g"): 3.0,
        ("engine_signal_renamed", "1", "g", "kv_capacity_tokens"): 1,
        ("silences_kept_total", "g"): 0,
        ("engine_in_band_total", "bad", "g"): 0,
        ("engine_in_band_total", "g", "taken"): 0,
        ("worker_offset_kv_tokens", "0", "g"): 0,
        ("worker_offset_kv_tokens", "1", "g"): 0,
        **{("engine_signal_missing", rank, "g", name): 1 for rank in "01" for name in missing[rank]},
    }


def steps(group, running, waiting, preemptions):
    """Have an engine that works tell its load twenty times."""
    for number in range(20):
        report = LoadReport(100, 1000, running, waiting, preemptions=preemptions, prefill_tokens=number)
        group.poll({0: report})


@pytest.mark.parametrize(("running", "waiting", "is_kept"), [(3, 1, True), (1, 1, True), (1, 0, False)])
def test_a_request_of_several_sequences_is_kept_while_any_may_be_in_the_engine(running, waiting, is_kept):
    group = Group()
    for number, sequences in enumerate((3, 1)):
        entry = entry_of(RequestId(number), PendingRequest(9, sequences=sequences), 0.0, 10**9)
        group.ledger.bind(entry, WorkerIndex(0), 0.0)
    steps(group, running, waiting, 0)
    member = group.roster.member(0)
    put_off_s = group.signals.put_off_s(member, 0.5, group.now_s, 0.0, (120.0, 600.0))
    assert put_off_s == (120.0 if is_kept else 0.0)
    assert group.signals.silences_kept == is_kept


def test_a_restarted_engine_has_no_request_of_before():
    group = Group()
    group.bind(99)
    steps(group, 1, 0, 5)
    steps(group, 1, 0, 0)
    limits = 120.0, 600.0
    member = group.roster.member(0)
    assert group.signals.put_off_s(member, 0.5, group.now_s, 0.0, limits) == 0
    assert group.signals.put_off_s(member, group.now_s - 9, group.now_s, 0.0, limits) == 120
