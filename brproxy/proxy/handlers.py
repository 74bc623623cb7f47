"""The life of one request, from its body to its last byte."""

from __future__ import annotations

import itertools
import logging
import secrets

from aiohttp import web

from brproxy.dispatcher import PoolFullError
from brproxy.engines.dialect import Dialect, RequestFacts, make_dialect
from brproxy.fleet import UnknownModelError
from brproxy.proxy import errors
from brproxy.proxy.accounting import Account
from brproxy.proxy.driver import Lease, WaitExpiredError
from brproxy.proxy.errors import ProxyError
from brproxy.proxy.forwarding import Forwarding, WorkerRefusedError
from brproxy.proxy.pages import MODELS_PATH, Pages
from brproxy.proxy.service import GroupService, Service
from brproxy.proxy.upload import Upload, read_upload
from brproxy.relay.client import Answered, Client
from brproxy.relay.connection import WorkerConnection
from brproxy.relay.errors import ClientGoneError, StaleConnectionError, WorkerFailedError
from brproxy.relay.fields import REQUEST_ID, Fields, request_fields
from brproxy.relay.framing import Framing, response_head
from brproxy.relay.request import origin_form, request_head, upgrade_lines
from brproxy.types import InvalidInputError, PendingRequest, WorkerIndex

log = logging.getLogger(__name__)


class Handlers:
    """What the server does with a request: one of the proxy's own pages, or to a worker with it."""

    def __init__(self, service: Service) -> None:
        self._service = service
        # Clients speak the OpenAI API whatever engine answers them.
        self._client_dialect: Dialect = make_dialect("openai")
        self._requests = 0
        self._ids = RequestIds()
        self.pages = Pages(service)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer ``request``."""
        page = self.pages.by_path.get(request.path)
        if page is not None and request.method in {"GET", "HEAD"}:
            return await page(request)
        limits = self._service.limits
        if self._requests >= limits.requests_max:
            reason = f"{self._requests} requests are in the proxy already"
            return self._rejection(errors.pool_full(reason, limits.retry_after_s))
        client = Client(request)
        self._requests += 1
        try:
            await self._forward(request, client)
        except ProxyError as error:
            if not client.transport.is_closing():
                return self._rejection(error)
            # The client has been told in its stream.
            self._service.metrics.reject("stream")
        except ClientGoneError:
            client.keep_alive = False
        finally:
            self._requests -= 1
        return Answered(client, self._service.relay_limits.stall_s)

    async def _forward(self, request: web.BaseRequest, client: Client) -> None:
        service = self._service
        upload = await read_upload(request, service.limits)
        facts = self._client_dialect.read_request(
            request.path, upload.media_type, upload.beginning or b"", hashes=service.hash_prompts
        )
        try:
            group = service.choose(facts.model or _model_in_path(request.path))
        except UnknownModelError as error:
            raise errors.unknown_model(str(error)) from error
        prompt_tokens = facts.prompt_tokens
        if prompt_tokens is None:
            prompt_tokens = service.estimator.prompt_tokens(facts.model, facts.prompt_bytes)
        pending = PendingRequest(
            prompt_tokens,
            facts.model,
            facts.output_tokens_max,
            facts.runs_to_max,
            facts.prompt_hash,
            facts.prefix_hash,
            facts.user,
        )
        retry_after_s = service.limits.retry_after_s
        try:
            with group.driver.admit(pending) as lease:
                await Attempts(service, group, lease, facts, upload, self._ids).run(request, client)
        except InvalidInputError as error:
            raise errors.bad_request(str(error)) from error
        except PoolFullError as error:
            raise errors.pool_full(str(error), retry_after_s) from error
        except WaitExpiredError as error:
            raise errors.waited_too_long(str(error), retry_after_s) from error

    def _rejection(self, error: ProxyError) -> web.Response:
        self._service.metrics.reject(error.status)
        return error.response()


class Attempts:
    """One request's way to a worker: one after another, until one answers or the retries are used up."""

    def __init__(
        self,
        service: Service,
        group: GroupService,
        lease: Lease,
        facts: RequestFacts,
        upload: Upload,
        ids: RequestIds,
    ) -> None:
        self._service = service
        self._group = group
        self._lease = lease
        self._facts = facts
        self._upload = upload
        self._ids = ids
        self._usage_was_added = facts.usage_can_be_asked and service.ask_usage and upload.is_whole
        if self._usage_was_added:
            upload.replace(group.dialect.ask_usage(upload.whole()))

    async def run(self, request: web.BaseRequest, client: Client) -> None:
        """Answer the client; raises ProxyError when nobody can, ClientGoneError when it has left."""
        retries_left = self._service.limits.retries_max
        target = origin_form(request.raw_path)
        fields = request_fields(request.raw_headers)
        lines, request_id = self._lines(fields, client)
        while True:
            worker = await self._lease.worker()
            pool = self._group.pools[worker]
            account = Account(
                self._lease,
                self._group.dialect,
                self._facts,
                self._service.estimator,
                usage_was_added=self._usage_was_added,
            )
            head = request_head(request.method, target, pool.host_field, lines, self._upload.framing)
            try:
                await self._try(worker, head, request, client, account, request_id)
            except WorkerFailedError as error:
                self._note_failure(worker, error)
                if not retries_left or self._upload.is_spent:
                    message = f"No worker took the request: {error}."
                    raise errors.workers_failed(message) from error
            except WorkerRefusedError as error:
                if not retries_left or self._upload.is_spent:
                    self._lease.fail()
                    _pass_refusal(client, error, request.method)
                    return
            else:
                return
            group = self._group.group
            self._service.metrics.groups[group.name].retries[group.worker_names[worker]] += 1
            self._lease.retry()
            retries_left -= 1

    def _lines(self, fields: Fields, client: Client) -> tuple[bytes, bytes]:
        """Return the lines that every worker gets, and the request's id."""
        lines = fields.lines
        request_id = fields.known.get(REQUEST_ID)
        if not request_id:
            request_id = self._ids.next()
            lines += b"X-Request-Id: %b\r\n" % request_id
        if client.wants_upgrade:
            lines += upgrade_lines(fields)
        return lines, request_id

    async def _try(
        self,
        worker: WorkerIndex,
        head: bytes,
        request: web.BaseRequest,
        client: Client,
        account: Account,
        request_id: bytes,
    ) -> None:
        """Send the request on a kept connection, on a new one if the worker has closed that."""
        pool = self._group.pools[worker]
        connection = pool.take_idle()
        while True:
            if connection is None:
                connection = await pool.connect()
            exchange = Forwarding(
                client, account, self._service.relay_limits, request.path, request.method, request_id
            )
            try:
                await self._exchange(exchange, connection, head)
            except StaleConnectionError:
                if self._upload.is_spent:
                    raise
                # Engines close idle connections when they like. A new one tells what the worker is up to.
                connection = None
            else:
                return

    async def _exchange(self, exchange: Forwarding, connection: WorkerConnection, head: bytes) -> None:
        upload, watch = self._upload, self._service.watch
        exchange.send(connection, head + upload.beginning_framed, whole=upload.is_whole)
        watch.add(exchange)
        try:
            if not upload.is_whole:
                await upload.pass_on(connection, exchange.outcome)
            await exchange.outcome
        finally:
            watch.discard(exchange)
            exchange.close()

    def _note_failure(self, worker: WorkerIndex, error: WorkerFailedError) -> None:
        group = self._group.group
        log.warning("worker %s failed before its first byte: %s", group.worker_names[worker], error)
        # Without active checks nothing would ever bring the worker back.
        if error.unreachable and self._service.health_checks:
            now_s = self._service.clock.now_s()
            group.health.record(worker, ok=False, reason=str(error), now_s=now_s)


class RequestIds:
    """Ids for requests whose client sent none: unique to this process and the request."""

    def __init__(self) -> None:
        self._process = secrets.token_hex(8)
        self._numbers = itertools.count(1)

    def next(self) -> bytes:
        """Return an id that was never returned before."""
        return f"{self._process}{next(self._numbers):08x}".encode()


def _pass_refusal(client: Client, refusal: WorkerRefusedError, method: str) -> None:
    """Send what the worker answered, in its own words."""
    body = b"" if method == "HEAD" else refusal.body
    head = refusal.head
    if method != "HEAD":
        head = head.with_length(len(body))
    client.write(
        response_head(head, Framing.LENGTH, keep_alive=bool(client.keep_alive), http10=client.is_http10)
        + body
    )


def _model_in_path(path: str) -> str:
    """Return the model that ``/v1/models/NAME`` asks about, "" for any other path."""
    return path.removeprefix(MODELS_PATH + "/") if path.startswith(MODELS_PATH + "/") else ""
