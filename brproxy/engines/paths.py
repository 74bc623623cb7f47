"""What the paths of the engines' APIs ask for: one table. Pure.

A path is known by its last segment, so that a server may mount an API anywhere. vLLM's and SGLang's own
routes (``entrypoints/openai/*/api_router.py``, ``srt/entrypoints/http_server.py``) are where they come from.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Work(Enum):
    """What a path makes an engine do.

    GENERATES: it decodes sequences. SCHEDULED: it runs the prompt and decodes nothing (embeddings, scores).
    ASKS: it answers without the model (tokenize). UNKNOWN: a prompt in the body is booked, and no sequence.
    """

    GENERATES = "generates"
    SCHEDULED = "scheduled"
    ASKS = "asks"
    UNKNOWN = "unknown"


class PathKind(NamedTuple):
    """What is known of a path.

    ``text_is_prompt``: ``text``, ``input_ids`` and ``token_ids`` are its prompt, as in SGLang's own API; in
    others ``text`` is an option. ``has_stream_options``: a stream reports usage if it is asked there.
    ``streams``: who asks for a stream there gets server-sent events. ``ends_with_done``: a complete stream
    ends with ``[DONE]``. ``reads_json``: it can do nothing with another body, forms aside. ``names_answers``:
    a request may name the answer that it goes on from. ``aborts``: it ends what others have asked for.
    """

    work: Work
    text_is_prompt: bool = False
    has_stream_options: bool = False
    streams: bool = False
    ends_with_done: bool = False
    reads_json: bool = True
    names_answers: bool = False
    aborts: bool = False


UNKNOWN = PathKind(Work.UNKNOWN, reads_json=False)
_GENERATES = PathKind(Work.GENERATES)
_STREAMS = PathKind(Work.GENERATES, streams=True)
_SCHEDULED = PathKind(Work.SCHEDULED)
_ASKS = PathKind(Work.ASKS, reads_json=False)
_ABORTS = PathKind(Work.ASKS, reads_json=False, aborts=True)

_KINDS = {
    "completions": PathKind(Work.GENERATES, has_stream_options=True, streams=True, ends_with_done=True),
    "generate": PathKind(Work.GENERATES, text_is_prompt=True, streams=True, ends_with_done=True),
    "responses": PathKind(Work.GENERATES, streams=True, names_answers=True),
    "messages": _STREAMS,
    "batch": _GENERATES,
    "chat": _GENERATES,
    "invocations": _STREAMS,
    "vertex_generate": _GENERATES,
    "transcriptions": _GENERATES,
    "translations": _GENERATES,
    "speech": _GENERATES,
    "embeddings": _SCHEDULED,
    "embed": _SCHEDULED,
    "pooling": _SCHEDULED,
    "score": _SCHEDULED,
    "rerank": _SCHEDULED,
    "decisions": _SCHEDULED,
    "generative_scoring": _SCHEDULED,
    "encode": PathKind(Work.SCHEDULED, text_is_prompt=True),
    "classify": PathKind(Work.SCHEDULED, text_is_prompt=True),
    "tokenize": _ASKS,
    "detokenize": _ASKS,
    "count_tokens": _ASKS,
    "render": _ASKS,
    "cancel": _ASKS,
    "abort_requests": _ABORTS,
    "abort_request": _ABORTS,
    "pause": _ABORTS,
    "pause_generation": _ABORTS,
}

_WITHOUT_WORK = frozenset({"GET", "HEAD", "OPTIONS", "DELETE", "TRACE", "CONNECT"})


def path_kind(path: str, method: str = "POST") -> PathKind:
    """Return what a request of ``method`` to ``path`` asks for."""
    if method in _WITHOUT_WORK:
        return _ASKS
    return _KINDS.get(path[path.rfind("/") + 1 :], UNKNOWN)
