"""The F-score against the formulas of the paper, step by step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.routing.fscore import FScore

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


exact_gammas = st.sampled_from([0.5, 1.0])
exact_weights = st.sampled_from([0.25, 1.0, 2.0, 8.0, 64.0])


@given(token_lists, token_lists, exact_gammas, exact_weights, exact_weights, st.data())
def test_best_is_the_first_of_the_best(worker_margins, demands, gamma, alpha, beta, data):
    weights = FScore.make(len(worker_margins) - 1, gamma, alpha, beta)
    allowed = data.draw(st.lists(st.booleans(), min_size=len(demands), max_size=len(demands)))
    scores = [
        reference_score(weights, worker_margins, demand) if ok else float("-inf")
        for demand, ok in zip(demands, allowed, strict=True)
    ]
    masked = np.where(allowed, np.array(demands, dtype=float), np.inf)
    position, score = weights.best(np.array(worker_margins, dtype=float), masked)
    assert score == pytest.approx(max(scores))
    assert position == scores.index(max(scores))


@given(token_lists, exact_gammas, exact_weights, exact_weights)
def test_the_top_is_where_nothing_is_better(worker_margins, gamma, alpha, beta):
    weights = FScore.make(len(worker_margins) - 1, gamma, alpha, beta)
    lowest, highest = weights.top(np.array(worker_margins, dtype=float))
    grid = sorted({0, *worker_margins, max(worker_margins) + 1000})
    scores = {demand: reference_score(weights, worker_margins, demand) for demand in grid}
    best = max(scores.values())
    for demand, score in scores.items():
        if lowest <= demand <= highest:
            assert highest == float("inf") or score == pytest.approx(best, abs=1e-6)
        elif highest < float("inf"):
            assert score < best
