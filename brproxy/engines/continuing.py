"""A completion that goes on elsewhere: what another engine is asked, and how its parts are one answer. Pure.

The text so far becomes a part of the prompt. That is exact only where nothing else depends on where the
prompt ends, so a request must consist of members that are known not to: one text or one list of token ids,
one sequence, an explicit limit of tokens; no seed, penalties, stop strings, grammars or probabilities. And it
is exact only while it is known how many tokens the text is, so that what is left of the limit is known: the
engine is asked to report usage as it goes. Where prompts are token ids the answer must have them as well.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import orjson

from brproxy.engines.body import parsed
from brproxy.engines.edits import JsonObject, read_object

_LIMIT_DIGITS_MAX: Final = 10
_ID_BYTES: Final = 8
_NULL: Final = b"null"
_RUNNING_USAGE: Final = {"include_usage": b"true", "continuous_usage_stats": b"true"}

_FREE: Final = frozenset(
    {"model", "prompt", "max_tokens", "min_tokens", "stream", "stream_options", "user", "priority"}
    | {"temperature", "top_p", "top_k", "min_p", "ignore_eos", "stop_token_ids", "logit_bias"}
    | {"skip_special_tokens", "spaces_between_special_tokens", "add_special_tokens"}
    | {"request_id", "session_id", "cache_salt"}
)
"""Members that mean the same for each part."""

_ZERO: Final = frozenset({b"0", b"0.0"})
_ONE: Final = frozenset({b"1", b"1.0"})
_NEUTRAL: Final = {
    "n": _ONE,
    "best_of": _ONE,
    "echo": frozenset({b"false"}),
    "suffix": frozenset({b'""'}),
    "stop": frozenset({b"[]", b'""'}),
    "use_beam_search": frozenset({b"false"}),
    "frequency_penalty": _ZERO,
    "presence_penalty": _ZERO,
    "repetition_penalty": _ONE,
    "length_penalty": _ONE,
}
"""What members may say that else would mean something else for each part; all may be null."""


class _Asked(NamedTuple):
    """What a client asked for. ``max_tokens`` None: as many as there is room for."""

    document: JsonObject
    prompt: bytes
    is_ids: bool
    max_tokens: int | None
    min_tokens: int
    options: bytes
    wants_usage: bool
    wants_running_usage: bool


class Completion:
    """One completion in parts, each by another engine. ``text_bytes_max``: beyond it does not go on (bytes).

    What streams must go through ``take``, in order; ``body`` is what the next engine gets. ``wants_usage``:
    the client gets the event that reports it.
    """

    def __init__(self, asked: _Asked, *, streams: bool, text_bytes_max: int) -> None:
        self._asked = asked
        self._streams = streams
        self._bytes_left = text_bytes_max
        self._text: list[str] = []
        self._ids: list[int] = []
        # Of the parts that have ended, of this one up to the last text, and whether that is what it says.
        self._tokens_before = self._tokens = 0
        self._is_counted = self._is_exact = True
        self._is_finished = False
        self._prompt_tokens: int | None = None
        self._names: dict[str, bytes] = {}
        self._parts = 0

    @property
    def wants_usage(self) -> bool:
        """Whether the client gets the event that reports usage."""
        return self._asked.wants_usage

    @property
    def is_continued(self) -> bool:
        """Whether a part has ended, and another one goes on from there."""
        return self._parts > 0

    @property
    def prompt_tokens(self) -> int | None:
        """What the client's own prompt is (tokens), None before an engine has told."""
        return self._prompt_tokens

    @property
    def tokens(self) -> int:
        """What has been generated, in all parts (tokens)."""
        return self._tokens_before + self._tokens

    @property
    def tokens_left(self) -> int | None:
        """What may still be generated (tokens), None where only the engine's room limits it."""
        limit = self._asked.max_tokens
        return None if limit is None else limit - self.tokens

    @property
    def can_go_on(self) -> bool:
        """Whether another engine can go on from here as this one would have."""
        left = self.tokens_left
        return self._is_exact and self._is_counted and not self._is_finished and (left is None or left > 0)

    def body(self) -> bytes:
        """Return the request for what is left: at first the client's own, but for usage."""
        asked, values = self._asked, {}
        if self._streams:
            values["stream_options"] = asked.options
        if self._parts:
            values["prompt"] = self._prompt()
            if asked.max_tokens is not None:
                values["max_tokens"] = b"%d" % (asked.max_tokens - self._tokens_before)
            if asked.min_tokens:
                values["min_tokens"] = b"%d" % max(asked.min_tokens - self._tokens_before, 0)
        return asked.document.edited(values)

    def lose(self) -> None:
        """Note that some of it has not been seen: it does not go on."""
        self._is_exact = False

    def go_on(self) -> None:
        """Begin the next part."""
        self._tokens_before += self._tokens
        self._tokens = 0
        self._parts += 1

    def take(self, data: bytes, *, given_up: bool = False) -> bytes | None:
        """Return what the client gets of an event's data, None for nothing. Never raises.

        ``given_up``: it ends the part, and the engine has not finished. A reply counts as an event.
        """
        document = parsed(data)
        if type(document) is not dict:
            return data
        usage = document.get("usage")
        usage = usage if type(usage) is dict else None
        choices = document.get("choices")
        if type(choices) is not list:
            # An error: nobody goes on from there.
            self._is_finished = True
            return data
        if len(choices) > 1:
            self._is_exact = False
            return data
        self._note(choices[0] if choices else None, usage, given_up=given_up)
        if choices and given_up and not self._text_of(choices[0]):
            return None
        return self._edited(data, usage, is_last=not choices, given_up=given_up)

    def joined(self, body: bytes) -> bytes:
        """Return the reply to the last part as one to all of them."""
        document, reply = read_object(body), parsed(body)
        choice = None if document is None else _only(document)
        if not self._parts or document is None or choice is None:
            return body
        of_part = reply["choices"][0]
        text = self._text_of(of_part)
        values = {"text": orjson.dumps("".join(self._text) + text)}
        if self._asked.is_ids and type(of_part.get("token_ids")) is list:
            values["token_ids"] = orjson.dumps(self._ids + of_part["token_ids"])
            values["prompt_token_ids"] = self._asked.prompt
        changes = {**self._names, "choices": b"[%b]" % choice.edited(values)}
        if type(reply.get("usage")) is dict:
            changes["usage"] = self._whole(document.value("usage") or b"", reply["usage"])
        return document.edited(changes)

    def _note(self, choice: object, usage: dict[str, Any] | None, *, given_up: bool) -> None:
        """Take in what an event with this choice says, None where it has none."""
        reported = None if usage is None else usage.get("completion_tokens")
        if usage is not None and self._prompt_tokens is None and not self._parts:
            prompt_tokens = usage.get("prompt_tokens")
            self._prompt_tokens = prompt_tokens if type(prompt_tokens) is int else None
        if type(choice) is not dict:
            self._count_late(reported)
            return
        text, ids = self._text_of(choice), choice.get("token_ids")
        self._is_exact = self._is_exact and type(choice.get("text")) is str
        self._is_finished = self._is_finished or (choice.get("finish_reason") is not None and not given_up)
        if self._asked.is_ids:
            self._note_ids(ids if type(ids) is list else [], text)
        elif text:
            self._is_counted = type(reported) is int
            self._tokens = reported if type(reported) is int else self._tokens
            self._keep(text, len(text.encode("utf-8", "replace")))
        if given_up:
            self._count_late(reported)

    def _note_ids(self, ids: list[Any], text: str) -> None:
        if ids or text:
            # Ids whose text is still to come would be the next engine's prompt, and their text nobody's.
            self._is_counted = bool(ids and text)
        self._is_exact = self._is_exact and all(type(token) is int for token in ids)
        self._tokens += len(ids)
        self._ids += ids
        self._keep(text, len(ids) * _ID_BYTES)

    def _count_late(self, reported: object) -> None:
        """Take a count that comes behind all of a part's text."""
        if not self._is_counted and type(reported) is int and not self._asked.is_ids:
            self._tokens, self._is_counted = reported, True

    def _keep(self, text: str, size: int) -> None:
        self._bytes_left -= size
        self._is_exact = self._is_exact and self._bytes_left >= 0 and _is_whole(text)
        if self._is_exact:
            self._text.append(text)
        else:
            self._text.clear()
            self._ids.clear()

    def _edited(self, data: bytes, usage: dict[str, Any] | None, *, is_last: bool, given_up: bool) -> bytes:
        document = read_object(data)
        if document is None:
            return data
        # What the first event of all was named by.
        values, without = dict(self._names) if self._parts else {}, []
        self._names = self._names or _names_of(document)
        choice = None if is_last else _only(document)
        if choice is not None:
            ending = {"finish_reason": _NULL, "stop_reason": _NULL} if given_up else {}
            if self._parts and choice.value("prompt_token_ids") not in (None, _NULL):
                ending["prompt_token_ids"] = _NULL
            if ending:
                values["choices"] = b"[%b]" % choice.edited(ending)
        if usage is not None and self._streams:
            if self._asked.wants_running_usage or is_last:
                if self._parts:
                    values["usage"] = self._whole(document.value("usage") or b"", usage)
            elif self._asked.wants_usage:
                values["usage"] = _NULL
            else:
                without.append("usage")
        return document.edited(values, without) if values or without else data

    def _whole(self, written: bytes, usage: dict[str, Any]) -> bytes:
        """Return a part's report of usage as one of all parts."""
        document = read_object(written)
        completion_tokens, prompt_tokens = usage.get("completion_tokens"), self._prompt_tokens
        if document is None or type(completion_tokens) is not int:
            return written
        if prompt_tokens is None:
            of_part = usage.get("prompt_tokens")
            prompt_tokens = max(of_part - self._tokens_before, 0) if type(of_part) is int else 0
        tokens = self._tokens_before + completion_tokens
        values = {
            "prompt_tokens": b"%d" % prompt_tokens,
            "total_tokens": b"%d" % (prompt_tokens + tokens),
            "completion_tokens": b"%d" % tokens,
        }
        return document.edited(values)

    def _prompt(self) -> bytes:
        prompt = self._asked.prompt
        more = orjson.dumps(self._ids if self._asked.is_ids else "".join(self._text))
        if self._asked.is_ids:
            return prompt if not self._ids else prompt[:-1] + b"," + more[1:]
        return prompt[:-1] + more[1:]

    @staticmethod
    def _text_of(choice: object) -> str:
        text = choice.get("text") if type(choice) is dict else None
        return text if type(text) is str else ""


def read_completion(path: str, body: bytes, *, streams: bool, text_bytes_max: int) -> Completion | None:
    """Return the completion that a request asks for, None for what cannot go on elsewhere. Never raises."""
    is_text = path.endswith("/completions") and not path.endswith("/chat/completions")
    document = read_object(body) if is_text else None
    if document is None or not all(_is_known(document, name) for name in document.names):
        return None
    prompt, limit = document.value("prompt") or b"", document.value("max_tokens")
    is_ids = prompt[:1] == b"[" and prompt[1:-1].strip()[:1].isdigit()
    minimum = document.value("min_tokens") or b"0"
    options = _options(document.value("stream_options"))
    is_limited = limit != _NULL
    if not (
        (is_ids or prompt[:1] == b'"')
        and (not is_limited or _is_count(limit))
        and (minimum == _NULL or _is_count(minimum))
        and options is not None
        and is_ids == (document.value("return_token_ids") == b"true")
    ):
        return None
    asked = _Asked(
        document,
        prompt,
        is_ids,
        int(limit or b"0") if is_limited else None,
        0 if minimum == _NULL else int(minimum),
        options.edited(_RUNNING_USAGE),
        wants_usage=options.value("include_usage") == b"true",
        wants_running_usage={options.value(name) for name in _RUNNING_USAGE} == {b"true"},
    )
    return Completion(asked, streams=streams, text_bytes_max=text_bytes_max)


def _is_known(document: JsonObject, name: str) -> bool:
    value = document.value(name)
    # Only token ids need the answer's.
    is_free = name in _FREE or (name == "return_token_ids" and value in (b"true", b"false"))
    return is_free or value == _NULL or value in _NEUTRAL.get(name, ())


def _is_count(value: bytes | None) -> bool:
    return value is not None and value.isdigit() and len(value) <= _LIMIT_DIGITS_MAX


def _is_whole(text: str) -> bool:
    """Tell whether a text can be written as UTF-8: no half of a character that is escaped as two."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _options(value: bytes | None) -> JsonObject | None:
    return read_object(b"{}" if value in (None, _NULL) else value or b"")


def _names_of(document: JsonObject) -> dict[str, bytes]:
    """Return what the answer is known by, which stays the same for all parts."""
    named = {name: document.value(name) for name in ("id", "created")}
    return {name: value for name, value in named.items() if value is not None}


def _only(document: JsonObject) -> JsonObject | None:
    """Return the one choice of an event."""
    choices = (document.value("choices") or b"").strip()
    return read_object(choices[1:-1].strip())
