"""The size of a prompt, read from the JSON of any of the engines' APIs. Pure, and never raises.

Texts count by their UTF-8 bytes and what these are of (``text.py``), and text is what is known to be text: in
a message or a part of one the values of certain keys. Images, audio, embeddings and whatever else comes count
nothing: what they cost in KV tokens depends on the model, and the engine's usage report corrects it. A prompt
that holds any of them says nothing of how many tokens its bytes are.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import orjson

from brproxy.engines.text import bytes_of, joined, text_counts
from brproxy.types import NO_TEXT, TextCounts

# Where prompts are, in /v1/completions, chat, responses, messages, embeddings, rerank, score and classify.
_PROMPT_KEYS = frozenset(
    {
        *("prompt", "messages", "input", "instructions", "system", "suffix", "tools", "functions"),
        *("query", "queries", "documents", "items", "text_1", "text_2", "data_1", "data_2"),
    }
)
# And in SGLang's own API, where in others "text" is an option.
_NATIVE_PROMPT_KEYS = _PROMPT_KEYS | {"text", "input_ids", "token_ids"}
# A list of texts there is several prompts.
_SEVERAL = frozenset({"prompt", "text"})
_SHOWN_AS_JSON = frozenset({"tools", "functions"})
# What also makes the prompt, or cuts it short, so that its text is not what the engine counts.
NOT_ONLY_TEXT = frozenset(
    {
        *("prompt_embeds", "input_embeds", "image_embeds", "audio_embeds", "image_data", "audio_data"),
        *("video_data", "multi_modal_data", "mm_data", "features", "images", "mm_processor_kwargs"),
        *("previous_response_id", "conversation", "context", "truncate_prompt_tokens"),
    }
)

# In a message or a part: what is text, or holds parts.
_TEXT_KEYS = frozenset(
    {
        *("content", "text", "role", "name", "reasoning", "reasoning_content", "thinking", "tool_calls"),
        *("function", "function_call", "output", "refusal", "summary", "title", "snippet", "prompt", "query"),
        *("instruction", "description"),
    }
)
# What templates show as JSON.
_JSON_KEYS = frozenset({"arguments", "input", "parameters", "input_schema", "tools"})
# What is not shown.
_LABELS = frozenset(
    {
        *("id", "index", "tool_call_id", "tool_use_id", "call_id", "status", "is_error", "cache_control"),
        *("annotations", "logprobs", "phase", "signature"),
    }
)
_TEXT_TYPES = frozenset(
    {
        *("text", "input_text", "output_text", "summary_text", "reasoning_text", "message", "reasoning"),
        *("function", "function_call", "function_call_output", "tool_use", "tool_result", "thinking"),
        *("refusal", "custom", "custom_tool_call", "custom_tool_call_output"),
    }
)

HASHED_BYTES_MAX = 1 << 20
"""Prompts of longer bodies are not identified: they do not come again, and hashing takes its time."""


class PromptSize(NamedTuple):
    """``tokens``: token ids, exact. ``text``: what the rest is made of. ``prompts``: their number.

    ``is_all``: there is nothing else in the prompt.
    """

    tokens: int = 0
    text: TextCounts = NO_TEXT
    prompts: int = 1
    is_all: bool = True

    @property
    def text_bytes(self) -> int:
        """The length of the text in UTF-8."""
        return bytes_of(self.text)

    def joined(self, other: PromptSize) -> PromptSize:
        """Return the size of both together, in one request."""
        return PromptSize(
            self.tokens + other.tokens,
            joined(self.text, other.text),
            max(self.prompts, other.prompts),
            self.is_all and other.is_all,
        )


def prompt_keys(*, text_is_prompt: bool) -> frozenset[str]:
    """Return the keys of a request that hold its prompt."""
    return _NATIVE_PROMPT_KEYS if text_is_prompt else _PROMPT_KEYS


def prompt_size(
    document: Mapping[str, Any], *, text_is_prompt: bool = False, texts: list[str] | None = None
) -> PromptSize:
    """Return the size of all in ``document`` that the model reads; its texts are put into ``texts``."""
    texts = [] if texts is None else texts
    tokens = messages = 0
    prompts = 1
    is_all = NOT_ONLY_TEXT.isdisjoint(document) or not any(map(document.get, NOT_ONLY_TEXT))
    keys = _NATIVE_PROMPT_KEYS if text_is_prompt else _PROMPT_KEYS
    for key, value in document.items():
        if key not in keys or not value:
            continue
        if key in _SHOWN_AS_JSON:
            texts.append(_shown(value))
            continue
        more_tokens, is_text = _measure(value, texts)
        tokens += more_tokens
        is_all = is_all and is_text
        if type(value) is list:
            if type(value[0]) is dict:
                messages += len(value)
            elif _is_several(key, value):
                prompts = max(prompts, len(value))
    return PromptSize(tokens, text_counts("".join(texts), messages) if texts else NO_TEXT, prompts, is_all)


def _is_several(key: str, value: list[Any]) -> bool:
    """Tell whether a list is one of prompts, each of them generated for, and not of one prompt's parts."""
    kind = type(value[0])
    return kind is list or (kind is str and key in _SEVERAL)


def prompt_hashes(document: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return stable 63-bit hashes of the whole prompt and of its beginning; None without a prompt.

    The beginning is all messages but the last, or the first quarter of a single text: what requests made from
    one template have in common.
    """
    for key in ("messages", "prompt", "input", "text", "input_ids"):
        prompt = document.get(key)
        if not isinstance(prompt, str | list) or not prompt:
            continue
        all_but_last = key == "messages" and len(prompt) > 1
        beginning = prompt[:-1] if all_but_last else prompt[: max(1, len(prompt) // 4)]
        try:
            return _hash(prompt), _hash(beginning)
        except orjson.JSONEncodeError:
            # Nested more deeply than the encoder goes, or no Unicode: nothing that comes again.
            return None, None
    return None, None


def _hash(value: object) -> int:
    digest = blake2b(orjson.dumps(value), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _measure(value: object, texts: list[str]) -> tuple[int, bool]:
    """Add the text in ``value`` to ``texts``; return its token ids, and whether that is all of it."""
    tokens = 0
    is_all = True
    # A stack and not recursion: a request may nest as deeply as the JSON parser allows.
    stack: list[Any] = [value]
    while stack:
        item = stack.pop()
        # JSON has no subclasses of these; asking for the exact type is what makes a long chat cheap.
        kind = type(item)
        if kind is str:
            texts.append(item)
        elif kind is dict:
            for key, part in item.items():
                if key not in _TEXT_KEYS:
                    is_all = _measure_other(key, part, texts) and is_all
                # Most of what a chat holds: spare it the way over the stack.
                elif type(part) is str:
                    texts.append(part)
                else:
                    stack.append(part)
        elif kind is list and item:
            if type(item[0]) is int:
                tokens += len(item)
            else:
                stack += item
    return tokens, is_all


def _measure_other(key: str, part: object, texts: list[str]) -> bool:
    """Add what is no plain text in a message or a part; return whether that is all of it."""
    if key in _JSON_KEYS:
        texts.append(_shown(part))
        return True
    if key == "type":
        return type(part) is str and part in _TEXT_TYPES
    return not part or key in _LABELS


def _shown(value: object) -> str:
    """Return a value that templates show as JSON: tools, and what they are called with."""
    if type(value) is str:
        return value
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        # Nested more deeply than the encoder goes, or no Unicode: no engine shows it either.
        return ""
