"""What an emulated engine says of itself, in the words of vLLM or of SGLang. Pure."""

from __future__ import annotations

from typing import Any

MODEL_TOKENS_MAX = 131_072
"""Longest context that the emulated model states (tokens); nothing enforces it."""


def models_page(model: str, *, sglang: bool) -> dict[str, Any]:
    """Return the answer to ``/v1/models``."""
    entry = {
        "id": model,
        "object": "model",
        "created": 0,
        "owned_by": "sglang" if sglang else "vllm",
        "root": model,
        "parent": None,
        "max_model_len": MODEL_TOKENS_MAX,
    }
    return {"object": "list", "data": [entry]}


def tokenize_page(tokens: int) -> dict[str, Any]:
    """Return the answer to ``/tokenize``; the ids are of no vocabulary."""
    return {"count": tokens, "max_model_len": MODEL_TOKENS_MAX, "tokens": list(range(tokens))}


def version_page() -> dict[str, Any]:
    """Return the answer to vLLM's ``/version``."""
    return {"version": "0.33.0"}


def server_info_page(
    model: str, ranks: int, slots: int, kv_capacity_tokens: int | None, *, mode: str
) -> dict[str, Any]:
    """Return the answer to SGLang's ``/server_info``: of some hundred members those that are of use.

    ``mode``: prefill or decode, "null" for both.

    ``max_running_requests`` is the command line's, which left it out; what holds is in the rank's state.
    """
    return {
        "served_model_name": model,
        "dp_size": ranks,
        "enable_dp_attention": ranks > 1,
        "disaggregation_mode": mode,
        "max_running_requests": None,
        "max_total_num_tokens": kv_capacity_tokens,
        "internal_states": [
            {
                "effective_max_running_requests_per_dp": slots,
                "memory_usage": {"token_capacity": kv_capacity_tokens},
            }
        ]
        * ranks,
        "version": "0.5.23",
    }
