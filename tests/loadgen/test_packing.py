"""The packed batch, against a plain loop over steps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.cluster_settings import ClusterSettings
from loadgen.packing import packed_makespan_s
from loadgen.simulator import SimulatedPolicy, simulate
from loadgen.traces.synthetic import synthetic_workload
from loadgen.workload import TraceRequest, Workload
from tests.draws import draws


def plainly(sizes, cluster):
    """Run the longest first, all slots in one pool, and add up what perfectly spread steps take."""
    waiting = sorted(sizes, key=lambda size: -size[1])
    running, time_s = [], 0.0
    slots, share = (
        sum(cluster.worker_slots),
        1 / sum(1 / s for s in cluster.slowness or (1.0,) * cluster.workers),
    )
    while waiting or running:
        prefill = 0
        while waiting and len(running) < slots:
            prompt, output = waiting.pop(0)
            running.append([prompt, output])
            prefill += prompt
        time_s += cluster.step_base_s + share * (
            cluster.step_s_per_kv_token * sum(kv for kv, _ in running) + cluster.prefill_s_per_token * prefill
        )
        time_s += cluster.step_s_per_request * cluster.bucket(-(-len(running) // cluster.workers))
        running = [[kv + 1, left - 1] for kv, left in running if left > 1]
    return time_s


@draws(60)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 30)), min_size=1, max_size=30),
    st.integers(1, 3),
    st.sampled_from([(), (1.0, 2.0)]),
)
def test_it_is_the_plain_loop(sizes, slots, slowness):
    cluster = ClusterSettings(
        *(2, slots, None, 0.03, 1e-4, 1e-3),
        step_s_per_request=1e-3,
        batch_buckets=(1, 2, 4),
        slowness=slowness,
    )
    workload = Workload("w", tuple(TraceRequest(0.0, *size) for size in sizes))
    assert packed_makespan_s(workload, cluster) == pytest.approx(plainly(sizes, cluster))


def test_nothing_that_is_simulated_is_much_faster():
    cluster = ClusterSettings(4, 16, dispatch_steps=0)
    workload = synthetic_workload("rollouts", 256, np.random.default_rng(3))
    run = simulate(workload, cluster, SimulatedPolicy("br-0"), 0)
    assert run.makespan_s == pytest.approx(
        np.nanmax(run.ttft_s + run.tpot_s * [r.output_tokens - 1 for r in workload.requests])
    )
    assert run.makespan_s > 0.98 * packed_makespan_s(workload, cluster)
    assert run.steady_s == (0.0, run.makespan_s)
    assert run.barrier.output_tokens == sum(r.output_tokens for r in workload.requests)
