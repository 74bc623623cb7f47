"""Prompts that go in step, in the simulator: faster than one by one, and nobody waits where slots suffice."""

import numpy as np
import pytest

from brproxy.routing.policy import POLICIES
from loadgen.arrivals import with_gamma_arrivals
from loadgen.capacity import perfect_capacity
from loadgen.cluster_settings import ClusterSettings
from loadgen.simulator import SimulatedPolicy, simulate
from loadgen.traces.synthetic import synthetic_workload


def simulated(rate, chunk, policy="br-0", **params):
    rng = np.random.default_rng(3)
    settings = ClusterSettings(4, 16, prefill_s_per_token=100e-6, prefill_tokens_max=chunk)
    workload = synthetic_workload("short", 800, rng)
    capacity = perfect_capacity(workload, settings)
    workload = with_gamma_arrivals(workload, rate * capacity.requests_per_s, 1.0, rng)
    choice = SimulatedPolicy(policy, policy_params=POLICIES.get(policy).Params(**params))
    simulation = simulate(workload, settings, choice, 0, drain=False)
    barrier = simulation.barrier
    return simulation, barrier.output_tokens / barrier.busy_s / capacity.output_tokens_per_s


@pytest.mark.parametrize("chunk", [None, 2048])
def test_prompts_that_go_in_step_are_served_faster(chunk):
    in_step, share = simulated(1.1, chunk)
    one_by_one, share_before = simulated(1.1, chunk, prefill_wait_s_max=0.0)
    assert share > 1.2 * share_before
    assert np.nanpercentile(in_step.ttft_s, 95) < 0.8 * np.nanpercentile(one_by_one.ttft_s, 95)


def test_nobody_is_held_where_slots_suffice():
    in_step, _ = simulated(0.15, 2048)
    one_by_one, _ = simulated(0.15, 2048, prefill_wait_s_max=0.0)
    assert np.array_equal(in_step.ttft_s, one_by_one.ttft_s, equal_nan=True)
