"""How soon a closed batch could be done: all of it is there at once, and the last answer is what counts.

"Packed" is the batch with its lengths known and every step perfectly balanced: the longest request first,
each into the slot that is free first, and the KV and prefill of each step spread evenly.
"""

from __future__ import annotations

import heapq

import numpy as np

from loadgen.capacity import steps_of
from loadgen.cluster_settings import ClusterSettings, IntArray
from loadgen.workload import Workload


def packed_makespan_s(workload: Workload, settings: ClusterSettings) -> float:
    """Return when the last request is done if ``workload`` arrives at once and is packed (s).

    KV capacities are not looked at; prefill is whole.
    """
    requests = workload.requests
    prompts = np.array([r.prompt_tokens for r in requests], dtype=np.int64)
    outputs = np.array([r.decoded_tokens for r in requests], dtype=np.float64)
    steps = np.ceil(steps_of(outputs, settings.tokens_per_step)).astype(np.int64)
    begins = _begins(steps, sum(settings.worker_slots))
    ends = begins + steps
    last = int(ends.max())
    # Step t has Σ (prompt + t - begin) KV tokens over who runs, summed up from where each begins and ends.
    running, fixed = np.zeros(last + 1), np.zeros(last + 1)
    for at, sign in ((begins, 1), (ends, -1)):
        np.add.at(running, at, sign)
        np.add.at(fixed, at, sign * (prompts - settings.tokens_per_step * begins))
    running, fixed = np.cumsum(running)[:last], np.cumsum(fixed)[:last]
    kv_tokens = fixed + settings.tokens_per_step * np.arange(last) * running
    prefill_tokens = np.bincount(begins, prompts, minlength=last)
    share = 1 / sum(1 / slowness for slowness in settings.slowness or (1.0,) * settings.workers)
    per_worker = np.ceil(running / settings.workers).astype(np.int64)
    requests_cost = [settings.bucket(count) for count in per_worker.tolist()]
    return float(
        last * settings.step_base_s
        + settings.step_s_per_kv_token * share * kv_tokens.sum()
        + settings.prefill_s_per_token * share * prefill_tokens.sum()
        + settings.step_s_per_request * sum(requests_cost)
    )


def _begins(steps: IntArray, slots: int) -> IntArray:
    """Return in which step each begins: the longest first, each in the slot that is free first."""
    begins = np.zeros(len(steps), dtype=np.int64)
    free = [0] * slots
    for i in np.argsort(-steps, kind="stable").tolist():
        begins[i] = heapq.heappop(free)
        heapq.heappush(free, int(begins[i] + steps[i]))
    return begins
