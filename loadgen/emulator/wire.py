"""vLLM's wire format, as much of it as a generation needs. Pure: requests in, bytes out.

Source: vllm/entrypoints/openai/protocol.py and serving_chat.py of vLLM 0.33, and streams of a real vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from brproxy.types import InvalidInputError
from loadgen.emulator.handover_wire import HANDLES

LENGTH_HEADER = "X-Loadgen-Output-Tokens"
"""The output length that the client knows and routers must not: how long the answer turns out to be."""

RANK_HEADER = "X-data-parallel-rank"
"""Which of the DP ranks behind a port a request is for."""

OUTPUT_TOKENS_DEFAULT = 128
DONE = b"data: [DONE]\n\n"


class RequestError(InvalidInputError):
    """A request that vLLM would answer with 400; ``param`` names the field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A chat or text completion as the emulated engine sees it."""

    chat: bool
    model: str
    stream: bool
    include_usage: bool
    continuous_usage: bool
    prompt_tokens: int
    output_tokens: int
    length_limited: bool
    handles: Mapping[str, Any] = field(default_factory=dict)
    """Members of the body that are about prefill and decode apart."""
    stop_reason: str | None = None


def error_body(status: int, kind: str, message: str, param: str | None = None) -> bytes:
    """Return an error as vLLM words it."""
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}})


def read_request(body: bytes, *, chat: bool, length_header: str | None) -> GenerationRequest:
    """Read a request; raises RequestError. A token is a whitespace-separated word or a token id."""
    document = _read_object(body)
    if document.get("n", 1) != 1:
        raise RequestError("This emulated engine serves n = 1 only", "n")
    options = document.get("stream_options") or {}
    natural = _natural_length(length_header)
    limit = document.get("max_completion_tokens") or document.get("max_tokens")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise RequestError(f"max_tokens must be at least 1, got {limit!r}", "max_tokens")
    length = natural or limit or OUTPUT_TOKENS_DEFAULT
    length_limited = limit is not None and (natural is None or limit < natural)
    return GenerationRequest(
        chat=chat,
        model=str(document.get("model", "")),
        stream=document.get("stream") is True,
        include_usage=options.get("include_usage") is True,
        continuous_usage=options.get("continuous_usage_stats") is True,
        prompt_tokens=_prompt_tokens(document, chat=chat),
        output_tokens=min(length, limit or length),
        length_limited=length_limited,
        handles={name: document[name] for name in HANDLES if name in document},
    )


def read_prompt(body: bytes) -> int:
    """Return the tokens of what ``/tokenize`` is asked about; raises RequestError."""
    document = _read_object(body)
    return _prompt_tokens(document, chat="messages" in document)


def _read_object(body: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"The body must be JSON: {error}", "body") from error
    if not isinstance(document, dict):
        raise RequestError("The body must be a JSON object", "body")
    return document


def _natural_length(header: str | None) -> int | None:
    if header is None:
        return None
    if not header.isdecimal() or int(header) < 1:
        raise RequestError(f"{LENGTH_HEADER} must be a number of at least 1, got {header!r}", LENGTH_HEADER)
    return int(header)


def _prompt_tokens(document: dict[str, Any], *, chat: bool) -> int:
    if chat:
        messages = document.get("messages")
        if not isinstance(messages, list) or not messages:
            raise RequestError("messages must be a list with at least one message", "messages")
        return sum(_words(message.get("content")) for message in messages if isinstance(message, dict))
    prompt = document.get("prompt")
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return len(prompt)
    if not isinstance(prompt, str):
        raise RequestError("prompt must be a string or a list of token ids", "prompt")
    return _words(prompt)


def _words(content: object) -> int:
    if isinstance(content, str):
        return len(content.split())
    parts = content if isinstance(content, list) else []
    return sum(_words(part.get("text")) for part in parts if isinstance(part, dict))


def words(first: int, last: int) -> str:
    """Return the text of the output tokens ``first`` to ``last``, counted from 1: " 1 2 3 …"."""
    return "".join(f" {number}" for number in range(first, last + 1))


class Answer:
    """Builds the responses of one generation."""

    def __init__(self, request: GenerationRequest, request_id: str, created_s: int) -> None:
        self._request = request
        self._id = ("chatcmpl-" if request.chat else "cmpl-") + request_id
        self._created_s = created_s
        self._object = "chat.completion" if request.chat else "text_completion"
        self._finish_reason = "length" if request.length_limited else "stop"
        self._chunk_head, self._chunk_tail = self.template()

    def template(self, *, last: bool = False) -> tuple[bytes, bytes]:
        """Return what comes before and after the text of a plain chunk: most chunks differ in that only.

        ``last``: of the chunk that also says why the answer ends.
        """
        marker = "\N{OBJECT REPLACEMENT CHARACTER}"
        event = self._event(marker, self._finish_reason if last else None, None)
        head, _, tail = event.partition(marker.encode())
        return head, tail

    def opening(self) -> bytes:
        """Return the first event of a chat stream, which names the role and carries no token."""
        if not self._request.chat:
            return b""
        choice = {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return self._data({"choices": [choice]} | self._running_usage(0))

    def chunk(self, after: int, until: int) -> bytes:
        """Return the event with the tokens after the first ``after`` up to ``until``."""
        text = words(after + 1, until)
        if until >= self._request.output_tokens:
            return self._event(text, self._finish_reason, until)
        if self._request.include_usage and self._request.continuous_usage:
            return self._event(text, None, until)
        return self._chunk_head + text.encode() + self._chunk_tail

    def closing(self, decoded: int) -> bytes:
        """Return what ends the stream: usage if it was asked for, and [DONE]."""
        if not self._request.include_usage:
            return DONE
        return self._data({"choices": [], "usage": self._usage(decoded)}) + DONE

    def complete(self, more: Mapping[str, object] | None = None) -> bytes:
        """Return the whole answer to a request that does not stream, with ``more`` members."""
        text = words(1, self._request.output_tokens)
        content = (
            {"message": {"role": "assistant", "content": text}} if self._request.chat else {"text": text}
        )
        choice = {"index": 0, **content, "logprobs": None, **self._end(self._finish_reason)}
        usage = self._usage(self._request.output_tokens)
        document = {"choices": [choice], "usage": usage, **(more or {})}
        return orjson.dumps(self._document(self._object, document))

    def _event(self, text: str, finish_reason: str | None, decoded: int | None) -> bytes:
        content = {"delta": {"content": text}} if self._request.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, **self._end(finish_reason)}
        usage = {} if decoded is None else self._running_usage(decoded)
        return self._data({"choices": [choice]} | usage)

    def _end(self, finish_reason: str | None) -> dict[str, str | None]:
        """Return why a choice ends; vLLM's reason in words only where there is one."""
        stop_reason = self._request.stop_reason
        if finish_reason is None or stop_reason is None:
            return {"finish_reason": finish_reason}
        return {"finish_reason": finish_reason, "stop_reason": stop_reason}

    def _running_usage(self, decoded: int) -> dict[str, object]:
        asked = self._request.include_usage and self._request.continuous_usage
        return {"usage": self._usage(decoded)} if asked else {}

    def _usage(self, decoded: int) -> dict[str, int]:
        prompt = self._request.prompt_tokens
        return {"prompt_tokens": prompt, "total_tokens": prompt + decoded, "completion_tokens": decoded}

    def _data(self, document: dict[str, object]) -> bytes:
        kind = "chat.completion.chunk" if self._request.chat else "text_completion"
        return b"data: " + orjson.dumps(self._document(kind, document)) + b"\n\n"

    def _document(self, kind: str, document: dict[str, object]) -> dict[str, object]:
        head = {
            "id": self._id,
            "object": kind,
            "created": self._created_s,
            "model": self._request.model,
        }
        return head | document
