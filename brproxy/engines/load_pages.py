"""The pages on which engines tell their load: vLLM's ``/metrics`` and SGLang's ``/v1/loads``. Pure.

Neither reader raises, whatever a page holds: what cannot be read is missing.
"""

from __future__ import annotations

from typing import Any

import orjson

from brproxy.engines.exposition import Sample, samples
from brproxy.engines.load import (
    FIGURE_MAX,
    FULL_MAX,
    RANKS_MAX,
    LoadReading,
    LoadReport,
    count_of,
    moments_of,
)
from brproxy.types import TOKENS_MAX

VLLM_WANTED = ("kv_used_tokens", "kv_capacity_tokens", "running", "waiting", "preemptions")
SGLANG_WANTED = ("kv_used_tokens", "kv_capacity_tokens", "running", "waiting")

# Each by its newest name, and by those that older engines give it. Clients of the format write a counter with
# "_total", older ones without.
_USAGE, _OLD_USAGE = "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"
_CONFIG = "vllm:cache_config_info"
_COUNTS = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "preemptions": "vllm:num_preemptions_total",
    "prefill_tokens": "vllm:prompt_tokens_total",
}
_NAMES = (_USAGE, _CONFIG, *_COUNTS.values())
_OLDER = {
    _USAGE: _OLD_USAGE,
    "vllm:num_preemptions_total": "vllm:num_preemptions",
    "vllm:prompt_tokens_total": "vllm:prompt_tokens",
}

_LOADS = {
    "kv_used_tokens": ("num_used_tokens", TOKENS_MAX),
    "kv_capacity_tokens": ("max_total_num_tokens", TOKENS_MAX),
    "running": ("num_running_reqs", TOKENS_MAX),
    "waiting": ("num_waiting_reqs", TOKENS_MAX),
    "waiting_tokens": ("num_waiting_uncached_tokens", TOKENS_MAX),
    "prefill_tokens": ("total_prefill_uncached_tokens", FIGURE_MAX),
    "prefill_busy_us": ("total_prefill_busy_us", FIGURE_MAX),
}


def read_vllm_metrics(page: bytes) -> LoadReading:
    """Return what a vLLM metrics page says of each of its ``engine`` labels; 0 is a page without them."""
    found = samples(page, _NAMES)
    # Each name is one search of the whole page: for older ones only where the new ones are not there.
    names = {sample.name for sample in found}
    found += samples(page, [older for name, older in _OLDER.items() if name not in names])
    by_rank: dict[int, dict[str, Sample]] = {}
    for sample in found:
        rank = _rank_of(sample.labels.get("engine", "0"))
        if rank is not None and (rank in by_rank or len(by_rank) < RANKS_MAX):
            by_rank.setdefault(rank, {})[sample.name] = sample
    renamed: dict[str, str] = {}
    reports = {rank: _vllm_report(found, renamed) for rank, found in by_rank.items()}
    return LoadReading(reports, VLLM_WANTED, renamed)


def read_sglang_loads(body: bytes) -> LoadReading:
    """Return what SGLang's answer says of each ``dp_rank``."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = None
    loads = document.get("loads") if isinstance(document, dict) else None
    reports = {}
    for position, load in enumerate(loads[:RANKS_MAX] if isinstance(loads, list) else ()):
        if isinstance(load, dict):
            rank = count_of(load.get("dp_rank", position))
            if rank is not None:
                reports[rank] = _sglang_report(load)
    return LoadReading(reports, SGLANG_WANTED)


def _vllm_report(found: dict[str, Sample], renamed: dict[str, str]) -> LoadReport:
    figures: dict[str, int | None] = {}
    for figure, name in _COUNTS.items():
        sample = found.get(name) or found.get(_OLDER.get(name, name))
        figures[figure] = None if sample is None else count_of(sample.value, FIGURE_MAX)
    capacity = _vllm_capacity(found[_CONFIG].labels, renamed) if _CONFIG in found else None
    usage = _vllm_usage(found, renamed)
    figures["kv_used_tokens"] = None if usage is None or capacity is None else round(usage * capacity)
    return LoadReport(kv_capacity_tokens=capacity, decode_moments=None, **figures)


def _vllm_usage(found: dict[str, Sample], renamed: dict[str, str]) -> float | None:
    """Return the share of the KV cache that is taken, 0 to 1."""
    sample = found.get(_USAGE)
    if sample is None and _OLD_USAGE in found:
        sample = found[_OLD_USAGE]
        renamed["kv_used_tokens"] = _OLD_USAGE
    return min(sample.value, 1.0) if sample is not None and 0 <= sample.value <= FULL_MAX else None


def _vllm_capacity(labels: dict[str, str], renamed: dict[str, str]) -> int | None:
    """Return the KV capacity: of a model with several kinds of attention, blocks do not tell it."""
    capacity = _count_in(labels, "kv_cache_size_tokens")
    if not capacity:
        blocks, block_size = _count_in(labels, "num_gpu_blocks"), _count_in(labels, "block_size")
        if not blocks or not block_size:
            return None
        renamed["kv_capacity_tokens"] = "num_gpu_blocks × block_size"
        capacity = min(blocks * block_size, TOKENS_MAX)
    return capacity


def _sglang_report(load: dict[str, Any]) -> LoadReport:
    figures = {figure: count_of(load.get(key), highest) for figure, (key, highest) in _LOADS.items()}
    if not figures["kv_capacity_tokens"]:
        figures["kv_capacity_tokens"] = None
    return LoadReport(decode_moments=moments_of(load.get("decode_moments")), **figures)


def _count_in(labels: dict[str, str], name: str) -> int | None:
    """Return the count that a label says; vLLM writes "None" where it does not know."""
    text = labels.get(name, "")
    return min(int(text), TOKENS_MAX) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def _rank_of(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else None
