"""The simulator beside a comparison: at any speed of the emulation the same deployment."""

import pytest

from loadgen.cluster_settings import ClusterSettings
from loadgen.commands.beside import simulated_result
from loadgen.commands.scenario import Arrivals, Scenario, WorkloadChoice

CLUSTER = ClusterSettings(3, 6, prefill_s_per_token=20e-6, prefill_tokens_max=1024)
SCENARIO = Scenario(WorkloadChoice("short", None, 120), Arrivals(rate=1.1), CLUSTER, seed=2)
FIGURES = (
    *("idle_fraction", "imbalance_kv_tokens", "prefill_balance", "throughput_of_perfect", "mean_kv_tokens"),
    *("output_tokens_per_s", "tpot_ms_p95", "ttft_ms_p50", "ttft_ms_p95", "wait_ms_p99", "makespan_s"),
)


@pytest.mark.parametrize("speed", [0.5, 4.0])
def test_a_policy_that_knows_no_costs_does_the_same_at_any_speed(speed):
    workload, capacity = SCENARIO.draw()
    plain, fast = (
        simulated_result("join-shortest-queue", workload, capacity, SCENARIO, at) for at in (1.0, speed)
    )
    for figure in FIGURES:
        assert getattr(fast, figure) == pytest.approx(getattr(plain, figure), rel=0.02), figure


def test_costs_are_learnt_in_real_time():
    # Prefill is dear, and at that speed all is over before a proxy could have learnt it: nobody is held back.
    cluster = ClusterSettings(4, 16, prefill_s_per_token=100e-6, prefill_tokens_max=2048)
    scenario = Scenario(WorkloadChoice("short", None, 400), Arrivals(rate=1.1), cluster, seed=2)
    workload, capacity = scenario.draw()
    slow, fast = (simulated_result("br-0", workload, capacity, scenario, at) for at in (1.0, 200.0))
    assert slow.prefill_balance > 1.5 * fast.prefill_balance
    assert slow.throughput_of_perfect > 1.2 * fast.throughput_of_perfect
