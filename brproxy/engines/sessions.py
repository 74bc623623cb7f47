"""Which session a request belongs to: the keys that it may be remembered by. Pure, and never raises.

The client's own name goes first, in vLLM's order: the body's ``session_id``, the header ``X-Session-ID``,
``vllm_xargs.session_id``. Without one the answer that a request goes on from is its session
(``previous_response_id``), and where that is asked for its messages: a conversation is known by what it was
before, every message of it, so that prompts that merely begin alike are not one session.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import orjson

KEYS_MAX = 32
"""Beginnings of a conversation that are looked for: one turn adds two messages, or more with tools."""

_MESSAGE_KEYS = ("messages", "input")
_NAMED, _ANSWER, _MESSAGES = b"named", b"answer", b"messages"


class SessionAsk(NamedTuple):
    """What is asked for. ``header``: what X-Session-ID says; ``messages``: know conversations by those."""

    header: str = ""
    messages: bool = False


class SessionFacts(NamedTuple):
    """``keys`` as in PendingRequest. ``goes_on``: what came before is of the prompt, but not in the body.

    ``is_named_by_answer``: the next request will name the answer's id.
    """

    keys: tuple[int, ...] = ()
    goes_on: bool = False
    is_named_by_answer: bool = False


NO_SESSION = SessionFacts()


def session_facts(
    document: Mapping[str, Any], model: str, ask: SessionAsk, *, names_answers: bool, hashable: bool
) -> SessionFacts:
    """Return what a request says of its session.

    ``names_answers``: requests of this path may go on from an answer. ``hashable``: the body is short enough
    for its messages to be looked at.
    """
    name = document.get("session_id") or ask.header or _in_arguments(document)
    if name and type(name) is str:
        return SessionFacts((_key(_NAMED, model, name),))
    if names_answers:
        before = document.get("previous_response_id")
        if before and type(before) is str:
            return SessionFacts((answer_key(model, before),), goes_on=True, is_named_by_answer=True)
    keys = _message_keys(document, model) if ask.messages and hashable else ()
    return SessionFacts(keys, is_named_by_answer=names_answers and not keys)


def answer_key(model: str, answer_id: str) -> int:
    """Return the key of the session that goes on from an answer."""
    return _key(_ANSWER, model, answer_id)


def _in_arguments(document: Mapping[str, Any]) -> object:
    arguments = document.get("vllm_xargs")
    return arguments.get("session_id") if type(arguments) is dict else None


def _message_keys(document: Mapping[str, Any], model: str) -> tuple[int, ...]:
    """Return keys of all messages, of all but the last, and so on."""
    for name in _MESSAGE_KEYS:
        messages = document.get(name)
        if type(messages) is not list or not messages or type(messages[0]) is not dict:
            continue
        hashed = _hash(_MESSAGES, model)
        digests: list[int] = []
        try:
            for message in messages:
                hashed.update(orjson.dumps(message))
                digests.append(_number(hashed))
        except orjson.JSONEncodeError:
            # Nested more deeply than the encoder goes, or no Unicode: nothing that comes again.
            return ()
        return tuple(digests[: -KEYS_MAX - 1 : -1])
    return ()


def _key(kind: bytes, model: str, name: str) -> int:
    hashed = _hash(kind, model)
    # What JSON may hold and UTF-8 may not.
    hashed.update(name.encode("utf-8", "surrogatepass"))
    return _number(hashed)


def _hash(kind: bytes, model: str) -> blake2b:
    # Another model has another cache; lengths keep kinds, models and names apart.
    return blake2b(b"%b %d %b " % (kind, len(model), model.encode("utf-8", "surrogatepass")), digest_size=8)


def _number(hashed: blake2b) -> int:
    return int.from_bytes(hashed.digest())
