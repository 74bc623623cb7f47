"""Synthetic laws, arrivals and capacity."""

import numpy as np
import pytest

from brproxy.registry import UnknownNameError
from brproxy.types import InvalidInputError
from loadgen.arrivals import faster, with_gamma_arrivals
from loadgen.capacity import perfect_capacity
from loadgen.cluster import Cluster
from loadgen.cluster_settings import ClusterSettings
from loadgen.prompts import PromptMaker
from loadgen.traces.synthetic import SYNTHETIC, synthetic_workload
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


@pytest.mark.parametrize("name", SYNTHETIC)
def test_the_same_seed_draws_the_same_requests(name):
    assert synthetic_workload(name, 50, rng(3)) == synthetic_workload(name, 50, rng(3))
    assert synthetic_workload(name, 50, rng(3)) != synthetic_workload(name, 50, rng(4))


def test_unknown_workload():
    with pytest.raises(
        UnknownNameError, match="unknown workload 'x'; allowed: proprietary, azure-2024, short, repeated"
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


def test_capacity_of_equal_requests_is_what_a_full_cluster_does():
    settings = ClusterSettings(2, 4, None, 0.03, 1e-5)
    workload = Workload("w", tuple(TraceRequest(0.0, 100, 11) for _ in range(400)))
    capacity = perfect_capacity(workload, settings)
    cluster = Cluster(settings)
    # Staggered, so that every age is there at every step, as in a steady state.
    time_s, tokens, submitted = 0.0, 0, 0
    for step_number in range(550):
        for worker in range(2):
            while cluster.running[worker] + cluster.queued[worker] < min(4, 1 + step_number // 3):
                cluster.submit(submitted, worker, 100, 11)
                submitted += 1
        step = cluster.begin_step()
        time_s += step.duration_s
        tokens += len(cluster.end_step().request_ids)
        if step_number == 49:
            time_s, tokens = 0.0, 0
    assert tokens / time_s == pytest.approx(capacity.output_tokens_per_s, rel=0.02)
    assert capacity.requests_per_s == pytest.approx(capacity.output_tokens_per_s / 11)


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
