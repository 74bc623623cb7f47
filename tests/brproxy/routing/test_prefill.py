"""Whether it pays to wait and prefill in step, and how long."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.routing.policies.br_h import HORIZON_STEPS_MAX
from brproxy.routing.policy import POLICIES, make_policy
from brproxy.routing.prefill import PrefillTerms, slots_to_wait_for
from brproxy.routing.view import NOT_ADMITTED
from brproxy.step_costs import StepCosts
from tests.brproxy.routing.brute_force import make_view
from tests.brproxy.routing.test_policies import views
from tests.draws import draws

OURS = ["br-0", "br-h"]
COSTS = StepCosts(0.03, 100e-9, 20e-6)


def prices(view):
    """Return θ by a search, and the price of a KV token and of a slot, from what the module's text says."""
    costs, running = view.costs, view.requests.mean()
    prompt, turnover = view.prompt_tokens.mean(), view.turnover_steps
    theta = np.arange(0.01, 20, 0.001)
    held = theta**2 * costs.base_s * turnover / (2 * running)
    empty = theta * costs.s_per_prefill_token * prompt / np.expm1(theta)
    best = float(theta[np.argmin((held + empty) / theta)])
    by_others = costs.s_per_prefill_token / costs.s_per_kv_token
    lasts = 0.5 / (1 / by_others + 1 / (turnover * running))
    slot_s = costs.base_s / (view.workers * running) * best * turnover
    return best, costs.s_per_kv_token * lasts / costs.s_per_prefill_token, slot_s / costs.s_per_prefill_token


@st.composite
def scarce(draw):
    """A view in which fewer slots are free than requests wait, on workers that run some already."""
    workers = draw(st.integers(2, 5))
    column = lambda low, high, n=workers: draw(  # noqa: E731
        st.lists(st.integers(low, high), min_size=n, max_size=n)
    )
    slots_free = column(0, 4)
    waiting = sum(slots_free) + draw(st.integers(1, 6))
    kv_tokens = column(0, 10_000)
    view = make_view(
        kv_tokens,
        column(0, 5_000, waiting),
        slots_free,
        kv_free=column(0, 20_000),
        passed_over=column(0, 300, waiting),
        forecast=np.array(kv_tokens)[:, None] + 8.0 * np.arange(HORIZON_STEPS_MAX + 1),
    )
    costs = StepCosts(0.03, 100e-9, draw(st.floats(0.5, 200)) * 1e-6, draw(st.sampled_from([None, 2048])))
    requests, turnover_steps = np.array(column(8, 64)), draw(st.floats(1, 200))
    held_s = draw(st.floats(0, 20))
    return replace(view, costs=costs, held_s=held_s, turnover_steps=turnover_steps, requests=requests)


@draws(50)
@given(view=scarce())
def test_terms_are_the_least_of_what_holding_and_empty_margins_cost(view):
    theta, kv_token, slot = prices(view)
    terms = PrefillTerms.of(view)
    if terms is None:
        assert theta < 1.51
        return
    assert terms.slots_per_worker >= 1.5
    if terms.slots_per_worker < view.requests.mean():
        assert terms.slots_per_worker == pytest.approx(theta, abs=0.01)
        assert terms.slot == pytest.approx(slot, rel=0.02)
    assert terms.kv_token == pytest.approx(kv_token)


def test_where_holding_costs_nothing_one_waits_for_all_slots():
    assert slots_to_wait_for(COSTS._replace(base_s=0.0), 3000.0, 10.0, 64.0) == 64.0
    assert slots_to_wait_for(COSTS, 3000.0, 1e-30, 64.0) == 64.0


@pytest.mark.parametrize("costs", [None, COSTS._replace(s_per_prefill_token=0.0)])
@given(view=scarce())
def test_without_a_price_of_prefill_there_are_no_terms(costs, view):
    assert PrefillTerms.of(replace(view, costs=costs)) is None


@pytest.mark.parametrize("name", OURS)
@draws(100)
@given(view=views(), held_s=st.floats(0, 20), seed=st.integers(0, 3))
def test_nothing_changes_where_prefill_costs_nothing_or_slots_suffice(name, view, held_s, seed):
    dear = replace(view, costs=COSTS, held_s=held_s)
    others = [replace(dear, costs=COSTS._replace(s_per_prefill_token=0.0))]
    if view.slots_free.sum() >= view.waiting or view.workers == 1:
        others.append(dear)
    never = make_policy(name, POLICIES.get(name).Params(prefill_wait_s_max=0.0))
    plain = make_policy(name).route(view, np.random.default_rng(seed)).tolist()
    assert never.route(dear, np.random.default_rng(seed)).tolist() == plain
    for other in others:
        assert make_policy(name).route(other, np.random.default_rng(seed)).tolist() == plain


@pytest.mark.parametrize("name", OURS)
@draws(100)
@given(view=scarce(), seed=st.integers(0, 3))
def test_an_envelope_is_opened_with_enough_slots_or_after_a_while_and_at_no_other_time(name, view, seed):
    terms = PrefillTerms.of(view)
    decision = make_policy(name).route(view, np.random.default_rng(seed))
    if terms is None:
        return
    usable = np.minimum(view.slots_free, view.kv_free / max(view.prompt_tokens.mean(), 1)).sum()
    opens = view.held_s >= 10.0 or usable >= terms.slots_per_worker * view.workers
    if not opens:
        assert (decision == NOT_ADMITTED).all()
        return
    roomy = view.slots_free > 0
    fits = roomy.any() and view.prompt_tokens.min() <= view.kv_free[roomy].max()
    # Room is made for who lacked it for long: that one worker may be all that there is.
    late = view.prompt_tokens[view.passed_over * 2 >= 192 * view.workers]
    if fits and not (len(late) and late.max() > view.kv_free[roomy].max()):
        assert (decision != NOT_ADMITTED).any()


@pytest.mark.parametrize(("wait_s_max", "admitted"), [(3.0, 1), (3.1, 0)])
def test_how_long_slots_are_held_is_configured(wait_s_max, admitted):
    # One slot of four workers is free, and six requests wait.
    free = np.array([0, 1, 0, 0])
    view = make_view([200_000, 180_000, 210_000, 190_000], [3000] * 6, free)
    view = replace(view, requests=64 - free, turnover_steps=18.0, costs=COSTS, held_s=3.0)
    policy = make_policy("br-0", POLICIES.get("br-0").Params(prefill_wait_s_max=wait_s_max))
    assert (policy.route(view, np.random.default_rng(0)) != NOT_ADMITTED).sum() == admitted


def test_lookahead_is_wider_where_prefill_costs_something():
    policy = make_policy("br-0", POLICIES.get("br-0").Params(window=7, prefill_window=70))
    free = COSTS._replace(s_per_prefill_token=0.0)
    assert [policy.lookahead_requests(100, costs) for costs in (None, free, COSTS)] == [7, 7, 70]
    never = make_policy("br-0", POLICIES.get("br-0").Params(window=7, prefill_wait_s_max=0.0))
    assert never.lookahead_requests(100, COSTS) == 7


@draws(50)
@given(view=scarce(), tokens=st.sampled_from([1.0, 1.5, 2.0, 3.0]))
def test_it_is_the_same_in_steps_of_an_engine_as_in_tokens(view, tokens):
    """Of an engine whose steps yield several tokens each, slots turn over in so many fewer steps."""
    in_tokens = PrefillTerms.of(replace(view, costs=view.costs.of_a_token(tokens)))
    in_steps = PrefillTerms.of(replace(view, turnover_steps=view.turnover_steps / tokens))
    assert (in_tokens is None) == (in_steps is None)
    if in_tokens is not None:
        assert in_tokens == pytest.approx(in_steps)
    if tokens == 1.0:
        assert view.costs.of_a_token(tokens) == view.costs
