"""What a request of any of the engines' APIs says about the load that it will be. Pure, and never raises."""

from __future__ import annotations

from typing import Any

from brproxy.engines.body import JsonBody, read_json
from brproxy.engines.counts import first_count
from brproxy.engines.dialect import RequestFacts
from brproxy.engines.multipart import FormScanner
from brproxy.engines.paths import PathKind, Work, path_kind
from brproxy.engines.prompt import (
    HASHED_BYTES_MAX,
    NOT_ONLY_TEXT,
    PromptSize,
    prompt_hashes,
    prompt_keys,
    prompt_size,
)
from brproxy.engines.rewrite import Member
from brproxy.engines.sessions import NO_SESSION, SessionAsk, SessionFacts, session_facts
from brproxy.engines.spans import member_size
from brproxy.types import NO_TEXT, SEQUENCES_MAX, TOKENS_MAX

# Looking up a member of an enumeration costs a quarter of a microsecond, several times for each request.
_ASKS, _GENERATES, _SCHEDULED = Work.ASKS, Work.GENERATES, Work.SCHEDULED

MODEL_CHARS_MAX = 1024
USER_CHARS_MAX = 256

_LIMIT_KEYS = ("max_completion_tokens", "max_tokens", "max_output_tokens", "max_new_tokens", "num_predict")
# Where options are that other APIs have at the top: in SGLang's and vLLM's own, and in Ollama's.
_OPTION_HOLDERS = frozenset({"sampling_params", "options"})
# What a token counts for in a prompt that holds text too.
_TOKEN_BYTES = 4
# What "truncation" says where nothing is cut off.
_UNCUT = (None, "disabled")
# What the model does not run takes no place in its KV cache.
_NO_PROMPT = PromptSize(is_all=False)


def read_request(
    path: str,
    method: str,
    content_type: str,
    body: bytes,
    *,
    hashes: bool = False,
    session: SessionAsk | None = None,
) -> RequestFacts:
    """See Dialect.read_request."""
    kind = path_kind(path, method)
    if content_type == "multipart/form-data":
        return _read_form(kind, body)
    read = read_json(body)
    if read.malformed:
        return _unread(kind, content_type, read.malformed)
    document = read.document
    if kind.work is _ASKS:
        size = _NO_PROMPT
    else:
        size = prompt_size(document, text_is_prompt=kind.text_is_prompt)
        if read.large:
            size = _with_large(size, kind, body, read.large)
    tokens, text = size.tokens, size.text
    is_exact = False
    if tokens:
        is_exact = size.is_all and not any(text)
        text = NO_TEXT if is_exact else (text[0] + tokens * _TOKEN_BYTES, *text[1:])
    has_more_options = not _OPTION_HOLDERS.isdisjoint(document)
    choices, output_tokens_max, runs_to_max = (_generation if has_more_options else _stated)(document)
    prompt_hash = prefix_hash = None
    if hashes and len(body) <= HASHED_BYTES_MAX:
        prompt_hash, prefix_hash = prompt_hashes(document)
    stream = document.get("stream") is True
    model = _text(document.get("model"), MODEL_CHARS_MAX)
    if kind.work is _GENERATES:
        sequences = size.prompts * choices
        if sequences > 1:
            sequences = min(sequences, SEQUENCES_MAX)
    else:
        sequences = int(kind.work is _SCHEDULED)
    # By position, in the order of RequestFacts: names would cost as much as the tuple.
    return RequestFacts(
        model,
        stream,
        min(tokens, TOKENS_MAX) if is_exact else None,
        text,
        sequences,
        output_tokens_max,
        runs_to_max,
        prompt_hash,
        prefix_hash,
        _text(document["user"], USER_CHARS_MAX) if "user" in document else "",
        stream and kind.has_stream_options and "stream_options" not in document and _can_be_asked(read),
        is_exact and size.prompts == 1,
        size.is_all and not tokens and document.get("truncation") in _UNCUT,
        "",
        NO_SESSION if session is None else _session(kind, document, model, session, body),
    )


def _session(
    kind: PathKind, document: dict[str, Any], model: str, ask: SessionAsk, body: bytes
) -> SessionFacts:
    """Return the session of a request that generates; nothing else is cached for what comes."""
    if kind.work is not _GENERATES:
        return NO_SESSION
    hashable = len(body) <= HASHED_BYTES_MAX
    return session_facts(document, model, ask, names_answers=kind.names_answers, hashable=hashable)


def _unread(kind: PathKind, content_type: str, malformed: str) -> RequestFacts:
    """Return what is known of a request whose body is no JSON object."""
    if kind.reads_json and (not content_type or "json" in content_type):
        return RequestFacts(sequences=0, teaches=False, malformed=malformed)
    return RequestFacts(sequences=int(kind.work is _GENERATES), teaches=False)


def _read_form(kind: PathKind, body: bytes) -> RequestFacts:
    """Return what a form says: audio uploads name the model in it, and their prompt is no text."""
    scanner = FormScanner()
    scanner.feed(body)
    scanner.close()
    return RequestFacts(
        scanner.model,
        sequences=int(kind.work is _GENERATES),
        teaches=False,
    )


def _with_large(size: PromptSize, kind: PathKind, body: bytes, large: tuple[Member, ...]) -> PromptSize:
    """Return ``size`` with that of the members which were not parsed."""
    keys = prompt_keys(text_is_prompt=kind.text_is_prompt)
    for member in large:
        key = member.key.decode()
        if key in keys:
            size = size.joined(member_size(body, member))
        elif key in NOT_ONLY_TEXT:
            size = size._replace(is_all=False)
    return size


# Sequences for each prompt, the limit on the output of each, and whether the engine goes on to it.
_Generation = tuple[int, int | None, bool]


def _generation(document: dict[str, Any]) -> _Generation:
    """Return what is generated; of a batch whose prompts have their own options, the most of each."""
    generation = _stated(document)
    for holder in map(document.get, _OPTION_HOLDERS):
        for options in holder[:SEQUENCES_MAX] if type(holder) is list else (holder,):
            if type(options) is dict:
                generation = _most(generation, _stated(options))
    return generation


def _stated(options: dict[str, Any]) -> _Generation:
    choices = 1
    if "n" in options or "best_of" in options:
        choices = max(first_count(options, ("n",)) or 1, first_count(options, ("best_of",)) or 1)
    return choices, first_count(options, _LIMIT_KEYS), options.get("ignore_eos") is True


def _most(one: _Generation, other: _Generation) -> _Generation:
    limits = [limit for limit in (one[1], other[1]) if limit is not None]
    return max(one[0], other[0]), max(limits, default=None), one[2] or other[2]


def _can_be_asked(read: JsonBody) -> bool:
    """Tell whether ``stream_options`` may be put into the body, and is not in what was not parsed."""
    return read.is_utf8 and not (read.large and any(m.key == b"stream_options" for m in read.large))


def _text(value: object, chars_max: int) -> str:
    """Return a text that can be encoded, "" for anything else."""
    if type(value) is not str:
        return ""
    text = value[:chars_max]
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
