"""Survival against its formula, request by request and step by step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.prediction.predictor import PREDICTORS, ActiveRequests, make_predictor
from brproxy.prediction.predictors.survival import SurvivalParams

active_rows = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5000), st.integers(0, 40)), max_size=12)


def active_of(rows):
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return ActiveRequests(worker=columns[0], kv_tokens=columns[1], output_tokens=columns[2])


def reference(lengths, rows, workers, horizon_steps, params):
    kept = [min(length, params.output_tokens_max) for length in lengths][-params.window :]
    mean = max(1.0, sum(kept) / len(kept)) if kept else params.prior_output_tokens
    forecast = [[0.0] * (horizon_steps + 1) for _ in range(workers)]
    for worker, kv_tokens, streamed in rows:
        age = min(streamed, params.output_tokens_max)
        for h in range(horizon_steps + 1):
            later = min(age + h, params.output_tokens_max)
            alive_later = sum(length > later for length in kept)
            alive_now = sum(length > age for length in kept)
            survives = (alive_later + (1 - 1 / mean) ** h) / (alive_now + 1)
            forecast[worker][h] += survives * (kv_tokens + h)
    return np.array(forecast)


@given(st.lists(st.integers(0, 60), max_size=30), active_rows, st.integers(0, 12), st.integers(1, 10))
def test_forecast_is_the_formula(lengths, rows, horizon_steps, window):
    params = SurvivalParams(window=window, output_tokens_max=50, prior_output_tokens=20.0)
    predictor = make_predictor("survival", params)
    for length in lengths:
        predictor.observe(length)
    forecast = predictor.forecast(active_of(rows), 3, horizon_steps)
    assert forecast == pytest.approx(reference(lengths, rows, 3, horizon_steps, params))


@pytest.mark.parametrize("name", PREDICTORS.names())
@given(rows=active_rows)
def test_contract(name, rows):
    predictor = make_predictor(name)
    for length in (5, 30, 0, 1 << 40):
        predictor.observe(length)
    forecast = predictor.forecast(active_of(rows), 3, 7)
    assert forecast.shape == (3, 8)
    now = [sum(kv for worker, kv, _ in rows if worker == g) for g in range(3)]
    assert forecast[:, 0] == pytest.approx(now), "column 0 is the load now"
    assert (forecast >= 0).all()


def test_learns_that_outputs_are_short():
    predictor = make_predictor("survival")
    rows = [(0, 1000, 5)]
    before = predictor.forecast(active_of(rows), 1, 10)[0, 10]
    for _ in range(200):
        predictor.observe(8)
    assert predictor.forecast(active_of(rows), 1, 10)[0, 10] < 0.1 * before


def test_the_window_forgets():
    predictor = make_predictor("survival", SurvivalParams(window=10))
    for length in [1000] * 10 + [4] * 10:
        predictor.observe(length)
    assert predictor.mean_output_tokens == 4


def test_parameters_of_another_predictor_are_refused():
    class Other(SurvivalParams.__base__):
        pass

    with pytest.raises(TypeError, match="takes SurvivalParams"):
        make_predictor("survival", Other())
