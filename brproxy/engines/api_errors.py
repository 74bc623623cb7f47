"""Errors of the proxy's own, in the words of the API that the client speaks. Pure.

A client library reads an error where its API has errors: one for Anthropic's API does not see an error of
OpenAI's in a stream, and takes the half of an answer for all of it. The shapes are those of the published
client libraries (``openai/types/responses/response_error_event.py``, ``anthropic/types/shared``); the tests
read them with these.
"""

from __future__ import annotations

from enum import Enum

import orjson

_OPENAI_RESPONSES = "responses"
_ANTHROPIC_MESSAGES = "messages"

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class Api(Enum):
    """The APIs whose errors differ. OPENAI is that of all other paths too, SGLang's own among them."""

    OPENAI = "openai"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"


def api_of(path: str) -> Api:
    """Return the API that ``path`` belongs to, wherever a server mounts it."""
    segments = path.split("/")
    if _ANTHROPIC_MESSAGES in segments[-2:]:
        return Api.ANTHROPIC
    # /v1/responses, /v1/responses/ID and /v1/responses/ID/cancel
    return Api.RESPONSES if _OPENAI_RESPONSES in segments[-3:] else Api.OPENAI


def error_body(api: Api, status: int, message: str, kind: str) -> bytes:
    """Return the JSON body of an answer with ``status``; ``kind`` is OpenAI's type of the error."""
    if api is Api.ANTHROPIC:
        return orjson.dumps(_anthropic(status, message))
    return orjson.dumps({"error": _openai(status, message, kind)})


def error_event(api: Api, status: int, message: str, kind: str) -> bytes:
    """Return the error as a server-sent event, for a stream that has begun with another status.

    ``status`` is what the error would have been answered with.
    """
    if api is Api.ANTHROPIC:
        return b"event: error\ndata: " + orjson.dumps(_anthropic(status, message)) + b"\n\n"
    error = _openai(status, message, kind)
    if api is Api.OPENAI:
        return b"data: " + orjson.dumps({"error": error}) + b"\n\n"
    # The event of the API, which its library hands over like any other; "error" makes it raise besides. What
    # number it has in the stream only a reader of all events before it would know.
    event = {"type": "error", "code": str(status), "message": message, "param": None, "sequence_number": 0}
    return b"event: error\ndata: " + orjson.dumps(event | {"error": error}) + b"\n\n"


def event_line(path: str) -> bytes:
    """Return the line that makes an event of ``path`` an error's: in some APIs clients look for it alone."""
    return b"" if api_of(path) is Api.OPENAI else b"event: error\n"


def _openai(status: int, message: str, kind: str) -> dict[str, object]:
    return {"message": message, "type": kind, "param": None, "code": status}


def _anthropic(status: int, message: str) -> dict[str, object]:
    fallback = "invalid_request_error" if status < 500 else "api_error"
    return {"type": "error", "error": {"type": _ANTHROPIC_TYPES.get(status, fallback), "message": message}}
