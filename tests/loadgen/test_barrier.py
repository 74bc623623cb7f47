"""Barrier statistics by hand."""

import numpy as np
import pytest

from brproxy.types import InvalidInputError
from loadgen import barrier
from loadgen.barrier import BarrierRecord
from loadgen.cluster import Step


def step(duration_s, kv_tokens, prefill_tokens=(0, 0)):
    loads = np.array(kv_tokens)
    return Step(duration_s, loads, np.array(prefill_tokens), loads, [])


def record():
    steps = BarrierRecord()
    steps.add(0.0, step(1.0, [100, 0], [300, 100]), 2)
    steps.add(1.0, step(3.0, [100, 60]), 4)
    steps.add(4.0, step(1.0, [0, 0]), 0)
    return steps


def test_time_averages():
    stats = record().stats(0.0, 4.0)
    assert (stats.steps, stats.busy_s, stats.output_tokens) == (2, 4.0, 6)
    assert stats.imbalance_kv_tokens == pytest.approx((100 * 1 + 40 * 3) / 4)
    assert stats.idle_fraction == pytest.approx(1 - (50 * 1 + 80 * 3) / (100 * 1 + 100 * 3))
    assert stats.mean_kv_tokens == pytest.approx((50 * 1 + 80 * 3) / 4)


def test_prefill_is_balanced_or_not_in_the_steps_that_have_some():
    steps = record()
    assert steps.stats(0.0, 9.0).prefill_balance == pytest.approx(200 / 300)
    steps.add(5.0, step(9.0, [5, 5], [7, 7]), 2)
    assert steps.stats(0.0, 9.0).prefill_balance == pytest.approx((200 / 300 + 1) / 2)
    assert steps.stats(1.0, 5.0).prefill_balance is None


def test_idle_is_of_what_loads_weigh():
    steps = BarrierRecord()
    # The first worker takes twice as long: it is busy all the time, and the others wait for it.
    loads = np.array([50, 90])
    steps.add(0.0, Step(1.0, loads, np.zeros(2, dtype=np.int64), loads * [2.0, 1.0], []), 2)
    stats = steps.stats(0.0, 1.0)
    assert stats.idle_fraction == pytest.approx(1 - 95 / 100)
    assert (stats.imbalance_kv_tokens, stats.mean_kv_tokens) == (40.0, 70.0)


def test_a_window_takes_the_steps_that_begin_in_it():
    stats = record().stats(1.0, 4.0)
    assert (stats.steps, stats.imbalance_kv_tokens) == (1, 40.0)


def test_nothing_to_say():
    assert record().stats(9.0, 10.0).imbalance_kv_tokens is None
    assert record().stats(4.0, 5.0).idle_fraction is None


def test_the_record_is_bounded(monkeypatch):
    monkeypatch.setattr(barrier, "STEPS_MAX", 3)
    with pytest.raises(InvalidInputError, match="more than 3 steps"):
        record().add(5.0, step(1.0, [0], [0]), 0)
