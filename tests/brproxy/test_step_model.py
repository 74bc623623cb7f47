"""What is learnt of a deployment's steps, against deployments whose costs are known."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from brproxy.roster import WorkerLimits
from brproxy.step_costs import StepCosts
from brproxy.step_model import LOOK_S, WINDOWS_A_FIT, WINDOWS_MAX, GivenCosts
from tests.brproxy.stepping import Stepping, Traffic, Truth
from tests.draws import draws

pytestmark = pytest.mark.long_simulation

# Each example is a deployment that runs for seconds: to shrink one would take many more.
DEPLOYMENTS = draws(4, phases=[Phase.explicit, Phase.generate])
FEW = settings(DEPLOYMENTS, max_examples=2)


def traffic_of(truth, **more):
    """Return traffic with which KV makes out about a third of a step."""
    held = 0.7 * 16 * max(truth.slowness)
    return Traffic(prompt_tokens=0.5 * truth.base_s / truth.s_per_kv_token / held, **more)


def assert_near(found, truth, within=0.1):
    assert found.base_s == pytest.approx(truth.base_s, rel=within)
    assert found.s_per_kv_token == pytest.approx(truth.s_per_kv_token, rel=within)
    assert found.s_per_prefill_token == pytest.approx(truth.s_per_prefill_token, rel=within, abs=0.5e-6)


@DEPLOYMENTS
@given(
    st.floats(0.01, 0.06),
    st.sampled_from([50e-9, 300e-9]),
    st.sampled_from([0.0, 10e-6, 50e-6]),
    st.integers(2, 6),
    st.sampled_from([1.0, 2.2]),
    st.integers(0, 1000),
)
def test_costs_are_learnt_within_a_tenth(base_s, per_kv, per_prefill, workers, tokens_per_event, seed):
    truth = Truth(base_s, per_kv, per_prefill, (1.0,) * workers)
    traffic = traffic_of(truth, tokens_per_event=tokens_per_event)
    model = Stepping(truth, traffic, seed).run(3000)
    # Where events carry tokens at random steps are counted the worse, the more so with few workers.
    assert_near(model.costs(), truth, within=0.1 if tokens_per_event == 1 else 0.2)
    assert model.costs().slowness is None


@FEW
@given(st.sampled_from([1024, 2048]), st.sampled_from([10e-6, 30e-6]), st.integers(0, 1000))
def test_prefill_in_chunks(chunk, per_prefill, seed):
    truth = Truth(s_per_prefill_token=per_prefill, chunk=chunk)
    model = Stepping(truth, Traffic(prompt_tokens=3000), seed).run(3000)
    found = model.costs()
    assert found.prefill_tokens_max == chunk
    assert found.s_per_prefill_token == pytest.approx(per_prefill, rel=0.2)
    assert found.base_s == pytest.approx(truth.base_s, rel=0.1)


def test_the_first_windows_say_what_prefill_costs_although_nothing_was_known_in_them():
    off = []
    for chunk, seed in product([1024, 2048], range(5)):
        truth = Truth(s_per_prefill_token=30e-6, chunk=chunk)
        stepping = Stepping(truth, Traffic(prompt_tokens=3000), seed)
        while stepping.model.count < 2 * WINDOWS_A_FIT:
            stepping.run(5)
        assert stepping.now_s < 15.0
        off.append(abs(stepping.model.costs().s_per_prefill_token / 30e-6 - 1))
    # Summed up only once, by what was guessed then, it was off by a quarter on average.
    assert np.mean(off) < 0.15
    assert max(off) < 0.35


@FEW
@given(st.sampled_from(["least-kv", "br-0", "join-shortest-queue"]), st.integers(0, 1000))
def test_the_two_slow_workers_of_eight_are_found(policy, seed):
    truth = Truth(slowness=(1, 1, 1.25, 1, 1, 1, 1.25, 1))
    model = Stepping(truth, traffic_of(truth, policy=policy), seed).run(4500)
    found = model.costs().slowness
    assert sum(found) / 8 == pytest.approx(1.0)
    # The mean of all eight is 1.0625.
    assert (found[2], found[6]) == pytest.approx((1.25 / 1.0625,) * 2, rel=0.05)
    assert max(factor for g, factor in enumerate(found) if g not in {2, 6}) < 1.03
    assert_near(model.costs(), replace(truth, s_per_kv_token=1.0625 * truth.s_per_kv_token))


def test_before_load_has_varied_the_errors_say_what_is_not_known():
    truth = Truth()
    # Everybody comes at once, nobody leaves, and load grows by a token a request and step.
    traffic = Traffic(prompt_tokens=3000, output_tokens=20_000, share=0.9)
    stepping = Stepping(truth, traffic)
    stepping.rate = 1e6
    stepping.next_s = -50e-6
    stepping.arrive()
    stepping.rate = 1e-9
    stepping.next_s = 1e9
    while stepping.model.learnt() is None:
        stepping.run(14)
        stepping.ended = True
    costs, errors = stepping.model.learnt()
    load = max(stepping.ledger.kv_tokens)
    step_s = truth.base_s + truth.s_per_kv_token * load
    assert costs.base_s + costs.s_per_kv_token * load == pytest.approx(step_s, rel=0.02)
    assert abs(costs.s_per_kv_token - truth.s_per_kv_token) < 3 * errors.s_per_kv_token
    assert errors.s_per_kv_token > 0.05 * truth.s_per_kv_token


def test_a_member_that_comes_ends_what_was_known_of_the_others_speed():
    truth = Truth(slowness=(1, 1.4, 1, 1))
    stepping = Stepping(truth, traffic_of(truth, policy="join-shortest-queue"))
    model = stepping.run(3000)
    before = model.costs()
    assert before.slowness is not None
    stepping.ledger.roster.add("new", WorkerLimits(0))
    after = model.costs()
    assert after == before._replace(slowness=None)
    assert len(model.members) == 5
    assert model.count == 0
    # What is learnt from the next windows begins with what was known.
    stepping.truth = replace(truth, slowness=(1, 1.4, 1, 1, 1))
    stepping.workers.append(type(stepping.workers[0])())
    stepping.run(600)
    assert model.costs() != after
    assert model.costs().base_s == pytest.approx(truth.base_s, rel=0.2)


def test_what_is_given_stays_and_the_rest_is_learnt_with_it():
    truth = Truth(s_per_prefill_token=20e-6)
    given_costs = GivenCosts(base_s=0.03, prefill_tokens_max=3000)
    model = Stepping(truth, Traffic(), given=given_costs).run(1500)
    found = model.costs()
    assert (found.base_s, found.prefill_tokens_max) == (0.03, 3000)
    assert model.learnt().errors.base_s == 0.0
    assert found.s_per_kv_token == pytest.approx(100e-9, rel=0.1)


def test_all_given_is_known_at_once():
    stepping = Stepping(Truth(), given=GivenCosts(0.03, 1e-7, 0.0))
    assert stepping.model.costs() == StepCosts(0.03, 1e-7, 0.0)
    assert stepping.model.learnt().costs == (0.03, 1e-7, 0.0)
    stepping.run(300)
    assert stepping.model.costs() == StepCosts(0.03, 1e-7, 0.0)


def test_nothing_is_told_before_there_are_enough_windows():
    stepping = Stepping(Truth())
    while stepping.model.count < WINDOWS_A_FIT:
        assert stepping.model.costs() is None
        stepping.run(1)
    assert stepping.model.costs() is not None


def test_windows_are_bounded_and_looks_are_rarer_then():
    stepping = Stepping(Truth(base_s=0.5, s_per_kv_token=0.0), Traffic(output_tokens=3))
    model = stepping.run(2 * WINDOWS_MAX + 100)
    assert model.count == WINDOWS_MAX
    looked_s = stepping.now_s
    model.look(looked_s, looked_s)
    (_, soon_s), *_, (_, later_s) = LOOK_S
    assert not model.is_due(looked_s + later_s - 0.01)
    assert model.is_due(looked_s + later_s)
    new = Stepping(Truth()).model
    new.look(0.0, 0.0)
    assert (new.is_due(soon_s - 0.01), new.is_due(soon_s)) == (False, True)
    assert later_s > soon_s


def test_a_pause_of_the_whole_group_moves_nothing():
    truth = Truth(s_per_prefill_token=20e-6)
    stepping = Stepping(truth)
    for _ in range(6):
        stepping.run(400)
        # As an engine that compiles, or loads other weights.
        stepping.now_s += 30.0
    assert_near(stepping.model.costs(), truth)
