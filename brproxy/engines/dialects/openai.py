"""openai: the OpenAI API as any compatible server speaks it; the engines' dialects build on it."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import orjson

from brproxy.engines.counts import first_count
from brproxy.engines.dialect import (
    PLAIN_TOKENS,
    Dialect,
    EventFacts,
    RequestFacts,
    Usage,
    register_dialect,
)
from brproxy.engines.paths import path_kind
from brproxy.engines.request import read_request
from brproxy.engines.rewrite import insert_member
from brproxy.engines.sessions import SessionAsk
from brproxy.types import SEQUENCES_MAX, TOKENS_MAX

_DONE = b"[DONE]"
_DONE_FACTS = EventFacts(done=True)
_SILENT = EventFacts()
# What choices say, by whether they have tokens, finish, and abort: to make it takes as long as to find out.
_OF_CHOICES = {
    (has_tokens, finishes, aborts): EventFacts(has_tokens=has_tokens, finishes=finishes, aborts=aborts)
    for has_tokens in (False, True)
    for finishes in (False, True)
    for aborts in (False, True)
}
_ASKING_FOR_USAGE = b'"stream_options":{"include_usage":true}'
_TEXT_KEYS = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")
_USAGE_KEY = b'"usage"'
# Possessive: a reply that ends in the middle must not be tried in every possible way.
_USAGE = re.compile(rb'"usage"\s*:\s*(\{(?:[^{}]++|\{[^{}]*+\})*+\})')
# Up to 20 digits: any that 64 bits hold.
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens"\s*:\s*(\d{1,20})\b(?![.eE])')
_PROMPT_TOKENS = re.compile(rb'"prompt_tokens"\s*:\s*(\d{1,20})\b(?![.eE])')
# Of a reply of the responses API; what it holds has ids of other forms.
_RESPONSE_ID = re.compile(rb'"id"\s*:\s*"(resp_[!-!#-\[\]-~]{1,256})"')
_ID_BEFORE_BYTE = 4096
# vLLM's and SGLang's, of sequences that were ended by request, or as the engine stops.
_ABORT = "abort"
_META_KEY = b'"meta_info"'
_CACHED_KEYS = ("cache_read_input_tokens", "cache_creation_input_tokens")
_DETAILS_KEYS = ("prompt_tokens_details", "input_tokens_details")
_CACHED_KEYS_OF_ALL = ("cached_tokens", "cache_read_input_tokens")
_CACHED = frozenset({*_DETAILS_KEYS, *_CACHED_KEYS_OF_ALL})
_ERROR_BYTES_MAX = 1 << 16
_ERROR_KEYS = frozenset({"error", "type"})
"""An event that is an error, or holds one, has one of these."""
_USAGE_HOLDERS = (None, "response", "message")
# Events of the newer APIs name their type, and most of those carry no output.
_NOT_PLAIN = re.compile(rb'"(?:error"|type"|role":"|usage"(?!:null)|meta_info"|finish_reason": ?")')


@register_dialect("openai")
class OpenAIDialect(Dialect):
    """Chat and text completions in full; of every other API the prompt, the model and the usage report."""

    HEALTH_PATH: ClassVar[str] = "/v1/models"

    def read_request(
        self,
        path: str,
        method: str,
        content_type: str,
        body: bytes,
        *,
        hashes: bool = False,
        session: SessionAsk | None = None,
    ) -> RequestFacts:
        """See Dialect.read_request."""
        return read_request(path, method, content_type, body, hashes=hashes, session=session)

    def ask_usage(self, body: bytes) -> bytes:
        """See Dialect.ask_usage. Adds one key and leaves every other byte as the client wrote it."""
        return insert_member(body, _ASKING_FOR_USAGE)

    def ends_with_done(self, path: str) -> bool:
        """See Dialect.ends_with_done."""
        return path_kind(path).ends_with_done

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
        error = None if _ERROR_KEYS.isdisjoint(document) else _error_in(document)
        if error is not None:
            return EventFacts(
                error=True, refused=self.is_refusal_error(error), died=self.is_death_error(error)
            )
        choices = document.get("choices")
        if isinstance(choices, list):
            usage = _usage_in(document)
            has_tokens = finishes = aborts = False
            for choice in choices:
                has_tokens = has_tokens or _has_output(choice)
                reason = choice.get("finish_reason") if type(choice) is dict else None
                finishes = finishes or reason is not None
                aborts = aborts or reason == _ABORT
            if usage is None:
                return _OF_CHOICES[has_tokens, finishes, aborts]
            return EventFacts(
                has_tokens=has_tokens,
                usage=usage,
                usage_only=not choices,
                finishes=finishes,
                aborts=aborts,
                sequence=_sequence(choices[0]) if choices else None,
            )
        meta = document.get("meta_info")
        if isinstance(meta, dict):
            return self._read_native(document, meta)
        kind = _text(document.get("type"))
        has_tokens = kind.endswith("delta") and "delta" in document
        answer_id = _answer_id(document) if kind == "response.created" else ""
        return EventFacts(has_tokens=has_tokens, usage=_find_usage(document), answer_id=answer_id)

    def _read_native(self, document: dict[str, Any], meta: dict[str, Any]) -> EventFacts:
        """Return what an event of SGLang's own API says: each holds its sequence from the beginning."""
        finish = meta.get("finish_reason")
        if isinstance(finish, dict) and finish.get("type") == "abort" and "status_code" in finish:
            error = {"code": finish["status_code"], "message": finish.get("message")}
            return EventFacts(error=True, refused=self.is_refusal_error(error))
        usage = _usage(meta)
        return EventFacts(
            has_tokens=bool(usage.completion_tokens),
            usage=usage,
            finishes=finish is not None,
            sequence=_sequence(document),
        )

    def read_reply(self, body: bytes) -> Usage | None:
        """See Dialect.read_reply.

        Reads the last usage object only: the rest of a reply may be megabytes of embeddings. Text inside JSON
        cannot hold its unescaped name. SGLang's own API counts each sequence for itself.
        """
        start = body.rfind(_USAGE_KEY)
        if start < 0:
            return _meta_usage(body) if _META_KEY in body else None
        # Nearly every report holds no other object: its end is found at a tenth of what the pattern takes.
        opens = start + len(_USAGE_KEY) + 1
        end = body.find(b"}", opens) + 1
        if body.startswith(b":{", opens - 1) and body.find(b"{", opens + 1, end) < 0:
            usage = _parse(body[opens:end])
        else:
            found = _USAGE.match(body, start)
            usage = None if found is None else _parse(found[1])
        return None if usage is None else _usage(usage)

    def read_answer_id(self, body: bytes) -> str:
        """See Dialect.read_answer_id. Responses begin with their id."""
        found = _RESPONSE_ID.search(body, 0, _ID_BEFORE_BYTE)
        return "" if found is None else found[1].decode()

    def is_refusal(self, status: int) -> bool:
        """See Dialect.is_refusal."""
        return status == 503

    def is_refusal_error(self, error: object) -> bool:
        """Tell whether an error object in an event says that the engine's queue is full."""
        return isinstance(error, dict) and error.get("code") in (503, "503")

    def is_death(self, status: int, body: bytes) -> bool:
        """See Dialect.is_death."""
        if not self.may_tell_death(status) or len(body) > _ERROR_BYTES_MAX:
            return False
        document = _parse(body)
        return document is not None and self.is_death_error(document.get("error", document))

    def is_death_error(self, error: object) -> bool:
        """Tell whether an error object says that the engine is dead; unknown of any server."""
        return False


def _parse(data: bytes) -> dict[str, Any] | None:
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return document if isinstance(document, dict) else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _answer_id(document: dict[str, Any]) -> str:
    response = document.get("response")
    return _text(response.get("id")) if isinstance(response, dict) else ""


def _has_output(choice: object) -> bool:
    """Tell whether a choice of a chunk carries output: not the first one, which only names the role."""
    if not isinstance(choice, dict):
        return False
    if choice.get("text") or choice.get("finish_reason") or choice.get("token_ids"):
        return True
    delta = choice.get("delta")
    return isinstance(delta, dict) and any(map(delta.get, _TEXT_KEYS))


def _sequence(holder: object) -> int:
    """Return the number of the sequence that a choice is about."""
    index = first_count(holder, ("index",)) if isinstance(holder, dict) else None
    return min(index or 0, SEQUENCES_MAX)


def _error_in(document: dict[str, Any]) -> object:
    """Return the error that an event is or holds, None without one."""
    error = document.get("error")
    if error is not None:
        return error
    kind = document.get("type")
    if kind == "error":
        return document
    response = document.get("response")
    if kind == "response.failed" and isinstance(response, dict):
        return response.get("error") or document
    return None


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
    prompt_tokens, completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
    # Nearly every report, without a call for each number.
    if (
        type(prompt_tokens) is int
        and type(completion_tokens) is int
        and 0 <= prompt_tokens <= TOKENS_MAX
        and 0 <= completion_tokens <= TOKENS_MAX
    ):
        cached_tokens = None if _CACHED.isdisjoint(usage) else _cached_tokens(usage)
        return Usage(prompt_tokens, completion_tokens, cached_tokens)
    prompt_tokens = first_count(usage, ("prompt_tokens",))
    if prompt_tokens is None:
        prompt_tokens = first_count(usage, ("input_tokens",))
        if prompt_tokens is not None:
            # Anthropic's API counts what its cache held apart.
            beside = sum(first_count(usage, (key,)) or 0 for key in _CACHED_KEYS)
            prompt_tokens = min(prompt_tokens + beside, TOKENS_MAX)
    completion_tokens = first_count(usage, ("completion_tokens", "output_tokens"))
    return Usage(prompt_tokens, completion_tokens, _cached_tokens(usage))


def _cached_tokens(usage: dict[str, Any]) -> int | None:
    """Return how much of the prompt was cached: in an object of details, or at the top."""
    first, second = _DETAILS_KEYS
    details = usage.get(first) or usage.get(second)
    if isinstance(details, dict):
        return first_count(details, ("cached_tokens",))
    # SGLang's own API, and Anthropic's.
    return first_count(usage, _CACHED_KEYS_OF_ALL)


def _meta_usage(body: bytes) -> Usage | None:
    """Return the usage in a reply of SGLang's own API: one object, or one for each sequence.

    Of several only the output is told: whether they are of one prompt or of many is not said.
    """
    outputs = _COMPLETION_TOKENS.findall(body)
    if not outputs:
        return None
    prompts = _PROMPT_TOKENS.findall(body)
    return Usage(
        min(int(prompts[0]), TOKENS_MAX) if len(prompts) == 1 else None,
        min(sum(int(output) for output in outputs[:SEQUENCES_MAX]), TOKENS_MAX),
    )
