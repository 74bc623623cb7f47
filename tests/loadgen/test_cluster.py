"""The barrier-step model against a model of plain lists, and what an engine is known to do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.types import InvalidInputError
from loadgen.cluster import Cluster
from loadgen.cluster_settings import ClusterSettings
from tests.draws import draws


class PlainCluster:
    """The same rules, one request at a time."""

    def __init__(self, settings):
        self.settings = settings
        self.queues = [[] for _ in range(settings.workers)]
        self.running = [[] for _ in range(settings.workers)]
        self.loading = [[] for _ in range(settings.workers)]
        self.kept = [0] * settings.workers
        self.states = {}
        self.missing = {}

    def submit(self, request_id, worker, prompt, output, remote):
        self.queues[worker].append([request_id, prompt, output, 0])
        self.states[request_id] = "remote" if remote else "here"

    def cancel(self, request_id):
        for lists in (self.queues, self.running, self.loading):
            for requests in lists:
                requests[:] = [r for r in requests if r[0] != request_id]

    def loaded(self, request_id):
        for queue, loading in zip(self.queues, self.loading, strict=True):
            for request in [r for r in loading if r[0] == request_id]:
                loading.remove(request)
                queue.insert(0, request)
                self.states[request_id] = "loaded"

    def needs(self, requests):
        return sum(r[1] + r[3] + 1 for r in requests)

    def begin_step(self):
        capacity = self.settings.kv_capacity_tokens or float("inf")
        prefill = []
        for queue, running, loading, kept in zip(
            self.queues, self.running, self.loading, self.kept, strict=True
        ):
            while len(running) > 1 and self.needs(running) + self.needs(loading) + kept > capacity:
                queue.insert(0, running.pop())
                self.states[queue[0][0]] = "here"
            budget = float("inf")
            if self.settings.prefill_tokens_max is not None:
                budget = self.settings.prefill_tokens_max - sum(not self.missing.get(r[0]) for r in running)
            tokens = 0
            for request in running:
                chunk = min(self.missing.get(request[0], 0), budget - tokens)
                self.missing[request[0]] = self.missing.get(request[0], 0) - chunk
                tokens += chunk
            while (
                queue
                and len(running) + len(loading) < self.settings.slots
                and self.needs([*running, *loading, queue[0]]) + kept <= capacity
            ):
                prompt = queue[0][1] + queue[0][3] if self.states[queue[0][0]] == "here" else 0
                if prompt and tokens >= budget:
                    break
                request = queue.pop(0)
                if self.states[request[0]] == "remote":
                    loading.append(request)
                    continue
                chunk = min(prompt, budget - tokens)
                self.missing[request[0]] = prompt - chunk
                tokens += chunk
                running.append(request)
            prefill.append(tokens)
        loads = [sum(r[1] + r[3] - self.missing.get(r[0], 0) for r in running) for running in self.running]
        if not any(self.running):
            return None
        duration_s = (
            self.settings.step_base_s
            + self.settings.step_s_per_kv_token * max(loads)
            + self.settings.prefill_s_per_token * max(prefill)
        )
        return duration_s, loads, prefill

    def end_step(self):
        results = {}
        for running in self.running:
            for request in running:
                if self.missing[request[0]]:
                    continue
                request[3] += 1
                results[request[0]] = request[3] >= request[2]
            running[:] = [r for r in running if r[3] < r[2]]
        return results


operations = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, 2), st.integers(0, 40), st.integers(1, 8), st.booleans()),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("loaded"), st.integers(0, 30)),
        st.tuples(st.just("keep"), st.integers(0, 2), st.integers(0, 30)),
        st.tuples(st.just("step")),
        st.tuples(st.just("step")),
    ),
    max_size=60,
)


@draws(200)
@given(
    operations, st.sampled_from([None, 50, 90]), st.integers(1, 4), st.none() | st.sampled_from([4, 7, 25])
)
def test_it_is_the_plain_model(operations, capacity, slots, chunk):
    cluster_settings = ClusterSettings(3, slots, capacity, 0.03, 1e-4, 1e-3, chunk)
    cluster, plain = Cluster(cluster_settings), PlainCluster(cluster_settings)
    submitted = 0
    for operation, *arguments in operations:
        if operation == "submit":
            *size, remote = arguments
            cluster.submit(submitted, *size, remote=remote)
            plain.submit(submitted, *size, remote)
            submitted += 1
        elif operation == "cancel":
            cluster.cancel(*arguments)
            plain.cancel(*arguments)
        elif operation == "loaded":
            cluster.loaded(*arguments)
            plain.loaded(*arguments)
        elif operation == "keep":
            worker, tokens = arguments
            cluster.reserve(worker, tokens - plain.kept[worker])
            plain.kept[worker] = tokens
        else:
            step, expected = cluster.begin_step(), plain.begin_step()
            assert (step is None) == (expected is None)
            if step is None:
                continue
            assert step.duration_s == pytest.approx(expected[0])
            assert step.kv_tokens.tolist() == expected[1]
            assert step.prefill_tokens.tolist() == expected[2]
            assert chunk is None or step.prefill_tokens.max() <= chunk
            result = cluster.end_step()
            done = dict(zip(result.request_ids.tolist(), result.finished.tolist(), strict=True))
            assert done == plain.end_step()
        waiting = zip(plain.queues, plain.loading, strict=True)
        assert cluster.queued == [len(queue) + len(loading) for queue, loading in waiting]
        assert sorted(cluster.loading) == sorted(r[0] for loading in plain.loading for r in loading)
        used = zip(plain.running, plain.loading, plain.kept, strict=True)
        assert cluster.kv_used_tokens.tolist() == [
            sum(r[1] + r[3] for r in running) + plain.needs(loading) + kept for running, loading, kept in used
        ]
        assert not cluster.running.sum() or (cluster.kv_tokens <= cluster.kv_used_tokens).all()
        assert cluster.running.tolist() == [len(running) for running in plain.running]


def test_the_heaviest_worker_makes_the_step():
    cluster = Cluster(ClusterSettings(2, 4, None, 0.030, 100e-9))
    cluster.submit(0, 0, 100_000, 5)
    cluster.submit(1, 1, 50_000, 5)
    assert cluster.begin_step().duration_s == pytest.approx(0.030 + 0.010)
    cluster.end_step()
    assert cluster.begin_step().kv_tokens.tolist() == [100_001, 50_001]


def test_a_prompt_in_chunks_by_hand():
    cluster = Cluster(ClusterSettings(1, 4, 10_000, 0.030, 1e-6, 1e-5, 100))
    cluster.submit(0, 0, 60, 9)
    cluster.submit(1, 0, 200, 2)
    cluster.submit(2, 0, 10, 2)
    prefilled, loads, decoded, admitted, durations_s = [], [], [], [], []
    for _ in range(4):
        step = cluster.begin_step()
        prefilled.append(step.prefill_tokens.tolist()[0])
        loads.append(step.kv_tokens.tolist()[0])
        admitted.append(step.admitted)
        durations_s.append(step.duration_s)
        # What is begun has all its room at once.
        assert cluster.kv_used_tokens[0] >= 260
        decoded.append(cluster.end_step().request_ids.tolist())
    # The first is whole, the second's 200 tokens come as 40, 99 and 61 beside one and one decode token.
    assert prefilled == [100, 99, 71, 0]
    assert admitted == [[0, 1], [], [2], []]
    assert decoded == [[0], [0], [0, 1, 2], [0, 1, 2]]
    assert loads == [60 + 40, 61 + 139, 62 + 200 + 10, 63 + 201 + 11]
    assert durations_s[0] == pytest.approx(0.030 + 1e-6 * 100 + 1e-5 * 100)


def test_preempted_requests_are_recomputed_and_lose_nothing():
    cluster = Cluster(ClusterSettings(1, 8, 30, 0.03, 0.0, 0.001))
    for request_id in range(3):
        cluster.submit(request_id, 0, 5, 12)
    decoded = np.zeros(3, dtype=int)
    for _ in range(200):
        if cluster.begin_step() is None:
            break
        decoded[cluster.end_step().request_ids] += 1
    assert decoded.tolist() == [12, 12, 12]
    assert cluster.preemptions > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"workers": 0}, "workers and slots must be at least 1, got 0 and 64"),
        ({"slots": 0}, "at least 1"),
        ({"kv_capacity_tokens": 0}, "kv_capacity_tokens must be at least 1, got 0"),
        ({"step_base_s": 0.0}, "step_base_s must be positive"),
        ({"prefill_s_per_token": -1.0}, "at least 0"),
        ({"prefill_tokens_max": 63}, "prefill_tokens_max must be at least the slots, 64, got 63"),
        ({"dispatch_steps": -1}, "dispatch_steps must be 0 to 1000, got -1"),
        ({"decode_factor_under_prefill": 0.9}, "decode_factor_under_prefill must be at least 1, got 0.9"),
        ({"step_s_per_request": -1.0}, "at least 0"),
        ({"batch_buckets": (8, 4)}, r"batch_buckets must increase, from at least 1, got \[8, 4\]"),
        ({"tokens_per_step": 3.5}, "tokens_per_step must be 1 to 3, got 3.5"),
        ({"slots_each": (1, 2)}, "slots_each must have one value for each of 8 workers, got 2"),
        ({"workers": 2, "slots_each": (1, 0)}, r"slots_each must be at least 1 each, got \[1, 0\]"),
        ({"slowness": (1.0,)}, "slowness must have one value for each of 8 workers, got 1"),
        ({"workers": 1, "slowness": (0.0,)}, r"slowness must be above 0 and at most 1000, got \[0.0\]"),
    ],
)
def test_impossible_deployments(arguments, words):
    with pytest.raises(InvalidInputError, match=words):
        ClusterSettings(**arguments)


def test_impossible_requests():
    cluster = Cluster(ClusterSettings(1, 1, 100))
    with pytest.raises(InvalidInputError, match=r"90 \+ 11 tokens exceed the KV capacity of 100 tokens"):
        cluster.submit(0, 0, 90, 11)
    with pytest.raises(InvalidInputError, match="needs a prompt and an output, got 1 and 0"):
        cluster.submit(0, 0, 1, 0)


def test_kv_tokens_cost_more_where_a_worker_prefills():
    settings = ClusterSettings(2, 4, None, 0.030, 1e-6, 0.0, decode_factor_under_prefill=3.0)
    cluster = Cluster(settings)
    cluster.submit(0, 0, 10_000, 5)
    cluster.begin_step()
    cluster.end_step()
    cluster.submit(1, 1, 6_000, 5)
    step = cluster.begin_step()
    assert step.kv_tokens.tolist() == [10_001, 6_000]
    assert step.work.tolist() == [10_001, 18_000]
    assert step.duration_s == pytest.approx(0.030 + 0.018)
    cluster.end_step()
    assert cluster.begin_step().duration_s == pytest.approx(0.030 + 0.010002)


def test_requests_cost_what_the_fullest_workers_bucket_costs():
    settings = ClusterSettings(2, 9, None, 0.030, 0.0, step_s_per_request=1e-3, batch_buckets=(1, 4, 8))
    cluster = Cluster(settings)
    durations_ms = []
    for request_id in range(9):
        cluster.submit(request_id, 0, 1, 100)
        durations_ms.append(round(cluster.begin_step().duration_s * 1e3))
        cluster.end_step()
    # The other worker is padded to it at no cost. Beyond the last bucket nothing is padded.
    cluster.submit(9, 1, 1, 100)
    assert cluster.begin_step().duration_s == pytest.approx(0.039)
    assert durations_ms == [31, 34, 34, 34, 38, 38, 38, 38, 39]


@draws(50)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=30),
    st.floats(1, 3),
    st.none() | st.integers(100, 200),
    st.integers(0, 9),
)
def test_several_tokens_a_step_are_as_many_in_the_end(sizes, mean, capacity, seed):
    cluster = Cluster(ClusterSettings(2, 4, capacity, tokens_per_step=mean), np.random.default_rng(seed))
    for request_id, (prompt, output) in enumerate(sizes):
        cluster.submit(request_id, request_id % 2, prompt, output)
    decoded, done = [0] * len(sizes), []
    while cluster.begin_step() is not None:
        assert capacity is None or (cluster.kv_used_tokens <= capacity).all()
        result = cluster.end_step()
        each = (
            [1] * len(result.request_ids) if result.output_tokens is None else result.output_tokens.tolist()
        )
        for request_id, tokens in zip(result.request_ids.tolist(), each, strict=True):
            assert 1 <= tokens <= (3 if decoded[request_id] and mean > 1 else 1)
            decoded[request_id] += tokens
        done += result.request_ids[result.finished].tolist()
    assert decoded == [output for _, output in sizes]
    assert sorted(done) == list(range(len(sizes)))


def test_tokens_a_step_have_their_mean():
    cluster = Cluster(ClusterSettings(1, 64, tokens_per_step=1.8), np.random.default_rng(1))
    for request_id in range(64):
        cluster.submit(request_id, 0, 1, 10_000)
    cluster.begin_step()
    assert cluster.end_step().output_tokens.tolist() == [1] * 64
    tokens = [cluster.begin_step() and cluster.end_step().output_tokens.mean() for _ in range(200)]
    assert np.mean(tokens) == pytest.approx(1.8, abs=0.03)


def test_workers_may_be_unequal():
    settings = ClusterSettings(2, 9, None, 0.030, 1e-6, 1e-5, slots_each=(1, 3), slowness=(1.0, 1.5))
    cluster = Cluster(settings)
    for request_id in range(8):
        cluster.submit(request_id, request_id % 2, 1000, 5)
    step = cluster.begin_step()
    assert cluster.running.tolist() == [1, 3]
    assert step.work.tolist() == [1000, 4500]
    assert step.duration_s == pytest.approx(0.030 + 1.5 * (3000e-6 + 3000e-5))
    assert settings.costs.slowness == pytest.approx((0.8, 1.2))
    assert settings.costs.s_per_kv_token == pytest.approx(1.25e-6)
    assert settings.costs.s_per_prefill_token == pytest.approx(1.25e-5)
