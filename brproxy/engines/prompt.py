"""The size of a prompt, read from a JSON document of any of the OpenAI-like APIs. Pure, and never raises.

Texts count by their UTF-8 bytes. Images, audio and other data in a prompt are not text and count nothing
here: what they cost in KV tokens depends on the model, and the engine's usage report corrects it.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, NamedTuple

import orjson

# Where prompts are, in /v1/completions, chat, responses, messages, embeddings, rerank, score and tokenize.
_PROMPT_KEYS = frozenset(
    {
        "prompt",
        "messages",
        "input",
        "instructions",
        "system",
        "tools",
        "query",
        "documents",
        "text_1",
        "text_2",
    }
)
# Inside a prompt: what is no text of the conversation.
_NOT_TEXT = frozenset(
    {"image_url", "input_audio", "video_url", "audio_url", "image", "audio", "source", "type"}
)


class PromptSize(NamedTuple):
    """``tokens``: token ids, exact. ``text_bytes``: UTF-8 bytes of the rest. ``prompts``: their number."""

    tokens: int
    text_bytes: int
    prompts: int


def prompt_size(document: dict[str, Any]) -> PromptSize:
    """Return the size of everything in ``document`` that the model reads."""
    tokens = text_bytes = 0
    prompts = 1
    for key, value in document.items():
        if key not in _PROMPT_KEYS or value is None:
            continue
        more_tokens, more_bytes = _measure(value)
        tokens += more_tokens
        text_bytes += more_bytes
        if key == "prompt" and isinstance(value, list) and value and not _is_token(value[0]):
            prompts = len(value)
    return PromptSize(tokens, text_bytes, prompts)


def prompt_hashes(document: dict[str, Any]) -> tuple[int | None, int | None]:
    """Return stable 63-bit hashes of the whole prompt and of its beginning; None without a prompt.

    The beginning is all messages but the last, or the first quarter of a single text: what requests made from
    one template have in common.
    """
    for key in ("messages", "prompt", "input"):
        prompt = document.get(key)
        if not isinstance(prompt, str | list) or not prompt:
            continue
        all_but_last = key == "messages" and len(prompt) > 1
        beginning = prompt[:-1] if all_but_last else prompt[: max(1, len(prompt) // 4)]
        try:
            return _hash(prompt), _hash(beginning)
        except orjson.JSONEncodeError:
            # Nested more deeply than the encoder goes: nothing that comes again.
            return None, None
    return None, None


def _hash(value: object) -> int:
    digest = blake2b(orjson.dumps(value), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _measure(value: object) -> tuple[int, int]:
    # A stack and not recursion: a request may nest as deeply as the JSON parser allows.
    tokens = text_bytes = 0
    stack: list[Any] = [value]
    while stack:
        item = stack.pop()
        # JSON has no subclasses of these; asking for the exact type is what makes a long chat cheap.
        kind = type(item)
        if kind is str:
            text_bytes += len(item) if item.isascii() else _utf8_bytes(item)
        elif kind is dict:
            for key, part in item.items():
                if key in _NOT_TEXT:
                    continue
                # Most of what a chat holds: spare it the way over the stack.
                if type(part) is str and part.isascii():
                    text_bytes += len(part)
                else:
                    stack.append(part)
        elif kind is list:
            if item and _is_token(item[0]):
                tokens += len(item)
            else:
                stack += item
    return tokens, text_bytes


def _utf8_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _is_token(value: object) -> bool:
    return type(value) is int
