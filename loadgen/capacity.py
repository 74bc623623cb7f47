"""What a barrier-synchronised deployment could do if every step were perfectly balanced.

"Perfect" is the throughput with every slot full and every step at ``max = mean``, in KV and in prefill. A
request that decodes o tokens after a prompt of p is seen in a random slot at a random step with
``p + (o - 1) / 2`` KV tokens, and in proportion to the steps that it takes, o where each gives a token: so a
slot holds ``E = Σ (p·o + o·(o - 1) / 2) / Σ o`` tokens on average. With chunked prefill it is there for some
steps before, with half its prompt.

Where workers differ in speed, a perfect balance gives each what it does in the same time. Where KV tokens
cost more under prefill, all workers prefill in the same steps: in as many as there are prompts for each, or
chunks of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from loadgen.cluster_settings import TOKENS_PER_STEP_MAX, ClusterSettings, FloatArray
from loadgen.workload import Workload


@dataclass(frozen=True, slots=True)
class Capacity:
    """Perfect throughput (output tokens/s, requests/s), step time and KV tokens of a worker."""

    output_tokens_per_s: float
    requests_per_s: float
    step_s: float
    kv_tokens_per_worker: float


def perfect_capacity(workload: Workload, settings: ClusterSettings) -> Capacity:
    """Return what ``settings`` could do with ``workload``, prefill included."""
    prompts = np.array([r.prompt_tokens for r in workload.requests], dtype=np.float64)
    outputs = np.array([r.decoded_tokens for r in workload.requests], dtype=np.float64)
    decoding, before = steps_of(outputs, settings.tokens_per_step), _steps_before(prompts, settings)
    steps = float((decoding + before).mean())
    slot_kv_tokens = float(((prompts + (outputs - 1) / 2) * decoding + prompts / 2 * before).mean()) / steps
    # Each step so many of the requests of a worker end, and as many new prompts are prefilled.
    leaving = 1 / steps
    prompt_tokens = float(prompts.mean())
    most = math.inf if settings.kv_capacity_tokens is None else settings.kv_capacity_tokens / slot_kv_tokens
    if settings.prefill_tokens_max is not None:
        most = min(most, settings.prefill_tokens_max * steps / (float(decoding.mean()) + prompt_tokens))
    requests = [min(slots, most) for slots in settings.worker_slots]
    mean_requests = sum(requests) / settings.workers
    prompts_in_step = mean_requests * leaving
    # What each takes of the group's work if they are to end together; with equal speeds a G-th.
    share = 1 / sum(1 / slowness for slowness in settings.slowness or (1.0,) * settings.workers)
    kv_tokens = mean_requests * slot_kv_tokens
    # All prefill in the same steps, a prompt each or a part of one.
    under_prefill = min(1.0, prompts_in_step * float((1 + before).mean()))
    factor = 1 + (settings.decode_factor_under_prefill - 1) * under_prefill
    step_s = (
        settings.step_base_s
        + settings.step_s_per_kv_token * kv_tokens * settings.workers * share * factor
        + settings.prefill_s_per_token * prompts_in_step * prompt_tokens * settings.workers * share
        + settings.step_s_per_request * settings.bucket(math.ceil(max(requests)))
    )
    requests_per_s = sum(requests) * leaving / step_s
    return Capacity(requests_per_s * float(outputs.mean()), requests_per_s, step_s, kv_tokens)


def steps_of(outputs: FloatArray, tokens_per_step: float) -> FloatArray:
    """Return the mean number of steps that each of ``outputs`` takes: one token, then 1 to 3 at a time."""
    # A step draws 1 + binomial tokens; the last ones draw more than are left, E[X (X - 1)] / 2 E[X] of them.
    share = (tokens_per_step - 1) / (TOKENS_PER_STEP_MAX - 1)
    variance = (TOKENS_PER_STEP_MAX - 1) * share * (1 - share)
    too_many = (variance + tokens_per_step**2 - tokens_per_step) / (2 * tokens_per_step)
    steps: FloatArray = 1 + np.where(outputs > 1, outputs - 1 + too_many, 0.0) / tokens_per_step
    return steps


def _steps_before(prompts: FloatArray, settings: ClusterSettings) -> FloatArray:
    """Return for how many steps each prompt is prefilled before the one with its first token."""
    if settings.prefill_tokens_max is None:
        return np.zeros(len(prompts))
    # The slots that are left decode a token each.
    chunk = settings.prefill_tokens_max - max(settings.worker_slots) + 1
    before: FloatArray = np.maximum(np.ceil(prompts / chunk) - 1, 0)
    return before
