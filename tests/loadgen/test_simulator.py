"""The simulator against the emulated deployment's own rules, and what it must show."""

import numpy as np
import pytest

from brproxy.ledger import Ledger
from brproxy.prediction.predictor import PREDICTORS
from brproxy.routing.policies.br_h import Lookahead, lookahead_for
from brproxy.routing.policies.least_kv import LeastKvPolicy
from brproxy.routing.policy import POLICIES, make_policy
from brproxy.routing.view import NOT_ADMITTED
from brproxy.step_costs import StepCosts
from brproxy.types import InvalidInputError
from loadgen.arrivals import with_aborts, with_gamma_arrivals
from loadgen.capacity import perfect_capacity
from loadgen.cluster_settings import ClusterSettings
from loadgen.commands.bench import CASES, GROUPS, BenchCase, BenchResult, bench, bench_table
from loadgen.simulator import SimulatedPolicy, simulate
from loadgen.traces.synthetic import RepeatedPrompts, synthetic_workload
from loadgen.workload import TraceRequest, Workload

SMALL = ClusterSettings(workers=4, slots=8, step_s_per_kv_token=1e-6)


def overload(name="short", requests=400, seed=1, settings=SMALL, rate=1.1):
    rng = np.random.default_rng(seed)
    workload = synthetic_workload(name, requests, rng)
    capacity = perfect_capacity(workload, settings)
    return with_gamma_arrivals(workload, rate * capacity.requests_per_s, 1.0, rng)


@pytest.mark.long_simulation
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"prefill_s_per_token": 20e-6, "dispatch_steps": 0},
        {"prefill_s_per_token": 20e-6, "prefill_tokens_max": 2048},
        {"tokens_per_step": 1.6},
    ],
)
def test_costs_may_be_learnt(more):
    settings = ClusterSettings(workers=4, slots=16, step_s_per_kv_token=1e-6, **more)
    # Tokens at random count steps worse, so that it takes more of them.
    workload = overload(requests=1500 if settings.tokens_per_step > 1 else 500, settings=settings)
    run = simulate(workload, settings, SimulatedPolicy("br-0", learns_costs=True), seed=0)
    costs, true = run.steps.costs(), settings.costs
    # What a step of several tokens takes is shared out among them, whoever knows it.
    assert true.base_s == pytest.approx(settings.step_base_s / settings.tokens_per_step)
    assert costs.base_s == pytest.approx(true.base_s, rel=0.1)
    assert costs.s_per_kv_token == pytest.approx(true.s_per_kv_token, rel=0.1)
    assert costs.s_per_prefill_token == pytest.approx(true.s_per_prefill_token, rel=0.15, abs=0.5e-6)
    assert costs.slowness is None


@pytest.mark.parametrize("policy", POLICIES.names())
@pytest.mark.parametrize("predictor", ["survival", "oracle"])
def test_every_policy_finishes_everything(policy, predictor):
    workload = overload(requests=150)
    run = simulate(workload, SMALL, SimulatedPolicy(policy, predictor), seed=0)
    assert run.finished.all()
    assert (run.wait_s >= 0).all()
    assert (run.ttft_s > run.wait_s).all()
    tokens = sum(request.output_tokens for request in workload.requests)
    assert run.record.stats(0.0, np.inf).output_tokens == tokens


def test_costs_that_are_known_are_not_learnt():
    assert simulate(overload(requests=20), SMALL, SimulatedPolicy("br-0"), seed=0).steps is None


def test_the_same_seed_gives_the_same_run():
    first, second = (simulate(overload(), SMALL, SimulatedPolicy("br-h"), seed=3) for _ in range(2))
    assert first.barrier == second.barrier
    assert (first.wait_s == second.wait_s).all()


def test_a_single_request_by_hand():
    settings = ClusterSettings(2, 4, None, 0.030, 1e-5)
    workload = Workload("one", (TraceRequest(0.0, 1000, 3),))
    run = simulate(workload, settings, SimulatedPolicy("br-0"), seed=0)
    steps_s = [0.030 + 1e-5 * (1000 + i) for i in range(3)]
    assert run.ttft_s[0] == pytest.approx(steps_s[0])
    assert run.tpot_s[0] == pytest.approx((steps_s[1] + steps_s[2]) / 2)
    assert run.wait_s[0] == 0


@pytest.mark.parametrize(
    ("policy", "dispatch_steps", "tokens_each_step"),
    [
        # One slot, answers of two tokens: begun in step 0, 2, …; with the bubble a step stays empty.
        ("br-0", 0, [1, 1, 1, 1, 1, 1]),
        ("br-0", 1, [1, 1, 1, 0, 1, 1, 0, 1]),
        ("br-0", 2, [1, 1, 1, 0, 0, 1, 1, 0]),
        # What was bound on arrival waits in the worker's queue and starts at once.
        ("least-kv", 1, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_a_freed_slot_and_the_next_request_do_not_meet_at_once(policy, dispatch_steps, tokens_each_step):
    # The other worker is there only to keep the steps coming, with one long answer.
    settings = ClusterSettings(2, 1, step_s_per_kv_token=0.0, dispatch_steps=dispatch_steps)
    requests = [TraceRequest(0.0, 1000, 100), TraceRequest(0.0, 10, 3)]
    workload = Workload("w", (*requests, *(TraceRequest(0.01, 10, 2) for _ in range(3))))
    run = simulate(workload, settings, SimulatedPolicy(policy), seed=0, keep_loads=True)
    busy = (run.loads[1] > 0).sum(axis=1) - 1
    assert busy[: len(tokens_each_step)].tolist() == tokens_each_step


def test_who_arrives_during_a_step_and_finds_a_slot_starts_with_the_next():
    settings = ClusterSettings(2, 2, step_s_per_kv_token=0.0, dispatch_steps=1)
    workload = Workload("w", (TraceRequest(0.0, 10, 9), TraceRequest(0.040, 10, 2)))
    run = simulate(workload, settings, SimulatedPolicy("br-0"), seed=0)
    assert run.wait_s.tolist() == pytest.approx([0.0, 0.060 - 0.040])


def test_a_wait_ends_with_the_slot_and_the_first_token_with_the_last_chunk():
    settings = ClusterSettings(1, 2, None, 0.030, 0.0, 1e-5, prefill_tokens_max=100)
    workload = Workload("one", (TraceRequest(0.0, 250, 2),))
    run = simulate(workload, settings, SimulatedPolicy("br-0"), seed=0)
    assert run.wait_s[0] == 0
    assert run.ttft_s[0] == pytest.approx(3 * 0.030 + 250e-5)
    assert run.tpot_s[0] == pytest.approx(0.030)


def test_the_dispatcher_is_told_what_a_step_costs(monkeypatch):
    costs = []
    monkeypatch.setattr(LeastKvPolicy, "route", lambda self, view, rng: costs.append(view.costs))
    settings = ClusterSettings(1, 2, None, 0.030, 1e-7, 1e-5, prefill_tokens_max=100)
    workload = Workload("w", tuple(TraceRequest(0.0, 250, 2) for _ in range(2)))
    simulate(workload, settings, SimulatedPolicy("least-kv"), seed=0)
    assert costs[0] == StepCosts(0.030, 1e-7, 1e-5, 100)


def test_the_books_hold_every_token_of_several_in_a_step(monkeypatch):
    checked = []

    class Watched(Ledger):
        def grow_rows(self, rows):
            super().grow_rows(rows)
            checked.append(sum(self.kv_tokens))

    monkeypatch.setattr("loadgen.simulator.Ledger", Watched)
    settings = ClusterSettings(2, 4, tokens_per_step=2.0)
    workload = Workload("w", tuple(TraceRequest(0.0, 10, 40) for _ in range(8)))
    run = simulate(workload, settings, SimulatedPolicy("br-0"), seed=0, keep_loads=True)
    assert run.finished.all()
    assert run.record.stats(0.0, np.inf).output_tokens == 8 * 40
    # Three levels in each step, the last of them is what the next step begins with.
    booked, loads = checked[2::3], run.loads[1].sum(axis=1)
    full = [i for i in range(1, len(loads)) if loads[i] == booked[i - 1]]
    assert len(full) > 10
    # A token takes half as long, as the steps do not.
    assert run.tpot_s.mean() == pytest.approx(0.030 / 2, rel=0.1)


def test_clients_that_leave_are_neither_served_nor_lost_and_teach_nothing():
    workload = overload(requests=300)
    leaving = with_aborts(workload, 0.3, np.random.default_rng(1))
    run = simulate(leaving, SMALL, SimulatedPolicy("br-h", "survival"), seed=0)
    gone = np.array([r.aborted_after_tokens is not None for r in leaving.requests])
    assert 60 < gone.sum() < 120
    assert (run.aborted == gone).all()
    assert (run.finished == ~gone).all()
    assert run.record.stats(0.0, np.inf).output_tokens == sum(r.decoded_tokens for r in leaving.requests)
    assert np.isnan(run.tpot_s[gone]).all()


def test_the_dispatcher_knows_unequal_slots():
    settings = ClusterSettings(2, 4, slots_each=(1, 3))
    workload = Workload("w", tuple(TraceRequest(0.0, 10, 4) for _ in range(8)))
    run = simulate(workload, settings, SimulatedPolicy("br-0"), seed=0, keep_loads=True)
    assert sorted(run.loads[1][0].tolist()) == [10, 30]
    assert np.isnan(run.wait_s).sum() == 0


@pytest.mark.parametrize("dispatch_steps", [0, 1])
def test_a_policy_may_have_requests_wait_while_nothing_runs(dispatch_steps, monkeypatch):
    rounds, place = [0], LeastKvPolicy.place

    def patient(self, *arguments):
        rounds[0] += 1
        return NOT_ADMITTED if rounds[0] < 10 else place(self, *arguments)

    settings = ClusterSettings(2, 2, dispatch_steps=dispatch_steps)
    workload = Workload("w", tuple(TraceRequest(0.0, 10, 2) for _ in range(3)))
    monkeypatch.setattr(LeastKvPolicy, "place", patient)
    run = simulate(workload, settings, SimulatedPolicy("least-kv"), seed=0)
    assert run.finished.all()
    assert run.wait_s.min() > 0
    monkeypatch.setattr(LeastKvPolicy, "place", lambda *_: NOT_ADMITTED)
    assert not simulate(workload, settings, SimulatedPolicy("least-kv"), seed=0).finished.any()


@pytest.mark.long_simulation
@pytest.mark.parametrize("policy", ["br-0", "br-h"])
def test_balancing_balances(policy):
    settings = ClusterSettings(workers=8, slots=32, step_s_per_kv_token=5e-7)
    workload = overload(requests=3000, settings=settings)
    baseline = simulate(workload, settings, SimulatedPolicy("join-shortest-queue"), 0, drain=False)
    balanced = simulate(workload, settings, SimulatedPolicy(policy), 0, drain=False)
    assert balanced.barrier.imbalance_kv_tokens < 0.45 * baseline.barrier.imbalance_kv_tokens
    assert balanced.barrier.output_tokens > baseline.barrier.output_tokens


def test_kv_capacity_holds_and_everything_is_served():
    settings = ClusterSettings(workers=2, slots=16, kv_capacity_tokens=40_000)
    workload = overload(requests=200, settings=settings)
    for policy in ("join-shortest-queue", "br-0"):
        run = simulate(workload, settings, SimulatedPolicy(policy), seed=0, keep_loads=True)
        assert run.finished.all()
        assert run.loads[1].max() <= 40_000


def test_a_request_that_can_never_fit_is_an_error():
    settings = ClusterSettings(workers=1, slots=1, kv_capacity_tokens=100)
    workload = Workload("large", (TraceRequest(0.0, 101, 1),))
    with pytest.raises(InvalidInputError, match="more than the KV capacity of any worker"):
        simulate(workload, settings, SimulatedPolicy("br-0"), seed=0)


@pytest.mark.long_simulation
def test_exact_match_is_nearer_to_the_oracle_than_survival_where_prompts_repeat():
    settings = ClusterSettings(workers=4, slots=32)
    rng = np.random.default_rng(2)
    requests = RepeatedPrompts(templates=40, conversations=10).draw(2500, rng)
    workload = Workload("repeated", requests)
    capacity = perfect_capacity(workload, settings)
    timed = with_gamma_arrivals(workload, 1.1 * capacity.requests_per_s, 1.0, rng)
    survival, exact = (
        simulate(timed, settings, SimulatedPolicy("br-h", predictor), 0, drain=False).quality
        for predictor in ("survival", "exact-match")
    )
    assert exact.auc > survival.auc
    assert exact.mae_steps < survival.mae_steps


def test_every_predictor_can_be_simulated():
    for predictor in PREDICTORS.names():
        assert simulate(overload(requests=150), SMALL, SimulatedPolicy("br-h", predictor), 0).finished.all()


@pytest.mark.parametrize("turnover_steps", [0.1, 1.0, 2.0, 2.3])
def test_where_slots_turn_over_quickly_br_h_is_br_0(turnover_steps):
    assert lookahead_for(turnover_steps, 3.0) == Lookahead(0, 1.0)
    assert make_policy("br-h").discounts(turnover_steps, 3.0).tolist() == [1.0]


def test_the_lookahead_grows_with_the_turnover():
    decay = [lookahead_for(turnover, 3.0).horizon_steps for turnover in (3.0, 10.0, 20.0, 500.0)]
    assert decay == sorted(decay)
    assert decay[-1] == 512
    assert lookahead_for(18.5, 3.0) == Lookahead(149, pytest.approx(1 - 1 / 49.5))


@pytest.mark.parametrize("horizon_steps", [0, 20])
def test_the_bench_measures_rounds_that_admit(horizon_steps):
    result = bench(BenchCase(3, 4, 10, horizon_steps), rounds=20, seed=0)
    assert 0 < result.p50_s <= result.p99_s
    assert 0 < result.cpu_p50_s <= result.cpu_p99_s
    assert 1 <= result.admitted <= 12


def test_the_bench_of_a_request_alone_decides_on_one_each_round():
    assert bench(BenchCase(3, 4, 1, 20, slots_free=4), rounds=20, seed=0).admitted == 1


def test_the_bench_shows_every_dimension_at_three_sizes():
    assert all(len(cases) >= 3 for cases in GROUPS.values())
    table = bench_table(BenchResult(case, 1e-3, 2e-3, 5e-4, 6e-4, 1.0) for case in CASES)
    assert table.row_count == sum(len(cases) for cases in GROUPS.values())
    assert next(iter(table.columns[-1].cells)) == "600"
