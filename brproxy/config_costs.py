"""The section of the configuration about what a step costs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from brproxy.validation import Section

_Cost = Annotated[float, Field(ge=0, le=1e6, strict=False)]


class Costs(Section):
    """What a step of a group costs; what is left out is learnt for each group from what passes through."""

    step_base_ms: _Cost | None = Field(
        default=None,
        description="A step that decodes nothing (milliseconds); left out: learnt.",
    )
    step_ns_per_kv_token: _Cost | None = Field(
        default=None,
        description="What a KV token of the worker that holds most makes each step longer by (nanoseconds); "
        "left out: learnt.",
    )
    prefill_us_per_token: _Cost | None = Field(
        default=None,
        description="What a prompt token makes the step longer by in which it is prefilled (microseconds); "
        "left out: learnt.",
    )
    prefill_tokens_max: int | None = Field(
        default=None,
        ge=1,
        le=1 << 24,
        description="Most prompt tokens that a worker prefills in one step (vLLM: --max-num-batched-tokens, "
        "SGLang: --chunked-prefill-size); left out: learnt (tokens).",
    )
    tokens_per_step: float = Field(
        default=1.0,
        ge=1,
        le=16,
        strict=False,
        description="Tokens that a request decodes in such a step on average, more than one with "
        "multi-token prediction; what is learnt is of one token (tokens).",
    )
