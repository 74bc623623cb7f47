"""sglang: SGLang's OpenAI server."""

from __future__ import annotations

from typing import ClassVar

from brproxy.engines.dialect import register_dialect
from brproxy.engines.dialects.openai import OpenAIDialect
from brproxy.engines.load import LoadReading
from brproxy.engines.load_pages import read_sglang_loads
from brproxy.engines.tokenize import TOKENIZE_PATH, Asked, read_tokenized, tokenize_body

_QUEUE_FULL = "The request queue is full."


@register_dialect("sglang")
class SglangDialect(OpenAIDialect):
    """SGLang, from 0.4 on. A full queue is a 503, or an error event in a stream that began with 200."""

    HEALTH_PATH: ClassVar[str] = "/health"
    LOAD_PATH: ClassVar[str] = "/v1/loads"
    TOKENIZE_PATH: ClassVar[str] = TOKENIZE_PATH

    def read_load(self, body: bytes) -> LoadReading:
        """See Dialect.read_load."""
        return read_sglang_loads(body)

    def tokenize_body(self, path: str, body: bytes) -> bytes | None:
        """See Dialect.tokenize_body."""
        return tokenize_body(path, body, Asked.SGLANG)

    def read_tokenized(self, body: bytes) -> int | None:
        """See Dialect.read_tokenized."""
        return read_tokenized(body)

    def is_refusal_error(self, error: object) -> bool:
        """See OpenAIDialect.is_refusal_error."""
        message = error.get("message") if isinstance(error, dict) else error
        named = isinstance(message, str) and _QUEUE_FULL in message
        return named or super().is_refusal_error(error)
