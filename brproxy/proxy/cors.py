"""Cross-origin resource sharing (the Fetch standard, section 3.2) for what the proxy itself answers.

Workers send such fields by themselves, where their users want that. A page that may read a worker's answers
should also see the proxy's own, such as 429: else a browser tells it of no more than a failed request.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from http import HTTPMethod, HTTPStatus

from aiohttp import web

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
_PREFLIGHT_S = 600
"""How long a browser may remember what it was allowed (seconds)."""


class Cors:
    """What pages of ``origins`` may read: "*" is all of them, none turns it off.

    Origins are in lower case, as the configuration has them.
    """

    def __init__(self, origins: Sequence[str]) -> None:
        self._of_all = "*" in origins
        self._origins = frozenset(origins)

    def fields(self, origin: str | None) -> list[tuple[str, str]]:
        """Return the header fields of an answer to a request with this Origin field (None: without one)."""
        if not self._origins:
            return []
        if self._of_all:
            allowed = [("Access-Control-Allow-Origin", "*")]
        elif origin is not None and origin.lower() in self._origins:
            allowed = [("Access-Control-Allow-Origin", origin), ("Vary", "Origin")]
        else:
            # A cache must not give this answer to a page that would be allowed.
            return [("Vary", "Origin")]
        return [*allowed, ("Access-Control-Expose-Headers", "Retry-After, X-Request-Id")]

    def lines(self, origin: bytes | None) -> bytes:
        """Return the same as lines of a response's head."""
        fields = self.fields(None if origin is None else origin.decode("utf-8", "surrogateescape"))
        return "".join(f"{name}: {value}\r\n" for name, value in fields).encode("utf-8", "surrogateescape")

    def preflight(self, request: web.BaseRequest) -> web.Response | None:
        """Answer a browser that asks whether a page may send what it wants to; None for any other request."""
        headers = request.headers
        origin = headers.get("Origin")
        if request.method != HTTPMethod.OPTIONS or "Access-Control-Request-Method" not in headers:
            return None
        if origin is None or not (self._of_all or origin.lower() in self._origins):
            return None
        fields = [*self.fields(origin), ("Access-Control-Allow-Methods", _METHODS)]
        # "*" would not stand for Authorization.
        wanted = headers.get("Access-Control-Request-Headers")
        if wanted is not None:
            fields += [
                ("Access-Control-Allow-Headers", wanted),
                ("Vary", "Access-Control-Request-Headers"),
            ]
        fields.append(("Access-Control-Max-Age", str(_PREFLIGHT_S)))
        return web.Response(status=HTTPStatus.NO_CONTENT, headers=fields)

    def around(self, handler: Handler) -> Handler:
        """Return ``handler`` with these fields on every answer that is not a worker's own."""
        if not self._origins:
            return handler

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            response: web.StreamResponse | None = self.preflight(request)
            if response is not None:
                return response
            try:
                response = await handler(request)
            except web.HTTPException as error:
                self._add(request, error)
                raise
            # What a worker answered has been sent.
            if isinstance(response, web.Response):
                self._add(request, response)
            return response

        return handle

    def _add(self, request: web.BaseRequest, response: web.Response) -> None:
        for name in [name for name in response.headers if name.lower().startswith("access-control-")]:
            del response.headers[name]
        for name, value in self.fields(request.headers.get("Origin")):
            response.headers.add(name, value)
