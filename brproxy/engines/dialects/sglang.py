"""sglang: SGLang's OpenAI server."""

from __future__ import annotations

from typing import ClassVar

from brproxy.engines.dialect import register_dialect
from brproxy.engines.dialects.openai import OpenAIDialect
from brproxy.engines.load import LoadReading
from brproxy.engines.load_pages import read_sglang_loads

_QUEUE_FULL = "The request queue is full."


@register_dialect("sglang")
class SglangDialect(OpenAIDialect):
    """SGLang, from 0.4 on. A full queue is a 503, or an error event in a stream that began with 200."""

    HEALTH_PATH: ClassVar[str] = "/health"
    LOAD_PATH: ClassVar[str] = "/v1/loads"

    def read_load(self, body: bytes) -> LoadReading:
        """See Dialect.read_load."""
        return read_sglang_loads(body)

    def is_refusal_error(self, error: object) -> bool:
        """See OpenAIDialect.is_refusal_error."""
        message = error.get("message") if isinstance(error, dict) else error
        named = isinstance(message, str) and _QUEUE_FULL in message
        return named or super().is_refusal_error(error)
