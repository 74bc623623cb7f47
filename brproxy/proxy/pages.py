"""The proxy's own pages: health, readiness, metrics, and the models of all workers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web

from brproxy.proxy import errors
from brproxy.proxy.service import Service
from brproxy.relay.fields import crossing_pairs

MODELS_PATH = "/v1/models"

Page = Callable[[web.BaseRequest], Awaitable[web.Response]]


class Pages:
    """Pages by path, for GET and HEAD."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.draining = False
        self.by_path: dict[str, Page] = {
            "/health": self._health,
            "/ready": self._ready,
            "/metrics": self._metrics,
            MODELS_PATH: self._models,
        }

    async def _health(self, _request: web.BaseRequest) -> web.Response:
        """200 as long as the process answers."""
        return web.Response(text="ok\n")

    async def _ready(self, _request: web.BaseRequest) -> web.Response:
        """200 while a worker may be chosen, decisions are made, and the proxy is not about to stop."""
        if self.draining:
            return web.Response(status=503, text="shutting down\n")
        if not self._service.fleet.ready:
            return web.Response(status=503, text="no worker is healthy\n")
        stuck = [name for name, group in self._service.groups.items() if group.driver.is_stuck()]
        if stuck:
            return web.Response(status=503, text=f"requests wait and no round is due: {', '.join(stuck)}\n")
        return web.Response(text="ready\n")

    async def _metrics(self, _request: web.BaseRequest) -> web.Response:
        """Prometheus metrics in the text format."""
        for group in self._service.groups.values():
            group.driver.catch_up()
        return web.Response(
            body=self._service.metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4"}
        )

    async def _models(self, request: web.BaseRequest) -> web.Response:
        """Answer with the union of the models that healthy workers report, in the first one's words."""
        asked = [
            (pool.origin, service.dialect.MODELS_PATH)
            for service in self._service.groups.values()
            for pool, routable in zip(service.pools, service.group.health.routable(), strict=True)
            if routable
        ]
        headers = crossing_pairs(request.raw_headers)
        timeout_s = self._service.limits.control_timeout_s
        answers = await asyncio.gather(
            *(self._service.control.get(origin, path, timeout_s, headers) for origin, path in asked),
            return_exceptions=True,
        )
        replies = [answer for answer in answers if not isinstance(answer, BaseException)]
        union = _models_union([body for status, body in replies if status == 200])
        if union is not None:
            return web.Response(body=orjson.dumps(union), content_type="application/json")
        if replies:
            status, body = replies[0]
            return web.Response(status=status, body=body, content_type="application/json")
        failure = errors.workers_failed("No worker could be asked for its models.")
        self._service.metrics.reject(failure.status)
        return failure.response()


def _models_union(bodies: list[bytes]) -> dict[str, Any] | None:
    """Merge ``/v1/models`` answers by id, the first seen kept; None when none can be read."""
    models: dict[str, object] = {}
    readable = False
    for body in bodies:
        try:
            listed = {entry["id"]: entry for entry in orjson.loads(body)["data"]}
        except (orjson.JSONDecodeError, KeyError, TypeError):
            continue
        readable = True
        models |= {name: entry for name, entry in listed.items() if name not in models}
    return {"object": "list", "data": list(models.values())} if readable else None
