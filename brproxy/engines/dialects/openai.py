"""openai: the OpenAI API as any compatible server speaks it; the engines' dialects build on it."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import orjson

from brproxy.engines.dialect import (
    PLAIN_TOKENS,
    Dialect,
    EventFacts,
    RequestFacts,
    Usage,
    register_dialect,
)
from brproxy.engines.prompt import prompt_hashes, prompt_size
from brproxy.types import SEQUENCES_MAX, TOKENS_MAX

_DONE = b"[DONE]"
_DONE_FACTS = EventFacts(done=True)
_SILENT = EventFacts()
_ASKING_FOR_USAGE = b'"stream_options":{"include_usage":true},'
_STREAMS_WITH_DONE = ("/chat/completions", "/completions")
_OUTPUT_LIMIT_KEYS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_TEXT_KEYS = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")
_USAGE_KEY = b'"usage"'
# Possessive: a reply that ends in the middle must not be tried in every possible way.
_USAGE = re.compile(rb'"usage"\s*:\s*(\{(?:[^{}]++|\{[^{}]*+\})*+\})')
_USAGE_HOLDERS = (None, "response", "message")
# Events of the newer APIs name their type, and most of those carry no output.
_NOT_PLAIN = re.compile(rb'"(?:error"|type"|role":"|usage"(?!:null))')
_FORM_MODEL = re.compile(rb'name="?model"?\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,256})\r\n')
_FORM_BYTES_MAX = 1 << 16
_USER_CHARS_MAX = 256


@register_dialect("openai")
class OpenAIDialect(Dialect):
    """Chat and text completions in full; of every other API the prompt, the model and the usage report."""

    HEALTH_PATH: ClassVar[str] = "/v1/models"

    def read_request(
        self, path: str, content_type: str, body: bytes, *, hashes: bool = False
    ) -> RequestFacts:
        """See Dialect.read_request."""
        if content_type == "multipart/form-data":
            return RequestFacts(model=_form_model(body))
        document = _parse(body)
        if document is None:
            return RequestFacts()
        size = prompt_size(document)
        stream = document.get("stream") is True
        choices = _first_count(document, "n") or 1
        prompt_hash, prefix_hash = prompt_hashes(document) if hashes else (None, None)
        usage_can_be_asked = stream and "stream_options" not in document and self.ends_with_done(path)
        # By position, in the order of RequestFacts: names would cost as much as the tuple.
        return RequestFacts(
            _text(document.get("model")),
            stream,
            size.tokens if size.tokens and not size.text_bytes else None,
            size.text_bytes,
            min(size.prompts * choices, SEQUENCES_MAX),
            _first_count(document, *_OUTPUT_LIMIT_KEYS),
            document.get("ignore_eos") is True,
            prompt_hash,
            prefix_hash,
            _text(document.get("user"))[:_USER_CHARS_MAX],
            usage_can_be_asked,
        )

    def ask_usage(self, body: bytes) -> bytes:
        """See Dialect.ask_usage. Adds one key and leaves every other byte as the client wrote it."""
        after_brace = body.index(b"{") + 1
        return body[:after_brace] + _ASKING_FOR_USAGE + body[after_brace:]

    def ends_with_done(self, path: str) -> bool:
        """See Dialect.ends_with_done."""
        return path.endswith(_STREAMS_WITH_DONE)

    def read_event(self, data: bytes) -> EventFacts:
        """See Dialect.read_event.

        Text inside JSON cannot hold an unescaped quote, so the absence of these keys is certain; their
        presence only means that the event has to be parsed.
        """
        if data == _DONE:
            return _DONE_FACTS
        if _NOT_PLAIN.search(data) is None:
            return PLAIN_TOKENS
        document = _parse(data)
        return _SILENT if document is None else self._read_document(document)

    def _read_document(self, document: dict[str, Any]) -> EventFacts:
        error = document.get("error")
        if error is not None:
            return EventFacts(error=True, refused=self.is_refusal_error(error))
        choices = document.get("choices")
        if isinstance(choices, list):
            usage = _usage_in(document)
            return EventFacts(
                has_tokens=any(_has_output(choice) for choice in choices),
                usage=usage,
                usage_only=not choices and usage is not None,
            )
        kind = _text(document.get("type"))
        has_tokens = kind.endswith("delta") and "delta" in document
        return EventFacts(has_tokens=has_tokens, usage=_find_usage(document))

    def read_reply(self, body: bytes) -> Usage | None:
        """See Dialect.read_reply.

        Reads the last usage object only: the rest of a reply may be megabytes of embeddings. Text inside JSON
        cannot hold its unescaped name.
        """
        start = body.rfind(_USAGE_KEY)
        found = _USAGE.match(body, start) if start >= 0 else None
        usage = None if found is None else _parse(found[1])
        return None if usage is None else _usage(usage)

    def is_refusal(self, status: int) -> bool:
        """See Dialect.is_refusal."""
        return status == 503

    def is_refusal_error(self, error: object) -> bool:
        """Tell whether an error object in an event says that the engine's queue is full."""
        return isinstance(error, dict) and error.get("code") in (503, "503")


def _parse(data: bytes) -> dict[str, Any] | None:
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return document if isinstance(document, dict) else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _has_output(choice: object) -> bool:
    """Tell whether a choice of a chunk carries output: not the first one, which only names the role."""
    if not isinstance(choice, dict):
        return False
    if choice.get("text") or choice.get("finish_reason"):
        return True
    delta = choice.get("delta")
    return isinstance(delta, dict) and any(delta.get(key) for key in _TEXT_KEYS)


def _find_usage(document: dict[str, Any]) -> Usage | None:
    """Return the usage report: at the top, or in the object that responses and messages wrap it in."""
    for key in _USAGE_HOLDERS:
        holder = document if key is None else document.get(key)
        usage = _usage_in(holder) if isinstance(holder, dict) else None
        if usage is not None:
            return usage
    return None


def _usage_in(holder: dict[str, Any]) -> Usage | None:
    usage = holder.get("usage")
    return _usage(usage) if isinstance(usage, dict) else None


def _usage(usage: dict[str, Any]) -> Usage:
    return Usage(
        _first_count(usage, "prompt_tokens", "input_tokens"),
        _first_count(usage, "completion_tokens", "output_tokens"),
    )


def _first_count(holder: dict[str, Any], *keys: str) -> int | None:
    """Return the first of ``keys`` whose value is a count, at most TOKENS_MAX; None if none is."""
    for key in keys:
        value = holder.get(key)
        if type(value) is int and value >= 0:
            return min(value, TOKENS_MAX)
    return None


def _form_model(body: bytes) -> str:
    """Return the ``model`` field of a form (audio uploads name it there), "" without one."""
    for part in (body[:_FORM_BYTES_MAX], body[-_FORM_BYTES_MAX:]):
        found = _FORM_MODEL.search(part)
        if found is not None:
            return found[1].decode("utf-8", "replace").strip()
    return ""
