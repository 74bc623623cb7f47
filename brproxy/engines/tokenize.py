"""What engines are asked to have the size of a prompt: their ``/tokenize``. Pure, and never raises.

vLLM's takes one text or the messages of a chat, to which it applies the model's template
(``entrypoints/serve/tokenize`` of 0.33); so does SGLang's, which takes them as a chat completion
(``srt/entrypoints/openai/serving_tokenize.py`` of 0.5.23). Members that change the prompt and are unknown
there would make another prompt of it: requests with any of them are not asked about, nor are lists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from typing import Final

from brproxy.engines.edits import JsonObject, read_object
from brproxy.types import TOKENS_MAX

TOKENIZE_PATH: Final = "/tokenize"

_COUNT: Final = re.compile(rb'"count"\s*+:\s*+(\d{1,20})\s*+[,}]')
_NULL: Final = b"null"

_VLLM_CHAT: Final = (
    *("model", "messages", "tools", "add_generation_prompt", "continue_final_message"),
    *("add_special_tokens", "chat_template", "chat_template_kwargs"),
)
_UNKNOWN_TO_VLLM: Final[Mapping[str, frozenset[bytes]]] = {
    "documents": frozenset(),
    "reasoning_effort": frozenset(),
    "response_format": frozenset({b'{"type":"text"}', b'{"type": "text"}'}),
    "tool_choice": frozenset({b'"auto"'}),
}
"""Members that its templates may show and its /tokenize does not know, and what makes no difference."""

_NOT_OF_A_CHAT: Final = ("stream", "stream_options", "prompt", "add_generation_prompt", "add_special_tokens")
"""What makes SGLang's do something else than a chat completion does."""


class Asked(Enum):
    """Whose ``/tokenize`` is asked."""

    VLLM = "vllm"
    SGLANG = "sglang"


def asks_prompts_of(path: str) -> bool:
    """Tell whether requests of ``path`` have prompts that an engine can be asked about."""
    return path.endswith(("/completions", "/generate"))


def tokenize_body(path: str, body: bytes, engine: Asked) -> bytes | None:
    """Return what an engine is asked about a client's ``body``; None where it would count another prompt."""
    document = read_object(body)
    if document is None or not asks_prompts_of(path):
        return None
    if path.endswith("/chat/completions"):
        return (_vllm_chat if engine is Asked.VLLM else _sglang_chat)(document)
    prompt = document.value("text" if path.endswith("/generate") else "prompt")
    if prompt is None or prompt[:1] != b'"' or not _is_null(document.value("suffix")):
        return None
    names = ("model", "add_special_tokens")
    return _written({"prompt": prompt} | {name: document.value(name) for name in names})


def _vllm_chat(document: JsonObject) -> bytes | None:
    for name, harmless in _UNKNOWN_TO_VLLM.items():
        value = document.value(name)
        if not _is_null(value) and value not in harmless:
            return None
    if _is_null(document.value("messages")):
        return None
    return _written({name: document.value(name) for name in _VLLM_CHAT})


def _sglang_chat(document: JsonObject) -> bytes | None:
    return None if _is_null(document.value("messages")) else document.edited({}, _NOT_OF_A_CHAT)


def _is_null(value: bytes | None) -> bool:
    return value is None or value == _NULL


def _written(members: Mapping[str, bytes | None]) -> bytes:
    known = ((name, value) for name, value in members.items() if value is not None and value != _NULL)
    return b"{%b}" % b",".join(b'"%b":%b' % (name.encode(), value) for name, value in known)


def read_tokenized(body: bytes) -> int | None:
    """Return the count of an answer (tokens, at most TOKENS_MAX), None without one.

    The ids beside it, which may be a million, are not looked at.
    """
    found = _COUNT.search(body)
    return None if found is None else min(int(found[1]), TOKENS_MAX)
