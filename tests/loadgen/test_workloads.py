"""Synthetic laws, arrivals and capacity."""

import numpy as np
import pytest

from brproxy.registry import UnknownNameError
from brproxy.types import InvalidInputError
from loadgen.arrivals import faster, with_aborts, with_gamma_arrivals
from loadgen.capacity import perfect_capacity
from loadgen.cluster import Cluster
from loadgen.cluster_settings import ClusterSettings
from loadgen.prompts import PromptMaker
from loadgen.traces.synthetic import WORKLOADS, synthetic_workload
from loadgen.workload import TraceRequest, Workload


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("name", "prompt_mean", "output_mean"),
    [("proprietary", 3100, 1170), ("azure-2024", 4650, 1051), ("short", 1570, 120)],
)
def test_synthetic_statistics(name, prompt_mean, output_mean):
    requests = synthetic_workload(name, 40_000, rng()).requests
    assert np.mean([r.prompt_tokens for r in requests]) == pytest.approx(prompt_mean, rel=0.05)
    assert np.mean([r.output_tokens for r in requests]) == pytest.approx(output_mean, rel=0.05)


def test_the_tails_of_deepseek_r1():
    # As ServeGen has them.
    requests = synthetic_workload("deepseek-r1", 200_000, rng()).requests
    prompts = np.array([r.prompt_tokens for r in requests])
    outputs = np.array([r.output_tokens for r in requests])
    assert prompts.mean() == pytest.approx(1269, rel=0.1)
    assert np.percentile(prompts, [50, 95, 99]) == pytest.approx([208, 6700, 23450], rel=0.22)
    assert outputs.mean() == pytest.approx(1527, rel=0.05)
    assert np.percentile(outputs, [50, 95, 99]) == pytest.approx([792, 5700, 12640], rel=0.1)
    assert (prompts.max(), outputs.max()) == (57344, 32768)
    # Long answers go with short prompts.
    assert np.corrcoef(np.log(prompts), np.log(outputs))[0, 1] == pytest.approx(-0.30, abs=0.05)


def test_samples_of_a_prompt_are_alike():
    requests = synthetic_workload("rollouts", 8 * 1000, rng()).requests
    logs = np.log([r.output_tokens for r in requests]).reshape(1000, 8)
    assert logs.mean(axis=1).std() == pytest.approx(np.hypot(0.8, 0.5 / 8**0.5), rel=0.1)
    assert logs.std(axis=1, ddof=1).mean() == pytest.approx(0.5, rel=0.1)
    assert np.mean([r.output_tokens for r in requests]) == pytest.approx(2000, rel=0.1)
    assert len({(r.prompt_key, r.prompt_tokens) for r in requests}) == 1000


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_same_seed_draws_the_same_requests(name):
    assert synthetic_workload(name, 50, rng(3)) == synthetic_workload(name, 50, rng(3))
    assert synthetic_workload(name, 50, rng(3)) != synthetic_workload(name, 50, rng(4))


def test_unknown_workload():
    with pytest.raises(
        UnknownNameError,
        match="unknown workload 'x'; allowed: proprietary, azure-2024, short, deepseek-r1, repeated",
    ):
        synthetic_workload("x", 1, rng())


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_gaps_have_the_rate_and_the_burstiness(cv):
    workload = with_gamma_arrivals(synthetic_workload("short", 20_000, rng()), 50.0, cv, rng(1))
    times = np.array([r.arrival_s for r in workload.requests])
    gaps = np.diff(times)
    assert times[0] == 0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1, abs=1e-6)


def test_faster_divides_times():
    workload = Workload("w", (TraceRequest(0.0, 1, 1), TraceRequest(10.0, 1, 1)))
    assert [r.arrival_s for r in faster(workload, 4.0).requests] == [0.0, 2.5]


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_rates(rate):
    workload = synthetic_workload("short", 2, rng())
    with pytest.raises(InvalidInputError, match="must be a positive"):
        with_gamma_arrivals(workload, rate, 1.0, rng())
    with pytest.raises(InvalidInputError, match="must be a positive"):
        faster(workload, rate)


def test_impossible_burstiness():
    with pytest.raises(InvalidInputError, match="between 0 and 100"):
        with_gamma_arrivals(synthetic_workload("short", 2, rng()), 1.0, -1.0, rng())


@pytest.mark.parametrize("arguments", [(-1.0, 1, 1), (float("nan"), 1, 1), (0.0, 0, 1), (0.0, 1, 0)])
def test_impossible_requests(arguments):
    with pytest.raises(InvalidInputError, match="must be at least"):
        TraceRequest(*arguments)


def test_an_empty_workload():
    with pytest.raises(InvalidInputError, match="has no requests"):
        Workload("w", ())


def test_aborts_are_drawn_uniformly_over_the_output():
    workload = synthetic_workload("short", 20_000, rng())
    assert with_aborts(workload, 0.0, rng(1)) == workload
    requests = with_aborts(workload, 0.25, rng(1)).requests
    points = [r.aborted_after_tokens / r.output_tokens for r in requests if r.aborted_after_tokens]
    assert len(points) == pytest.approx(5000, rel=0.05)
    assert np.quantile(points, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.02)
    assert [r.decoded_tokens for r in requests] == [
        r.aborted_after_tokens or r.output_tokens for r in requests
    ]
    with pytest.raises(InvalidInputError, match=r"aborted must be between 0 and 1, got 1\.5"):
        with_aborts(workload, 1.5, rng())
    with pytest.raises(InvalidInputError, match="aborted_after_tokens must be 1 to 5, the output, got 6"):
        TraceRequest(0.0, 1, 5, aborted_after_tokens=6)


def full_cluster(settings, prompt, output):
    """Return the output tokens/s of slots that are always full, with workers in step and ages spread."""
    cluster = Cluster(settings, rng())
    time_s, tokens, submitted = 0.0, 0, 0
    gap = -(-output // max(settings.worker_slots))
    for step_number in range(40 * output):
        for worker, slots in enumerate(settings.worker_slots):
            # Staggered, so that every age is there at every step, as in a steady state.
            while cluster.running[worker] + cluster.queued[worker] < min(slots, 1 + step_number // gap):
                cluster.submit(submitted, worker, prompt, output)
                submitted += 1
        step = cluster.begin_step()
        time_s += step.duration_s
        result = cluster.end_step()
        each = result.output_tokens
        tokens += len(result.request_ids) if each is None else int(each.sum())
        if step_number == 10 * output:
            time_s, tokens = 0.0, 0
    return tokens / time_s


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"prefill_s_per_token": 1e-4},
        {"prefill_s_per_token": 1e-4, "prefill_tokens_max": 40},
        {"prefill_s_per_token": 1e-4, "decode_factor_under_prefill": 3.0},
        {"decode_factor_under_prefill": 3.0, "prefill_tokens_max": 54},
        {"step_s_per_request": 1e-3, "batch_buckets": (1, 2, 8)},
        {"tokens_per_step": 2.2},
        {"slots_each": (4, 4), "slowness": (2.0, 2.0)},
    ],
    ids=str,
)
def test_capacity_of_equal_requests_is_what_a_full_cluster_does(more):
    settings = ClusterSettings(2, 4, None, 0.03, 1e-5, **more)
    workload = Workload("w", tuple(TraceRequest(0.0, 100, 44) for _ in range(400)))
    capacity = perfect_capacity(workload, settings)
    assert full_cluster(settings, 100, 44) == pytest.approx(capacity.output_tokens_per_s, rel=0.02)
    assert capacity.requests_per_s == pytest.approx(capacity.output_tokens_per_s / 44)


def test_perfect_balance_of_unequal_workers_is_what_each_does_in_the_same_time():
    workload = Workload("w", (TraceRequest(0.0, 1000, 100),))
    plain = perfect_capacity(workload, ClusterSettings(8, 64))
    slow = perfect_capacity(workload, ClusterSettings(8, 64, slowness=(1.25, 1.25, *(1.0,) * 6)))
    # Two of eight at 0.8 of the speed: 7.6 of eight workers for the same KV work.
    assert slow.step_s - 0.030 == pytest.approx((plain.step_s - 0.030) * 8 / 7.6)
    assert slow.kv_tokens_per_worker == plain.kv_tokens_per_worker
    fewer = perfect_capacity(workload, ClusterSettings(2, 64, slots_each=(32, 64)))
    assert fewer.kv_tokens_per_worker == pytest.approx(0.75 * plain.kv_tokens_per_worker)


def test_aborted_output_is_no_work():
    whole = Workload("w", (TraceRequest(0.0, 1000, 100),))
    left = Workload("w", (TraceRequest(0.0, 1000, 100, aborted_after_tokens=10),))
    short = Workload("w", (TraceRequest(0.0, 1000, 10),))
    settings = ClusterSettings(2, 64)
    assert perfect_capacity(left, settings) == perfect_capacity(short, settings)
    assert perfect_capacity(left, settings) != perfect_capacity(whole, settings)


def test_kv_capacity_limits_capacity():
    workload = Workload("w", (TraceRequest(0.0, 1000, 10),))
    small = perfect_capacity(workload, ClusterSettings(2, 64, 10_000))
    assert small.kv_tokens_per_worker == 10_000
    assert small.output_tokens_per_s < perfect_capacity(workload, ClusterSettings(2, 64)).output_tokens_per_s


def test_prompts_have_so_many_words_and_are_their_own():
    maker = PromptMaker(0)
    texts = [maker.text(TraceRequest(0.0, tokens, 1), i) for i, tokens in enumerate((1, 2, 100, 9000, 9000))]
    assert [len(text.split()) for text in texts] == [1, 2, 100, 9000, 9000]
    assert len(set(texts)) == 5
    shared = [maker.text(TraceRequest(0.0, 50, 1, prompt_key=7), i) for i in range(2)]
    assert shared[0] == shared[1]
