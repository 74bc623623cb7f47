"""What SGLang tells of a prompt's own tokens, put from a prefill worker's answer into the decode worker's.

Who prefills has it; who decodes has run no prompt, and its lists in ``meta_info`` are empty, in each event of
a stream as in a reply (``srt/managers/tokenizer_manager.py`` of 0.5.23). SGLang's own router puts the two
together for ``input_token_logprobs``, the prefill worker's first; here all three lists are. Pure.
"""

from __future__ import annotations

from typing import Final

import orjson

from brproxy.engines.body import parsed
from brproxy.engines.edits import read_object

LISTS: Final = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")
_META: Final = "meta_info"
_ABSENT: Final = (None, b"null")
_OFF: Final = (None, b"false", b"null")
_START: Final = "logprob_start_len"
_DIGITS_MAX: Final = 9


def asks_input_logprobs(path: str, body: bytes) -> bool:
    """Tell whether a request is one of SGLang's own API that asks about the prompt's tokens; never raises.

    Without a place to begin at, or with -1, it only asks about the answer's.
    """
    if not path.endswith("/generate"):
        return False
    document = read_object(body)
    return (
        document is not None
        and document.value("return_logprob") not in _OFF
        and document.value(_START) not in (*_ABSENT, b"-1")
    )


class InputLogprobs:
    """What one prefill worker's answer says of its prompts: one, or a list of them. Never raises."""

    def __init__(self, answer: bytes) -> None:
        self._is_batch = _is_list(answer)
        self._of_prompts = [_lists_in(each) for each in (_elements(answer) if self._is_batch else [answer])]

    def into_reply(self, body: bytes) -> bytes:
        """Return a decode worker's reply with them; as it is where they have no place in it."""
        if not self._is_batch:
            return self._into(body, 0)
        replies = _elements(body)
        if len(replies) != len(self._of_prompts):
            return body
        return b"[%b]" % b",".join([self._into(reply, number) for number, reply in enumerate(replies)])

    def into_event(self, data: bytes) -> bytes:
        """Return the data of an event with those of its prompt; as ``into_reply``."""
        document = read_object(data) if self._is_batch else None
        index = document.value("index") if document is not None else None
        number = int(index) if index is not None and index.isdigit() and len(index) <= _DIGITS_MAX else 0
        return self._into(data, number)

    def _into(self, data: bytes, number: int) -> bytes:
        document = read_object(data)
        meta = None if document is None else read_object(document.value(_META) or b"")
        if document is None or meta is None or number >= len(self._of_prompts):
            return data
        lists = {name: _joined(own, meta.value(name)) for name, own in self._of_prompts[number].items()}
        return document.edited({_META: meta.edited(lists)}) if lists else data


def _lists_in(answer: bytes) -> dict[str, bytes]:
    """Return the lists of one prompt as they are written, of those that say anything."""
    document = read_object(answer)
    meta = None if document is None else read_object(document.value(_META) or b"")
    values = {} if meta is None else {name: meta.value(name) for name in LISTS}
    return {
        name: value
        for name, value in values.items()
        if value is not None and _is_list(value) and value[1:-1].strip()
    }


def _joined(own: bytes, rest: bytes | None) -> bytes:
    """Return a list that is not empty with those of ``rest``, if that is a list, behind it."""
    inside = rest[1:-1].strip() if rest is not None and _is_list(rest) else b""
    return b"%b,%b]" % (own[:-1], inside) if inside else own


def _is_list(value: bytes) -> bool:
    return value.lstrip()[:1] == b"["


def _elements(value: bytes) -> list[bytes]:
    """Return what a list holds, each as JSON; nothing of what is none."""
    document = parsed(value)
    return [orjson.dumps(each) for each in document] if type(document) is list else []
