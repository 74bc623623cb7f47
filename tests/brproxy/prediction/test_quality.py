"""Live quality of predictions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.prediction.quality import QualityMonitor


def monitor_with(results, horizon_steps=10):
    """Watch one request for each (p_fin, remaining) and let it finish."""
    monitor = QualityMonitor()
    for request_id, (p_fin, remaining) in enumerate(results):
        survival = np.concatenate((np.ones(horizon_steps), [1 - p_fin]))
        monitor.watch(request_id, 5, survival)
        monitor.finished(request_id, 5 + remaining)
    return monitor


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.3, 0.5, 0.9]), st.integers(1, 20)), max_size=30))
def test_auc_is_the_share_of_pairs_in_the_right_order(results):
    ended = [p for p, remaining in results if remaining <= 10]
    running = [p for p, remaining in results if remaining > 10]
    pairs = [1.0 if e > r else 0.5 if e == r else 0.0 for e in ended for r in running]
    auc = monitor_with(results).report().auc
    assert auc == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)


def test_error_of_the_remaining_steps():
    monitor = QualityMonitor()
    # Ends after 1, 2, 3 or 4 steps, equally likely: 2.5 on average.
    monitor.watch(0, 0, np.array([1.0, 0.75, 0.5, 0.25, 0.0]))
    monitor.finished(0, 4)
    assert monitor.report().mae_steps == pytest.approx(1.5)


def test_calibration():
    assert monitor_with([(0.5, 1), (0.5, 20)]).report().calibration_error == pytest.approx(0.0)
    assert monitor_with([(0.9, 20), (0.9, 20)]).report().calibration_error == pytest.approx(0.9)


def test_only_natural_ends_count():
    monitor = QualityMonitor()
    monitor.watch(0, 0, np.array([1.0, 0.5]))
    monitor.dropped(0)
    monitor.finished(0, 1)
    monitor.finished(7, 1)
    report = monitor.report()
    assert (report.samples, report.auc, report.mae_steps, report.calibration_error) == (0, None, None, None)


def test_what_is_watched_is_bounded():
    monitor = QualityMonitor()
    for request_id in range(5000):
        monitor.watch(request_id, 0, np.array([1.0, 0.5]))
    for request_id in range(5000):
        monitor.finished(request_id, 1)
    assert monitor.report().samples == 2000
