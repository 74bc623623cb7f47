"""What a barrier-synchronised deployment could do if every step were perfectly balanced.

"Perfect" is the throughput with every slot full and every step at ``max = mean``. A request that decodes o
tokens after a prompt of p is seen in a random slot at a random step with ``p + (o - 1) / 2`` KV tokens, and
in proportion to o: so a slot holds ``E = Σ (p·o + o·(o - 1) / 2) / Σ o`` tokens on average.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loadgen.cluster_settings import ClusterSettings
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
    outputs = np.array([r.output_tokens for r in workload.requests], dtype=np.float64)
    slot_kv_tokens = (prompts * outputs + outputs * (outputs - 1) / 2).sum() / outputs.sum()
    kv_tokens = settings.slots * float(slot_kv_tokens)
    if settings.kv_capacity_tokens is not None:
        kv_tokens = min(kv_tokens, settings.kv_capacity_tokens)
    slots = kv_tokens / float(slot_kv_tokens)
    # Each step a worker finishes slots / mean output requests, and prefills as many new prompts.
    prefill_tokens = slots / outputs.mean() * prompts.mean()
    step_s = float(
        settings.step_base_s
        + settings.step_s_per_kv_token * kv_tokens
        + settings.prefill_s_per_token * prefill_tokens
    )
    output_tokens_per_s = settings.workers * slots / step_s
    return Capacity(output_tokens_per_s, output_tokens_per_s / float(outputs.mean()), step_s, kv_tokens)
