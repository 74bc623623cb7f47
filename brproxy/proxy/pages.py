"""The proxy's own pages: health, readiness, metrics, and the models of all workers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from aiohttp import web

from brproxy.health import Health
from brproxy.proxy.errors import ProxyError
from brproxy.proxy.legs.metaserver import PATH as METASERVER_PATH
from brproxy.proxy.models import ModelLimits, ModelList
from brproxy.proxy.service import Service
from brproxy.relay.endpoint import Endpoint

MODELS_PATH = "/v1/models"

_REASONS_MAX = 8
"""Workers that ``/ready`` gives a reason for: who reads it wants to know of the kind."""


class Page(NamedTuple):
    """One of the proxy's own pages: for which methods, and who answers."""

    methods: frozenset[str]
    answer: Callable[[web.BaseRequest], Awaitable[web.Response]]

    def takes(self, method: str) -> bool:
        """Tell whether a request of ``method`` is for this page, and not for a worker."""
        return method in self.methods


_READ = frozenset({"GET", "HEAD"})


class Pages:
    """Pages by path."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._model_list = ModelList(self._routable, _model_limits(service))
        self.draining = False
        self.by_path: dict[str, Page] = {
            "/health": Page(_READ, self._health),
            "/ready": Page(_READ, self._ready),
            "/metrics": Page(_READ, self._metrics),
            MODELS_PATH: Page(_READ, self._models),
        }
        self.look_at_settings()

    def look_at_settings(self) -> None:
        """Take up limits as they are now, and have the page that decode workers post to while some do."""
        self._model_list.limits = _model_limits(self._service)
        metaserver = self._service.metaserver
        self.by_path.pop(METASERVER_PATH, None)
        if metaserver.is_used:
            self.by_path[METASERVER_PATH] = Page(frozenset({"POST"}), metaserver.page)

    async def _health(self, _request: web.BaseRequest) -> web.Response:
        """200 as long as the process answers."""
        return web.Response(text="ok\n")

    async def _ready(self, _request: web.BaseRequest) -> web.Response:
        """200 while a worker may be chosen, decisions are made, and the proxy is not about to stop."""
        if self.draining:
            return web.Response(status=503, text="shutting down\n")
        if not self._service.fleet.ready:
            return web.Response(status=503, text=f"no worker is healthy\n{self._reasons()}")
        stuck = [name for name, group in self._service.groups.items() if group.driver.is_stuck()]
        if stuck:
            return web.Response(status=503, text=f"requests wait and no round is due: {', '.join(stuck)}\n")
        return web.Response(text=f"ready\n{self._groups_down()}")

    def _groups_down(self) -> str:
        """Return a line for each group that has a rank down: it steps no faster than its slowest one."""
        lines = []
        for name, service in self._service.groups.items():
            members = service.group.roster.members
            down = [m for m in members if m.health.state is not Health.HEALTHY and not m.leaves]
            if down:
                first = f"{down[0].key}: {down[0].health.reason}"
                lines.append(f"group {name} is down: {len(down)} of {len(members)} workers, {first}\n")
        return "".join(lines)

    def _reasons(self) -> str:
        """Return why workers cannot be chosen, a line for each of the first."""
        members = [m for service in self._service.groups.values() for m in service.group.roster.members]
        lines = [
            f"{m.key}: {'draining' if m.health.state is Health.HEALTHY else m.health.reason}\n"
            for m in members[:_REASONS_MAX]
        ]
        more = len(members) - len(lines)
        return "".join(lines) + (f"and {more} more\n" if more else "")

    async def _metrics(self, _request: web.BaseRequest) -> web.Response:
        """Prometheus metrics in the text format."""
        for group in self._service.groups.values():
            group.driver.catch_up()
        return web.Response(
            body=self._service.metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4"}
        )

    async def _models(self, request: web.BaseRequest) -> web.Response:
        """Answer with the union of the models that healthy workers report."""
        try:
            answer = await self._model_list.answer(request.raw_headers)
        except ProxyError as error:
            self._service.metrics.reject(error.status)
            return error.response(request.path)
        return web.Response(status=answer.status, body=answer.body, headers=answer.fields)

    def _routable(self) -> list[tuple[Endpoint, str]]:
        """Return the endpoint of every worker that may be chosen, and where it lists its models."""
        return [
            (service.endpoint(member.index), service.dialect.MODELS_PATH)
            for service in self._service.groups.each()
            if not (service.group.prefills or service.group.leaves)
            for member in service.group.roster.members
            if member.is_routable
        ]

    async def close(self) -> None:
        """End what is being asked for a page."""
        await self._model_list.close()


def _model_limits(service: Service) -> ModelLimits:
    limits = service.limits
    return ModelLimits(
        limits.control_timeout_s, limits.control_bytes_max, limits.models_kept_s, limits.retry_after_s
    )
