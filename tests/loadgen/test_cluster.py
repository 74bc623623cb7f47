"""The barrier-step model against a model of plain lists, and what an engine is known to do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brproxy.types import InvalidInputError
from loadgen.cluster import Cluster, ClusterSettings


class PlainCluster:
    """The same rules, one request at a time."""

    def __init__(self, settings):
        self.settings = settings
        self.queues = [[] for _ in range(settings.workers)]
        self.running = [[] for _ in range(settings.workers)]
        self.loading = [[] for _ in range(settings.workers)]
        self.kept = [0] * settings.workers
        self.states = {}

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
            tokens = 0
            while (
                queue
                and len(running) + len(loading) < self.settings.slots
                and self.needs([*running, *loading, queue[0]]) + kept <= capacity
            ):
                request = queue.pop(0)
                if self.states[request[0]] == "remote":
                    loading.append(request)
                    continue
                tokens += request[1] + request[3] if self.states[request[0]] == "here" else 0
                running.append(request)
            prefill.append(tokens)
        loads = [sum(r[1] + r[3] for r in running) for running in self.running]
        if not any(self.running):
            return None
        duration_s = (
            self.settings.step_base_s
            + self.settings.step_s_per_kv_token * max(loads)
            + self.settings.prefill_s_per_token * max(prefill)
        )
        return duration_s, loads

    def end_step(self):
        results = {}
        for running in self.running:
            for request in running:
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


@settings(max_examples=200)
@given(operations, st.sampled_from([None, 50, 90]), st.integers(1, 4))
def test_it_is_the_plain_model(operations, capacity, slots):
    cluster_settings = ClusterSettings(3, slots, capacity, 0.03, 1e-4, 1e-3)
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
        assert cluster.running.tolist() == [len(running) for running in plain.running]


def test_the_heaviest_worker_makes_the_step():
    cluster = Cluster(ClusterSettings(2, 4, None, 0.030, 100e-9))
    cluster.submit(0, 0, 100_000, 5)
    cluster.submit(1, 1, 50_000, 5)
    assert cluster.begin_step().duration_s == pytest.approx(0.030 + 0.010)
    cluster.end_step()
    assert cluster.begin_step().kv_tokens.tolist() == [100_001, 50_001]


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
