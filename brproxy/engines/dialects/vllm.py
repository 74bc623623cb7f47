"""vllm: vLLM's OpenAI server, and vllm-ascend, which shares it."""

from __future__ import annotations

from typing import ClassVar

from brproxy.engines.dialect import register_dialect
from brproxy.engines.dialects.openai import OpenAIDialect


@register_dialect("vllm")
class VllmDialect(OpenAIDialect):
    """vLLM, from 0.8 on.

    With its queue limit reached vLLM answers 503 without Retry-After, or 200 with a stream whose first event
    is an error of type "Service Unavailable" and code 503 (seen on 0.32): either way another worker may
    still take the request.
    """

    HEALTH_PATH: ClassVar[str] = "/health"

    def is_refusal_error(self, error: object) -> bool:
        """See OpenAIDialect.is_refusal_error."""
        named = isinstance(error, dict) and error.get("type") == "Service Unavailable"
        return named or super().is_refusal_error(error)
