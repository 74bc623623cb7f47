"""The HTTP surface: what a client may ask, and the life of one request from its body to its last byte."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import orjson
from aiohttp import web

from brproxy.dispatcher import PoolFullError, PromptTooLongError
from brproxy.engines.dialect import Dialect, RequestFacts, make_dialect
from brproxy.fleet import UnknownModelError
from brproxy.proxy import errors
from brproxy.proxy.accounting import Account
from brproxy.proxy.driver import Lease, WaitExpiredError
from brproxy.proxy.errors import ClientGoneError, ProxyError
from brproxy.proxy.headers import REQUEST_ID, Headers, request_headers
from brproxy.proxy.relay import Relay, WorkerRefusedError, WorkerResponse, keep_worker_headers
from brproxy.proxy.service import GroupService, Service
from brproxy.proxy.upstream import WorkerFailedError, WorkerRequest
from brproxy.types import PendingRequest, WorkerIndex

log = logging.getLogger(__name__)

MODELS_PATH = "/v1/models"


class Handlers:
    """The routes of the proxy."""

    def __init__(self, service: Service) -> None:
        self._service = service
        # Clients speak the OpenAI API whatever engine answers them.
        self._client_dialect: Dialect = make_dialect("openai")
        self._requests = 0
        self.draining = False

    def application(self) -> web.Application:
        """Return the application that serves these handlers."""
        app = web.Application(client_max_size=self._service.limits.body_bytes_max)
        app.router.add_get("/health", self.health)
        app.router.add_get("/ready", self.ready)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get(MODELS_PATH, self.models)
        app.router.add_route("*", "/{path:.*}", self.forward)
        app.on_response_prepare.append(keep_worker_headers)
        return app

    async def health(self, _request: web.Request) -> web.Response:
        """200 as long as the process answers."""
        return web.Response(text="ok\n")

    async def ready(self, _request: web.Request) -> web.Response:
        """200 while at least one worker may be chosen and the proxy is not about to stop."""
        if self.draining:
            return web.Response(status=503, text="shutting down\n")
        if not self._service.fleet.ready:
            return web.Response(status=503, text="no worker is healthy\n")
        return web.Response(text="ready\n")

    async def metrics(self, _request: web.Request) -> web.Response:
        """Prometheus metrics in the text format."""
        return web.Response(
            body=self._service.metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4"}
        )

    async def models(self, request: web.Request) -> web.Response:
        """Answer with the union of the models that healthy workers report, in the first one's words."""
        asked = [
            (service.origins[i], service.dialect.MODELS_PATH)
            for service in self._service.groups
            for i in service.group.health.routable().nonzero()[0].tolist()
        ]
        headers = request_headers(request.headers)
        timeout_s = self._service.limits.control_timeout_s
        answers = await asyncio.gather(
            *(self._service.upstream.get(origin, path, timeout_s, headers) for origin, path in asked),
            return_exceptions=True,
        )
        replies = [answer for answer in answers if not isinstance(answer, BaseException)]
        union = _models_union([body for status, body in replies if status == 200])
        if union is not None:
            return web.Response(body=orjson.dumps(union), content_type="application/json")
        if replies:
            status, body = replies[0]
            json = Headers({"Content-Type": "application/json"})
            return WorkerResponse(status, None, json, body)
        return self._rejection(errors.workers_failed("No worker could be asked for its models."))

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Pass any request to a worker, and its response back."""
        if self._requests >= self._service.limits.requests_max:
            limit = f"{self._requests} requests are in the proxy already"
            return self._rejection(errors.pool_full(limit, self._service.limits.retry_after_s))
        self._requests += 1
        try:
            return await self._forward(request)
        except ProxyError as error:
            if request.transport is None or request.transport.is_closing():
                # The client has been told in its stream; this answer goes nowhere.
                self._service.metrics.rejected.labels("stream").inc()
                return web.Response(status=error.status)
            return self._rejection(error)
        except ClientGoneError:
            return web.Response(status=499)
        finally:
            self._requests -= 1

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        facts = self._client_dialect.read_request(
            request.path, request.content_type, body or b"", hashes=self._service.hash_prompts
        )
        model = facts.model or _model_in_path(request.path)
        try:
            service = self._service.choose(model)
        except UnknownModelError as error:
            raise errors.unknown_model(str(error)) from error
        prompt_tokens = facts.prompt_tokens
        if prompt_tokens is None:
            prompt_tokens = self._service.estimator.prompt_tokens(facts.model, facts.prompt_bytes)
        retry_after_s = self._service.limits.retry_after_s
        try:
            pending = PendingRequest(
                prompt_tokens,
                facts.model,
                facts.output_tokens_max,
                facts.runs_to_max,
                facts.prompt_hash,
                facts.prefix_hash,
                facts.user,
            )
            with service.driver.admit(pending) as lease:
                return await self._attempts(request, service, lease, facts, body)
        except PromptTooLongError as error:
            raise errors.bad_request(str(error)) from error
        except PoolFullError as error:
            raise errors.pool_full(str(error), retry_after_s) from error
        except WaitExpiredError as error:
            raise errors.waited_too_long(str(error), retry_after_s) from error

    async def _attempts(
        self,
        request: web.Request,
        service: GroupService,
        lease: Lease,
        facts: RequestFacts,
        body: bytes | None,
    ) -> web.StreamResponse:
        """Try one worker after another until one answers or the retries are used up."""
        headers = request_headers(request.headers)
        usage_was_added = facts.usage_can_be_asked and self._service.ask_usage
        if usage_was_added and body is not None:
            body = service.dialect.ask_usage(body)
        retries_left = self._service.limits.retries_max
        while True:
            worker = await lease.worker()
            outgoing = WorkerRequest(service.origins[worker], request.method, request.raw_path, headers, body)
            account = Account(
                lease, service.dialect, facts, self._service.estimator, usage_was_added=usage_was_added
            )
            relay = Relay(request, account, self._service.relay_limits, headers[REQUEST_ID])
            try:
                return await relay.run(self._service.upstream, outgoing)
            except WorkerFailedError as error:
                self._note_failure(service, worker, error)
                if not retries_left:
                    message = f"No worker took the request: {error}."
                    raise errors.workers_failed(message) from error
            except WorkerRefusedError as error:
                if not retries_left:
                    lease.fail()
                    return error.response()
            self._service.metrics.retries.labels(service.group.name, service.group.worker_names[worker]).inc()
            lease.retry()
            retries_left -= 1

    def _note_failure(self, service: GroupService, worker: WorkerIndex, error: WorkerFailedError) -> None:
        name = service.group.worker_names[worker]
        log.warning("worker %s failed before its first byte: %s", name, error)
        # Without active checks nothing would ever bring the worker back.
        if error.unreachable and self._service.health_checks:
            now_s = self._service.clock.now_s()
            service.group.health.record(worker, ok=False, reason=str(error), now_s=now_s)

    async def _body(self, request: web.Request) -> bytes | None:
        if not request.body_exists:
            return None
        try:
            return await request.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise errors.body_too_large(self._service.limits.body_bytes_max) from error

    def _rejection(self, error: ProxyError) -> web.Response:
        self._service.metrics.rejected.labels(str(int(error.status))).inc()
        return error.response()


def _model_in_path(path: str) -> str:
    """Return the model that ``/v1/models/NAME`` asks about, "" for any other path."""
    return path.removeprefix(MODELS_PATH + "/") if path.startswith(MODELS_PATH + "/") else ""


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
