"""Errors that the proxy itself answers, in the format of the API that the client speaks.

A worker's own errors never come through here: they reach the client as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

from aiohttp import web

from brproxy.engines.api_errors import api_of, error_body, error_event


@dataclass
class ProxyError(Exception):
    """An answer of the proxy's own: HTTP status, message, OpenAI error type, Retry-After in seconds."""

    status: int
    message: str
    type: str
    retry_after_s: int | None = None

    def body(self, path: str) -> bytes:
        """Return the JSON body of an answer to a request for ``path``."""
        return error_body(api_of(path), self.status, self.message, self.type)

    def event(self, path: str) -> bytes:
        """Return the same as a server-sent event, for a stream of ``path`` that has begun."""
        return error_event(api_of(path), self.status, self.message, self.type)

    def response(self, path: str) -> web.Response:
        """Return the error as the answer to a request for ``path``."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return web.Response(
            status=self.status, body=self.body(path), content_type="application/json", headers=headers
        )


def bad_request(message: str) -> ProxyError:
    """Return 400: the request could never be served here."""
    return ProxyError(HTTPStatus.BAD_REQUEST, message, "invalid_request_error")


def not_allowed(status: int, message: str) -> ProxyError:
    """Return 401 or 403: whoever asks may not."""
    return ProxyError(status, message, "authentication_error")


def unmet_expectation(message: str) -> ProxyError:
    """Return 417: the client expects what is not known here."""
    return ProxyError(HTTPStatus.EXPECTATION_FAILED, message, "invalid_request_error")


def of_status(status: int, message: str) -> ProxyError:
    """Return an error for what the server below the handlers answers: no request at all, or a bug."""
    is_ours = status >= HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.HTTP_VERSION_NOT_SUPPORTED
    return ProxyError(status, message, "internal_error" if is_ours else "invalid_request_error")


def upload_too_large(limit_bytes: int) -> ProxyError:
    """Return 413: an upload that is passed on as it comes exceeds ``limits.upload_bytes_max``."""
    return ProxyError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"The upload is larger than {limit_bytes} bytes, the most that this proxy passes on.",
        "invalid_request_error",
    )


def unknown_model(message: str) -> ProxyError:
    """Return 404, as an engine does for a model that it does not serve."""
    return ProxyError(HTTPStatus.NOT_FOUND, message, "NotFoundError")


def body_too_large(limit_bytes: int) -> ProxyError:
    """Return 413: the body exceeds ``limits.body_bytes_max``."""
    return ProxyError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"The request body is larger than {limit_bytes} bytes, the most that this proxy accepts.",
        "invalid_request_error",
    )


def body_stalled(seconds: float) -> ProxyError:
    """Return 408: the client has stopped sending its request."""
    return ProxyError(
        HTTPStatus.REQUEST_TIMEOUT,
        f"Nothing of the request's body came for {seconds:g} s.",
        "invalid_request_error",
    )


def body_too_slow(seconds: float) -> ProxyError:
    """Return 408: the client takes too long to send its request."""
    return ProxyError(
        HTTPStatus.REQUEST_TIMEOUT,
        f"The request's body did not come within {seconds:g} s.",
        "invalid_request_error",
    )


def no_room_for_bodies(limit_bytes: int, retry_after_s: int) -> ProxyError:
    """Return 429: the bodies of all requests together exceed ``limits.bodies_bytes_max``."""
    return ProxyError(
        HTTPStatus.TOO_MANY_REQUESTS,
        f"Overloaded: the requests in the proxy have {limit_bytes} bytes already, the most that it holds.",
        "rate_limit_error",
        retry_after_s,
    )


def no_connection_left(reason: str, retry_after_s: int) -> ProxyError:
    """Return 503: this machine, not a worker, could open no connection."""
    return ProxyError(
        HTTPStatus.SERVICE_UNAVAILABLE, f"Overloaded: {reason}.", "overloaded_error", retry_after_s
    )


def pool_full(message: str, retry_after_s: int) -> ProxyError:
    """Return 429: too many requests wait already."""
    return ProxyError(
        HTTPStatus.TOO_MANY_REQUESTS, f"Overloaded: {message}.", "rate_limit_error", retry_after_s
    )


def waited_too_long(message: str, retry_after_s: int) -> ProxyError:
    """Return 503: no worker became free in time."""
    return ProxyError(
        HTTPStatus.SERVICE_UNAVAILABLE, f"Overloaded: {message}.", "overloaded_error", retry_after_s
    )


def no_worker(message: str, retry_after_s: int) -> ProxyError:
    """Return 503: no worker was healthy for as long as a request may wait."""
    return ProxyError(HTTPStatus.SERVICE_UNAVAILABLE, f"{message}.", "service_unavailable", retry_after_s)


def undecidable(message: str) -> ProxyError:
    """Return 500: the decision on a request failed, which is the proxy's own fault."""
    return ProxyError(HTTPStatus.INTERNAL_SERVER_ERROR, f"Internal error: {message}.", "internal_error")


def workers_failed(message: str) -> ProxyError:
    """Return 502: every worker that was tried failed before its first byte."""
    return ProxyError(HTTPStatus.BAD_GATEWAY, message, "upstream_error")


def worker_silent(seconds: float) -> ProxyError:
    """Return 504: the worker took the request and then sent nothing."""
    return ProxyError(
        HTTPStatus.GATEWAY_TIMEOUT, f"The worker sent nothing for {seconds:g} s.", "upstream_timeout"
    )


def stream_broke_off() -> ProxyError:
    """Return 502: the worker's connection ended before its response was complete."""
    return ProxyError(
        HTTPStatus.BAD_GATEWAY, "The worker's response broke off before it was complete.", "upstream_error"
    )


def gave_up() -> ProxyError:
    """Return 503: the worker ran out of room, and nobody can go on exactly from where it was."""
    return ProxyError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "The worker ran out of KV cache and gave the request up (recomputed); it could not go on elsewhere.",
        "overloaded_error",
    )


def response_not_handled() -> ProxyError:
    """Return 500: a bug of the proxy's own met the worker's response."""
    return ProxyError(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "The proxy could not handle the worker's response.",
        "internal_error",
    )


def draining(retry_after_s: int) -> ProxyError:
    """Return 503: the proxy is about to stop."""
    return ProxyError(
        HTTPStatus.SERVICE_UNAVAILABLE, "This proxy is shutting down.", "overloaded_error", retry_after_s
    )
