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
from brproxy.proxy.upload import Upload, read_upload, whole_upload
from brproxy.relay.client import Client, answered
from brproxy.relay.errors import ClientGoneError, StaleConnectionError, WorkerFailedError
from brproxy.relay.fields import REQUEST_ID, Fields, request_fields
from brproxy.relay.framing import Framing, response_head
from brproxy.relay.pool import WorkerPool
from brproxy.relay.request import origin_form, request_head, upgrade_lines
from brproxy.types import BrproxyError, InvalidInputError, PendingRequest, WorkerIndex

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
        path = request.path
        page = self.pages.by_path.get(path)
        if page is not None and request.method in {"GET", "HEAD"}:
            return await page(request)
        limits = self._service.limits
        if self._requests >= limits.requests_max:
            reason = f"{self._requests} requests are in the proxy already"
            return self._rejection(errors.pool_full(reason, limits.retry_after_s))
        client = Client(request)
        self._requests += 1
        try:
            fields = request_fields(request.raw_headers)
            media_type = fields.media_type
            upload = whole_upload(request, limits) or await read_upload(request, media_type, limits)
            facts = self._client_dialect.read_request(
                path, request.method, media_type, upload.beginning or b"", hashes=self._service.hash_prompts
            )
            group = self._service.choose(facts.model or _model_in_path(path))
            request_id = fields.known.get(REQUEST_ID) or self._ids.next()
            with group.driver.admit(self._pending(facts)) as lease:
                attempts = Attempts(self._service, group, lease, facts, upload, path)
                lines = _lines_for_worker(fields, request_id, client)
                lines += upload.framing(client.method)
                # The frame stays as long as the stream.
                del fields
                await attempts.run(client, lines, request_id)
        except ClientGoneError:
            client.keep_alive = False
        except (ProxyError, BrproxyError) as error:
            failure = error if isinstance(error, ProxyError) else self._failure(error)
            if not client.has_begun and not client.transport.is_closing():
                return self._rejection(failure)
            # The client has been told in its stream; one that has not sees its response break off.
            client.close()
            self._service.metrics.reject("stream")
        finally:
            self._requests -= 1
        return answered(client, self._service.relay_limits.stall_s)

    def _pending(self, facts: RequestFacts) -> PendingRequest:
        """Return the request as the decision core sees it."""
        prompt_tokens = facts.prompt_tokens
        if prompt_tokens is None:
            prompt_tokens = self._service.estimator.prompt_tokens(facts.model, facts.prompt_bytes)
        return PendingRequest(
            prompt_tokens,
            facts.model,
            facts.output_tokens_max,
            facts.runs_to_max,
            facts.prompt_hash,
            facts.prefix_hash,
            facts.user,
        )

    def _failure(self, error: BrproxyError) -> ProxyError:
        """Return what a request is answered that never came as far as a worker; raises what is a bug."""
        retry_after_s = self._service.limits.retry_after_s
        if isinstance(error, UnknownModelError):
            return errors.unknown_model(str(error))
        if isinstance(error, InvalidInputError):
            return errors.bad_request(str(error))
        if isinstance(error, PoolFullError):
            return errors.pool_full(str(error), retry_after_s)
        if isinstance(error, WaitExpiredError):
            return errors.waited_too_long(str(error), retry_after_s)
        raise error

    def _rejection(self, error: ProxyError) -> web.Response:
        self._service.metrics.reject(error.status)
        return error.response()


class Attempts:
    """One request's way to a worker: one after another, until one answers or the retries are used up."""

    __slots__ = ("_facts", "_group", "_lease", "_path", "_service", "_upload", "_usage_was_added")

    def __init__(
        self,
        service: Service,
        group: GroupService,
        lease: Lease,
        facts: RequestFacts,
        upload: Upload,
        path: str,
    ) -> None:
        self._service = service
        self._group = group
        self._lease = lease
        self._facts = facts
        self._upload = upload
        self._path = path
        self._usage_was_added = facts.usage_can_be_asked and service.ask_usage and upload.is_whole
        if self._usage_was_added:
            upload.beginning = group.dialect.ask_usage(upload.beginning or b"")

    async def run(self, client: Client, lines: bytes, request_id: bytes) -> None:
        """Answer the client; raises ProxyError when nobody can, ClientGoneError when it has left.

        ``lines`` are the header fields that a worker gets, its own name apart.
        """
        retries_left = self._service.limits.retries_max
        while True:
            worker = self._lease.worker_now()
            if worker is None:
                worker = await self._lease.worker()
            try:
                await self._attempt(self._group.pools[worker], client, lines, request_id)
            except WorkerFailedError as error:
                self._note_failure(worker, error)
                if not retries_left or self._upload.is_spent:
                    message = f"No worker took the request: {error}."
                    raise errors.workers_failed(message) from error
            except WorkerRefusedError as error:
                if not retries_left or self._upload.is_spent:
                    self._lease.fail()
                    _pass_refusal(client, error)
                    return
            else:
                return
            group = self._group.group
            self._service.metrics.groups[group.name].retries[group.worker_names[worker]] += 1
            self._lease.retry()
            retries_left -= 1

    async def _attempt(self, pool: WorkerPool, client: Client, lines: bytes, request_id: bytes) -> None:
        """Send the request on a kept connection, on a new one if the worker has closed that."""
        service, upload = self._service, self._upload
        target = origin_form(client.target)
        # What cannot be sent twice does not go where it may find a closed door.
        connection = pool.take_idle() if upload.is_whole else None
        while True:
            if connection is None:
                connection = await pool.connect()
            account = Account(
                self._lease,
                self._group.dialect,
                self._facts,
                service.estimator,
                usage_was_added=self._usage_was_added,
            )
            exchange = Forwarding(
                client,
                account,
                service.relay_limits,
                service.watch.loop,
                path=self._path,
                bodiless=client.method == "HEAD",
                request_id=request_id,
                on_commit=upload.forget,
            )
            # Put together here and not kept: the frame stays as long as the stream.
            exchange.send(
                connection,
                request_head(client.method, target, pool.host_field, lines) + upload.framed_beginning(),
                whole=upload.is_whole,
            )
            service.watch.add(exchange)
            try:
                if not upload.is_whole:
                    await upload.pass_on(connection, exchange)
                await exchange.outcome
            except StaleConnectionError:
                if upload.is_spent:
                    raise
                # Engines close idle connections when they like. A new one tells what the worker is up to.
                connection = None
            else:
                return
            finally:
                service.watch.discard(exchange)
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
        self._process = secrets.token_hex(8).encode()
        self._numbers = itertools.count(1)

    def next(self) -> bytes:
        """Return an id that was never returned before."""
        return b"%b%08x" % (self._process, next(self._numbers))


def _lines_for_worker(fields: Fields, request_id: bytes, client: Client) -> bytes:
    """Return the header fields that a worker gets, but for its name and what frames the body."""
    lines = fields.lines
    if REQUEST_ID not in fields.known:
        lines += b"X-Request-Id: %b\r\n" % request_id
    return lines + upgrade_lines(fields) if client.wants_upgrade else lines


def _pass_refusal(client: Client, refusal: WorkerRefusedError) -> None:
    """Send what the worker answered, in its own words."""
    body = b"" if client.method == "HEAD" else refusal.body
    head = refusal.head
    if client.method != "HEAD":
        head = head.with_length(len(body))
    client.write(
        response_head(head, Framing.LENGTH, keep_alive=client.keep_alive, http10=client.is_http10) + body
    )


def _model_in_path(path: str) -> str:
    """Return the model that ``/v1/models/NAME`` asks about, "" for any other path."""
    return path.removeprefix(MODELS_PATH + "/") if path.startswith(MODELS_PATH + "/") else ""
