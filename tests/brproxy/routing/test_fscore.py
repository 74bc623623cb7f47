"""The F-score against the formulas of the paper, step by step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.routing.fscore import FScore, margins

token_lists = st.lists(st.integers(0, 100_000), min_size=1, max_size=12)


def reference_score(weights: FScore, worker_margins: list[int], demand: float) -> float:
    gained = weights.alpha * sum(weights.discounts) * demand
    overflow = sum(d * max(0.0, demand - m) for d, m in zip(weights.discounts, worker_margins, strict=True))
    return float(gained - weights.beta * overflow)


@given(token_lists, token_lists, st.floats(0.5, 1.0), st.floats(0.1, 4.0), st.floats(0.1, 200.0))
def test_score_is_the_formula(worker_margins, demands, gamma, alpha, beta):
    weights = FScore.make(len(worker_margins) - 1, gamma, alpha, beta)
    scores = weights.score(np.array(worker_margins, dtype=float), np.array(demands, dtype=float))
    expected = [reference_score(weights, worker_margins, demand) for demand in demands]
    assert scores == pytest.approx(expected, rel=1e-9, abs=1e-3)


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(1, 144))
def test_without_horizon_it_is_br_0(margin, demand, workers):
    score = FScore.make(0, 1.0, 1.0, workers).score(np.array([float(margin)]), np.array([float(demand)]))
    assert score[0] == demand - workers * max(0, demand - margin)


def test_headroom_is_the_discounted_mean_margin():
    weights = FScore.make(2, 0.5, 1.0, 1.0)
    headroom = weights.headroom(np.array([[4.0, 8.0, 16.0], [0.0, 0.0, 7.0]]))
    assert headroom.tolist() == pytest.approx([(4 + 4 + 4) / 1.75, (7 / 4) / 1.75])


def test_margins_are_below_each_steps_own_envelope():
    forecast = np.array([[10.0, 5.0], [7.0, 9.0]])
    assert margins(forecast).tolist() == [[0.0, 4.0], [3.0, 0.0]]
