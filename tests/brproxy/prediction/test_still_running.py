"""What still runs counts as cut where what has ended is short for want of time, and not where it is not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.prediction.predictor import LENGTH_UNLIMITED, ActiveRequests, make_predictor
from brproxy.prediction.predictors.survival import SurvivalParams
from brproxy.types import PendingRequest
from tests.draws import draws

REQUEST = PendingRequest(1)


def of_ages(ages):
    zeros = np.zeros(len(ages), dtype=np.int64)
    limits = np.full(len(ages), LENGTH_UNLIMITED)
    return ActiveRequests(zeros, zeros, np.array(ages), zeros, limits, zeros.astype(bool))


@given(seed=st.integers(0, 99), ended=st.integers(30, 400), window=st.sampled_from([200, 2000]))
@draws(20)
def test_at_the_start_of_traffic_curves_are_not_short(seed, ended, window):
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(1 / 100, 600), 3000)
    # All begin at once, and the first have ended: the shortest.
    order = np.sort(lengths)
    now = int(order[ended])
    predictor = make_predictor("survival", SurvivalParams(window=window))
    running = of_ages([now] * (len(lengths) - ended))
    predictor.watch(lambda: running)
    for length in order[:ended].tolist():
        predictor.observe(REQUEST, length)
    predictor._refresh()
    one = of_ages([0])
    for age in (now // 4, now // 2, max(0, now - 1)):
        estimate = predictor.survival_at(one, np.array([age]))[0, 0]
        assert estimate >= (lengths > age).mean() - 0.1
        if ended <= window:
            assert estimate == pytest.approx((lengths > age).mean(), abs=0.05)


@given(seed=st.integers(0, 99), law=st.sampled_from(["alike", "geometric"]), workers=st.sampled_from([1, 20]))
@draws(20)
def test_soon_after_the_first_have_ended_the_mean_is_about_right(seed, law, workers):
    rng, count = np.random.default_rng(seed), 100 * workers
    # Full slots that have filled evenly in the time that the first ran.
    lengths = 1000 + rng.geometric(1 / 50, count) if law == "alike" else rng.geometric(1 / 1000, count)
    begun = np.linspace(0, 1000, count)
    ends = begun + lengths
    now = np.sort(ends)[count // 10]
    predictor = make_predictor("survival", SurvivalParams())
    ages = np.maximum(now - begun[ends > now], 0).astype(np.int64)
    predictor.watch(lambda: of_ages(ages))
    for length in lengths[ends <= now].tolist():
        predictor.observe(REQUEST, length)
    assert predictor.mean_output_tokens == pytest.approx(lengths.mean(), rel=0.9 if workers == 1 else 0.35)


def test_what_runs_counts_less_and_less_once_the_first_are_forgotten():
    predictor = make_predictor("survival", SurvivalParams(window=64))
    running = of_ages([150] * 64)
    predictor.watch(lambda: running)
    means = []
    for _ in range(40):
        for _ in range(64):
            predictor.observe(REQUEST, 100)
        means.append(predictor.mean_output_tokens)
    assert means == sorted(means, reverse=True)
    # Half of what was seen ended at 100, the others ran on to 150, and 16,000 tokens by 64 from there.
    assert means[0] == pytest.approx(100 + 50 / 2 + 250 / 2, rel=0.02)
    assert means[-1] == 100


@given(seed=st.integers(0, 99), slots=st.sampled_from([800, 1600]))
@draws(8)
def test_in_steady_traffic_outputs_look_no_longer_than_they_are(seed, slots):
    rng, mean = np.random.default_rng(seed), 50
    predictor = make_predictor("survival", SurvivalParams(window=2 * slots))
    ages, lengths = np.zeros(slots, dtype=np.int64), rng.geometric(1 / mean, slots)
    predictor.watch(lambda: of_ages(ages))
    told = []
    for step in range(10 * mean):
        ages += 1
        for slot in np.flatnonzero(ages == lengths).tolist():
            predictor.observe(REQUEST, int(lengths[slot]))
            ages[slot], lengths[slot] = 0, rng.geometric(1 / mean)
        if step > 8 * mean:
            told.append(predictor.mean_output_tokens)
    assert np.mean(told) == pytest.approx(mean, rel=0.07)


@given(
    seed=st.integers(0, 99),
    limit=st.sampled_from([1, 16, 60]),
    running=st.sampled_from([0, 40, 400]),
    name=st.sampled_from(["survival", "hierarchical"]),
)
@draws(25)
def test_the_mean_is_of_how_long_requests_stay_also_where_limits_cut_them(seed, limit, running, name):
    rng = np.random.default_rng(seed)
    stays = np.minimum(rng.geometric(1 / 100, 3000), limit)
    predictor = make_predictor(name)
    # Steady traffic: of each that runs some part is over.
    ages = (np.minimum(rng.geometric(1 / 100, running), limit) * rng.random(running)).astype(np.int64)
    predictor.watch(lambda: of_ages(ages))
    for stay in stays.tolist():
        predictor.observe(PendingRequest(1, output_tokens_max=limit), stay, ended=stay < limit)
    # Who takes those that were cut for what they would have become is off by up to a hundredfold.
    assert predictor.mean_output_tokens == pytest.approx(stays.mean(), rel=0.3)
    # The curve is of what outputs would be: who comes as far as the limit has not been seen to end.
    expected = (1 - 1 / 100) ** (limit - 1)
    assert predictor.survival_at(of_ages([0]), np.array([limit - 1]))[0, 0] == pytest.approx(
        expected, abs=0.1
    )
