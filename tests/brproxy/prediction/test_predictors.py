"""Every predictor against its formula and one contract, request by request and step by step."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from brproxy.prediction.predictor import (
    LENGTH_UNLIMITED,
    PREDICTORS,
    ActiveRequests,
    PredictorParams,
    Prospect,
    make_predictor,
)
from brproxy.prediction.predictors.exact_match import ExactMatchPredictor
from brproxy.prediction.predictors.survival import SurvivalParams
from brproxy.prediction.projection import project_certain
from brproxy.types import PendingRequest
from tests.draws import draws

WORKERS = 3
REQUEST = PendingRequest(1)
# (worker, kv_tokens, output_tokens, length_max, certain); short outputs lie where the grid is exact.
rows_of_any_kind = st.lists(
    st.tuples(
        st.integers(0, WORKERS - 1),
        st.integers(0, 5000),
        st.integers(0, 40),
        st.sampled_from([LENGTH_UNLIMITED, 5, 30, 45, 60]),
        st.booleans(),
    ).map(lambda row: (*row[:4], row[4] and row[3] != LENGTH_UNLIMITED)),
    max_size=12,
)


def active_of(rows, curves=None):
    columns = list(zip(*rows, strict=True)) or [[]] * 5
    worker, kv, output, limit, certain = (np.array(c, dtype=np.int64) for c in columns)
    curve = np.zeros(len(rows), dtype=np.int64) if curves is None else np.array(curves, dtype=np.int64)
    return ActiveRequests(worker, kv, output, curve, limit, certain.astype(bool))


def plain(worker, kv_tokens, output_tokens):
    return (worker, kv_tokens, output_tokens, LENGTH_UNLIMITED, False)


@cache
def one_that_knows(name):
    """Return a predictor, once, that has observed some outputs: to forecast changes nothing about it."""
    predictor = make_predictor(name)
    for length in (5, 30, 0, 12, 45):
        predictor.observe(PendingRequest(1, prompt_hash=length % 3, prefix_hash=1), length)
    return predictor


KNOWN = st.lists(st.integers(0, 2), min_size=12, max_size=12)
"""Which of the three prompts that it knows each request has."""


def curves_of(name, known):
    curves = [one_that_knows(name).prospect(PendingRequest(1, prompt_hash=i)).curve for i in range(3)]
    return [curves[i] for i in known]


class Reference:
    """Survival with plain loops."""

    def __init__(self, lengths, params):
        self.lengths = [min(length, params.output_tokens_max) for length in lengths][-params.window :]
        self.params = params
        kept = self.lengths
        self.mean = max(1.0, sum(kept) / len(kept)) if kept else params.prior_output_tokens

    def runs_on(self, age, h):
        later = min(age + h, self.params.output_tokens_max)
        age = min(age, self.params.output_tokens_max)
        alive_later = sum(length > later for length in self.lengths)
        alive_now = sum(length > age for length in self.lengths)
        return (alive_later + (1 - 1 / self.mean) ** h) / (alive_now + 1)

    def probability(self, row, h):
        _, _, streamed, limit, certain = row
        if h == 0:
            return 1.0
        if h >= max(1, limit - streamed):
            return 0.0
        return 1.0 if certain else self.runs_on(streamed, h)

    def forecast(self, rows, horizon_steps):
        forecast = np.zeros((WORKERS, horizon_steps + 1))
        for row in rows:
            for h in range(horizon_steps + 1):
                forecast[row[0], h] += self.probability(row, h) * (row[1] + h)
        return forecast


@given(st.lists(st.integers(0, 60), max_size=30), rows_of_any_kind, st.integers(0, 12), st.integers(1, 10))
def test_survival_is_its_formula(lengths, rows, horizon_steps, window):
    params = SurvivalParams(window=window, output_tokens_max=50, prior_output_tokens=20.0)
    predictor = make_predictor("survival", params)
    for length in lengths:
        predictor.observe(REQUEST, length)
    forecast = predictor.forecast(active_of(rows), WORKERS, horizon_steps)
    assert forecast == pytest.approx(
        Reference(lengths, params).forecast(rows, horizon_steps), rel=1e-5, abs=1e-3
    )


# For each list of rows all predictors, as it takes longer to draw one than to foretell it four times.


@given(rows=rows_of_any_kind)
def test_contract(rows):
    for name in PREDICTORS.names():
        note(name)
        keeps_the_contract(name, rows)


def keeps_the_contract(name, rows):
    predictor = make_predictor(name)
    for length in (5, 30, 0, 1 << 40):
        predictor.observe(PendingRequest(1, prompt_hash=length % 7, prefix_hash=1), length)
    forecast = predictor.forecast(active_of(rows), WORKERS, 7)
    assert forecast.shape == (WORKERS, 8)
    now = [sum(row[1] for row in rows if row[0] == g) for g in range(WORKERS)]
    assert forecast[:, 0] == pytest.approx(now, rel=1e-6), "column 0 is the load now"
    assert (forecast >= 0).all()
    survival = predictor.survival(active_of(rows), 7)
    assert survival.shape == (len(rows), 8)
    assert (np.diff(survival, axis=1) <= 1e-6).all(), "nobody comes back"
    assert predictor.mean_output_tokens >= 1


@given(
    rows=rows_of_any_kind,
    sequences=st.lists(st.integers(0, 4), min_size=12, max_size=12),
    horizon_steps=st.sampled_from([0, 1, 7, 30]),
)
def test_a_request_of_n_sequences_grows_by_n_tokens_a_step(rows, sequences, horizon_steps):
    for name in PREDICTORS.names():
        note(name)
        grows_by_n_tokens_a_step(name, rows, sequences, horizon_steps)


def grows_by_n_tokens_a_step(name, rows, sequences, horizon_steps):
    predictor = one_that_knows(name)
    sequences = sequences[: len(rows)]
    together = replace(active_of(rows), sequences=np.array(sequences, dtype=np.int64))
    # The tokens on one row, and n rows without any, that end with it; who grows by nothing takes one back.
    tokens = predictor.forecast(active_of(rows), WORKERS, horizon_steps)
    empty = [[(g, 0, *rest)] for g, _, *rest in rows]
    growth = [predictor.forecast(active_of(each), WORKERS, horizon_steps) for each in empty]
    expected = tokens + sum((n - 1) * each for n, each in zip(sequences, growth, strict=True))
    forecast = predictor.forecast(together, WORKERS, horizon_steps)
    assert forecast == pytest.approx(expected, rel=1e-4, abs=1e-2)
    discounts = 0.9 ** np.arange(horizon_steps + 1)
    load = predictor.discounted_load(together, WORKERS, discounts)
    assert load == pytest.approx(expected @ discounts, rel=1e-4, abs=1e-2)


@given(rows=rows_of_any_kind, known=KNOWN, horizon_steps=st.sampled_from([0, 1, 7, 30]))
def test_the_discounted_load_is_the_forecast_weighed(rows, known, horizon_steps):
    for name in PREDICTORS.names():
        note(name)
        is_the_forecast_weighed(name, rows, known, horizon_steps)


def is_the_forecast_weighed(name, rows, known, horizon_steps):
    predictor, curves = one_that_knows(name), curves_of(name, known[: len(rows)])
    active, discounts = active_of(rows, curves), 0.9 ** np.arange(horizon_steps + 1)
    load = predictor.discounted_load(active, WORKERS, discounts)
    expected = predictor.forecast(active, WORKERS, horizon_steps) @ discounts
    assert load == pytest.approx(expected, rel=1e-5, abs=1e-3)


@given(
    rows=rows_of_any_kind,
    known=KNOWN,
    steps=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    sequences=st.lists(st.integers(0, 4), min_size=12, max_size=12),
)
def test_the_load_at_some_steps_is_the_forecast_of_those(rows, known, steps, sequences):
    for name in PREDICTORS.names():
        note(name)
        is_the_forecast_of_those(name, rows, known, steps, sequences)


def is_the_forecast_of_those(name, rows, known, steps, sequences):
    predictor, curves = one_that_knows(name), curves_of(name, known[: len(rows)])
    active = replace(active_of(rows, curves), sequences=np.array(sequences[: len(rows)], dtype=np.int64))
    load = predictor.load_at(active, WORKERS, np.array(steps, dtype=np.int64))
    assert load == pytest.approx(predictor.forecast(active, WORKERS, 30)[:, steps], rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("name", PREDICTORS.names())
def test_state_is_kept(name):
    def request(i):
        return PendingRequest(1, "m", prompt_hash=i % 5, prefix_hash=i % 2, user="u")

    first, second = make_predictor(name), make_predictor(name)
    for i in range(100):
        first.observe(request(i), 10 * (i % 5) + i % 3, ended=i % 4 > 0)
    second.restore(first.state())
    rows = [plain(i % WORKERS, 100, i % 40) for i in range(20)]
    for predictor in (first, second):
        # The cache of curves is refreshed at different moments: ask both for a fresh one.
        predictor.observe(request(0), 20)
        predictor.forecast(active_of(rows), WORKERS, 3)
    curves = [[p.prospect(request(i)).curve for i in range(20)] for p in (first, second)]
    forecasts = [
        p.forecast(active_of(rows, c), WORKERS, 9) for p, c in zip((first, second), curves, strict=True)
    ]
    assert forecasts[0] == pytest.approx(forecasts[1], rel=0.02)


@pytest.mark.parametrize("state", [{}, {"lengths": 5}, {"lengths": ["x"]}])
def test_a_state_that_is_none_is_refused(state):
    with pytest.raises((KeyError, TypeError, ValueError)):
        make_predictor("survival").restore(state)


def test_survival_learns_that_outputs_are_short():
    predictor = make_predictor("survival")
    before = predictor.forecast(active_of([plain(0, 1000, 5)]), 1, 10)[0, 10]
    for _ in range(200):
        predictor.observe(REQUEST, 8)
    assert predictor.forecast(active_of([plain(0, 1000, 5)]), 1, 10)[0, 10] < 0.1 * before


def test_the_window_forgets():
    predictor = make_predictor("survival", SurvivalParams(window=10))
    for length in [1000] * 10 + [4] * 10:
        predictor.observe(REQUEST, length)
    assert predictor.mean_output_tokens == 4


def test_what_is_learnt_takes_effect_now_and_then_and_all_at_once():
    predictor, discounts = make_predictor("survival"), [0.9 ** np.arange(n) for n in (5, 5, 9)]
    for _ in range(640):
        predictor.observe(REQUEST, 10)
    means, active = [], active_of([plain(0, 1000, 3), plain(1, 500, 0)])
    for i in range(20):
        predictor.observe(REQUEST, 100)
        means.append(predictor.mean_output_tokens)
        # Whatever is cached belongs to these discounts and to what has been learnt.
        mine = discounts[i % 3]
        load = predictor.discounted_load(active, WORKERS, mine)
        assert load == pytest.approx(predictor.forecast(active, WORKERS, len(mine) - 1) @ mine, rel=1e-5)
    assert len(set(means)) == 2
    assert means == sorted(means)


def test_what_a_request_says_makes_its_prospect():
    predictor = make_predictor("survival")
    assert predictor.prospect(REQUEST) == Prospect()
    assert predictor.prospect(PendingRequest(1, output_tokens_max=9)) == Prospect(0, 9, certain=False)
    certain = PendingRequest(1, output_tokens_max=9, runs_to_max=True)
    assert predictor.prospect(certain) == Prospect(0, 9, certain=True)
    assert predictor.prospect(PendingRequest(1, runs_to_max=True)) == Prospect()


def test_the_oracle_knows():
    oracle = make_predictor("oracle")
    assert oracle.prospect(PendingRequest(1, output_tokens_true=7)) == Prospect(0, 7, certain=True)
    assert oracle.prospect(PendingRequest(1, output_tokens_max=5, output_tokens_true=7)).length_max == 5
    assert oracle.prospect(REQUEST) == Prospect()


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 99), st.integers(-3, 20)), max_size=15))
def test_certain_requests_need_no_loop_over_steps(rows):
    worker, kv, remaining = (
        np.array(c, dtype=np.int64) for c in (zip(*rows, strict=True) if rows else [[]] * 3)
    )
    expected = np.zeros((3, 9))
    for g, tokens, left in rows:
        for h in range(9):
            expected[g, h] += (tokens + h) if h == 0 or h < left else 0
    assert project_certain(worker, kv, remaining, 3, 8) == pytest.approx(expected)


def learnt(name, samples, **params):
    predictor = make_predictor(name, PREDICTORS.get(name).Params(**params))
    for request, lengths in samples:
        for length in lengths:
            predictor.observe(request, length)
    return predictor


def still_running(predictor, request, age, h):
    curve = predictor.prospect(request).curve
    return predictor.survival(active_of([plain(0, 0, age)], [curve]), h)[0, h]


@pytest.mark.parametrize("name", ["survival", "exact-match", "hierarchical"])
@pytest.mark.parametrize("seed", range(4))
def test_clients_that_leave_at_random_make_no_curve_short(name, seed):
    params = {} if name == "survival" else {"key_window": 400}
    rng, predictor = np.random.default_rng(seed), learnt(name, [], **params)
    request = PendingRequest(1, "m", prompt_hash=1, prefix_hash=1, user="u")
    lengths = np.minimum(rng.geometric(1 / 100, 400), 5000)
    leaves = rng.geometric(1 / 60, 400)
    for length, left in zip(lengths.tolist(), leaves.tolist(), strict=True):
        predictor.observe(request, min(length, left), ended=length <= left)
    active = active_of([plain(0, 0, 0)], [predictor.prospect(request).curve])
    for age in (20, 60, 120):
        expected = (lengths > age).mean()
        assert predictor.survival_at(active, np.array([age]))[0, 0] == pytest.approx(expected, abs=0.12)
    # Who takes those that left for outputs that ended, or knows only the others, is far off.
    assert (np.minimum(lengths, leaves) > 60).mean() < 0.7 * (lengths > 60).mean()


SHORT, LONG = PendingRequest(1, prompt_hash=1), PendingRequest(1, prompt_hash=2)


def test_exact_match_tells_prompts_apart():
    predictor = learnt("exact-match", [(SHORT, [10] * 30), (LONG, [50] * 30)])
    assert still_running(predictor, SHORT, 5, 10) < 0.05
    assert still_running(predictor, LONG, 5, 10) > 0.95
    assert 0.3 < still_running(predictor, PendingRequest(1, prompt_hash=3), 5, 10) < 0.7


def test_exact_match_falls_back_once_all_its_siblings_have_ended():
    predictor = learnt("exact-match", [(SHORT, [10] * 30), (LONG, [50] * 30)])
    # 20 tokens in, this is no short one after all: only the global curve knows such requests.
    assert still_running(predictor, SHORT, 20, 10) > 0.9


def test_a_key_seen_once_leans_on_its_parent():
    predictor = learnt("exact-match", [(LONG, [50] * 200), (SHORT, [10])], prior_samples=4.0)
    assert 0.7 < still_running(predictor, SHORT, 0, 20) < 0.95


def test_hierarchical_knows_a_template_it_has_not_seen_this_prompt_of():
    template = [(PendingRequest(1, prompt_hash=i, prefix_hash=77), [10]) for i in range(30)]
    others = [(PendingRequest(1, prompt_hash=100 + i, prefix_hash=100 + i), [50]) for i in range(200)]
    unseen = PendingRequest(1, prompt_hash=999, prefix_hash=77)
    assert still_running(learnt("hierarchical", template + others), unseen, 0, 20) < 0.1
    assert still_running(learnt("exact-match", template + others), unseen, 0, 20) > 0.8


def test_hierarchical_knows_who_asks():
    mine = [(PendingRequest(1, "m", prompt_hash=i, user="me"), [10]) for i in range(50)]
    others = [(PendingRequest(1, "m", prompt_hash=100 + i, user="you"), [50]) for i in range(200)]
    predictor = learnt("hierarchical", mine + others)
    assert still_running(predictor, PendingRequest(1, "m", user="me"), 0, 20) < 0.1


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40)), min_size=1, max_size=40),
    st.integers(0, 2),
    st.integers(0, 30),
    st.floats(0.1, 5.0),
)
def test_backing_off_is_its_formula(observed, key, age, prior_samples):
    params = ExactMatchPredictor.Params(prior_samples=prior_samples)
    predictor = ExactMatchPredictor(params)
    for own, length in observed:
        predictor.observe(PendingRequest(1, prompt_hash=own), length)
    parent = Reference([length for _, length in observed], params)
    slot = predictor._tables[0].find(key)
    own = predictor._tables[0].alive[slot]
    reached = (sum(length > age for length in parent.lengths) + 1) / (len(parent.lengths) + 1)
    for h in (0, 1, 5, 20):
        # Ages up to 64 are exact on the grid.
        expected = (own[age + h] + prior_samples * reached * parent.runs_on(age, h)) / (
            own[age] + prior_samples * reached
        )
        assert still_running(predictor, PendingRequest(1, prompt_hash=key), age, h) == pytest.approx(
            expected, rel=1e-5
        )


def test_parameters_of_another_predictor_are_refused():
    with pytest.raises(TypeError, match="takes SurvivalParams"):
        make_predictor("survival", PredictorParams())


@draws(60)
@given(rows_of_any_kind, st.lists(st.integers(1, 60), max_size=12), st.integers(1, 12))
def test_a_cut_projection_has_a_request_whole_until_it_is_expected_to_end(rows, lengths, horizon_steps):
    predictor = make_predictor("survival", SurvivalParams(projection="cut"))
    for length in lengths:
        predictor.observe(REQUEST, length)
    expected = np.zeros((WORKERS, horizon_steps + 1))
    for row in rows:
        one = active_of([row])
        runs_on = predictor.survival(one, horizon_steps)[0]
        left = max(1, row[3] - row[2])
        steps = sum(p for h, p in enumerate(runs_on[:-1].tolist()) if h < left)
        steps = left if row[4] else round(steps)
        for h in range(horizon_steps + 1):
            if h < max(1, steps) or (steps == horizon_steps and not row[4]):
                expected[row[0], h] += row[1] + h
    forecast = predictor.forecast(active_of(rows), WORKERS, horizon_steps)
    assert np.allclose(forecast, expected)
