"""The page that decode workers of vllm-ascend's layer-wise form ask for a prefill, and who waits for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Protocol

import orjson
from aiohttp import web

from brproxy.proxy.errors import ProxyError
from brproxy.proxy.posts import read_post

PATH = "/v1/metaserver"
NAME = "leg"
"""The parameter of the URL's query that says which transfer a post is about."""

BYTES_MAX = 1 << 20
"""A post is a few block numbers for each thousand tokens; one that is longer is none (bytes)."""


ReadPost = Callable[[bytes], tuple[str, bytes] | None]
"""Returns which request a post is about, and where its KV is to go; None for what is no post."""


class WaitsForPrefill(Protocol):
    """A request whose decode worker will ask for a prefill."""

    async def prefill(self, params: bytes) -> str:
        """Have a worker prefill; return "" or why nobody did."""


class Metaserver:
    """Who waits, by name: the transfer's, which is in the URL that a decode worker gets, and the request's.

    Decode workers that drop a URL's query say the request's id, which is not one request's alone where two
    clients give the same: then the first has it. ``readers`` are of the groups that are there, ``body_s`` is
    the limit for a post to come (seconds).
    """

    def __init__(self, readers: Callable[[], Sequence[ReadPost]], body_s: float) -> None:
        self._readers = readers
        self._body_s = body_s
        self._waiting: dict[str, WaitsForPrefill] = {}

    @property
    def is_used(self) -> bool:
        """Whether there are posts that can be read."""
        return bool(self._readers())

    def __len__(self) -> int:
        """Return the names that are waited for."""
        return len(self._waiting)

    def expect(self, leg: WaitsForPrefill, *names: str) -> None:
        """Let posts about any of ``names`` find ``leg``, until ``forget``."""
        for name in names:
            self._waiting.setdefault(name, leg)

    def forget(self, leg: WaitsForPrefill, *names: str) -> None:
        """Let nobody find ``leg`` any more."""
        for name in names:
            if self._waiting.get(name) is leg:
                del self._waiting[name]

    async def page(self, request: web.BaseRequest) -> web.Response:
        """Answer a post once its prefill is done.

        200; 400 for what is no post, 408 for one that does not come, 404 for an unknown request, 502.
        """
        try:
            body = await read_post(request, BYTES_MAX, self._body_s)
        except ProxyError as error:
            return _answer(error.status, str(error))
        post = next(filter(None, (read(body) for read in self._readers())), None)
        if post is None:
            return _answer(HTTPStatus.BAD_REQUEST, "must be a JSON object with request_id and where KV goes")
        name, params = post
        leg = self._waiting.get(request.query.get(NAME, "")) or self._waiting.get(name)
        if leg is None:
            return _answer(HTTPStatus.NOT_FOUND, "no request of that id waits for a prefill")
        failure = await leg.prefill(params)
        return _answer(HTTPStatus.BAD_GATEWAY if failure else HTTPStatus.OK, failure)


def _answer(status: int, message: str) -> web.Response:
    body = {"status": "error", "message": message} if message else {"status": "ok"}
    return web.Response(status=status, body=orjson.dumps(body), content_type="application/json")
