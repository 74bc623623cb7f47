"""vllm: vLLM's OpenAI server, and vllm-ascend, which shares it."""

from __future__ import annotations

from typing import ClassVar

from brproxy.engines.dialect import register_dialect
from brproxy.engines.dialects.openai import OpenAIDialect
from brproxy.engines.load import LoadReading
from brproxy.engines.load_pages import read_vllm_metrics
from brproxy.engines.tokenize import TOKENIZE_PATH, Asked, read_tokenized, tokenize_body

# EngineDeadError (v1/engine/exceptions.py), and what the engines before it said.
_DEATHS = (
    "EngineCore encountered an issue",
    "Engine loop is not running",
    "Background loop has errored already",
)


@register_dialect("vllm")
class VllmDialect(OpenAIDialect):
    """vLLM, from 0.8 on.

    With its queue limit reached vLLM answers 503 without Retry-After, or 200 with a stream whose first event
    is an error of type "Service Unavailable" and code 503 (seen on 0.32): either way another worker may
    still take the request. When its EngineCore has died it answers every request, until it stops, with
    500, or 200 with a stream whose first event is that error.
    """

    HEALTH_PATH: ClassVar[str] = "/health"
    LOAD_PATH: ClassVar[str] = "/metrics"
    TOKENIZE_PATH: ClassVar[str] = TOKENIZE_PATH
    LOAD_IN_BAND: ClassVar[bool] = True
    TELLS_FAULTS: ClassVar[bool] = True
    USAGE_TAKES_FINGERPRINT: ClassVar[bool] = True

    def read_load(self, body: bytes) -> LoadReading:
        """See Dialect.read_load."""
        return read_vllm_metrics(body)

    def tokenize_body(self, path: str, body: bytes) -> bytes | None:
        """See Dialect.tokenize_body."""
        return tokenize_body(path, body, Asked.VLLM)

    def read_tokenized(self, body: bytes) -> int | None:
        """See Dialect.read_tokenized."""
        return read_tokenized(body)

    def is_refusal_error(self, error: object) -> bool:
        """See OpenAIDialect.is_refusal_error."""
        named = isinstance(error, dict) and error.get("type") == "Service Unavailable"
        return named or super().is_refusal_error(error)

    def may_tell_death(self, status: int) -> bool:
        """See Dialect.may_tell_death."""
        return status == 500

    def is_death_error(self, error: object) -> bool:
        """See OpenAIDialect.is_death_error. Clients' words may be quoted in messages, but not begin them."""
        if not isinstance(error, dict):
            return False
        message = error.get("message")
        return (
            isinstance(message, str)
            and message.startswith(_DEATHS)
            and (error.get("code") in (500, "500") or error.get("type") == "InternalServerError")
        )
