"""The life of one request, from its first byte to its last."""

from __future__ import annotations

from aiohttp import web

from brproxy.engines.dialect import Dialect, RequestFacts, make_dialect
from brproxy.fleet import UnknownModelError
from brproxy.lifecycle import NOBODY
from brproxy.proxy import errors
from brproxy.proxy.adapter_watch import PATHS, AdapterWatch
from brproxy.proxy.asking import credentials_of
from brproxy.proxy.attempts import Attempts
from brproxy.proxy.commented import CommentedAttempts, CommentedFailoverAttempts, Split, commented
from brproxy.proxy.driver import DecisionFailedError, NoWorkerError, WaitExpiredError
from brproxy.proxy.errors import ProxyError
from brproxy.proxy.exchange.client_sink import ClientSink
from brproxy.proxy.going_on import FailoverAttempts, run_split_in_parts
from brproxy.proxy.incoming import Incoming, Reader
from brproxy.proxy.legs.split import run_split
from brproxy.proxy.pages import MODELS_PATH, Page, Pages
from brproxy.proxy.service import GroupService, Service
from brproxy.proxy.upload import Upload
from brproxy.relay.client import Client
from brproxy.relay.errors import ClientGoneError, UnknownExpectationError
from brproxy.types import BrproxyError, InvalidInputError, PendingRequest
from brproxy.waiting import PoolFullError


class Handlers:
    """What the server does with a request: one of the proxy's own pages, or to a worker with it."""

    def __init__(self, service: Service) -> None:
        self._service = service
        # Clients speak the OpenAI API whatever engine answers them.
        dialect: Dialect = make_dialect("openai")
        self._reader = Reader(service, dialect)
        self._requests = 0
        self._attempts: type[Attempts]
        self._split: Split
        self.pages = Pages(service)
        self.adapters = AdapterWatch(service)
        self.pages.by_path |= dict.fromkeys(PATHS, Page(frozenset({"POST"}), self.adapters.page))
        self.look_at_settings()

    def look_at_settings(self) -> None:
        """Have requests answered as the limits and the groups that are there now want it."""
        self._attempts, self._split = _ways(self._service)
        self.pages.look_at_settings()

    def group_came(self, service: GroupService) -> None:
        """See groups.Follower."""
        self.look_at_settings()
        self.adapters.group_came(service)

    def group_gone(self, service: GroupService) -> None:
        """See groups.Follower."""
        self.look_at_settings()
        self.adapters.group_gone(service)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer ``request``."""
        page = self.pages.by_path.get(request.path)
        if page is not None and page.takes(request.method):
            return await page.answer(request)
        client = Client(request, self._service.relay_limits.stall_s)
        sink = ClientSink(client)
        upload = Upload(request, self._service.body_limits, self._service.body_room)
        try:
            await self._answer(request, sink, upload)
        except ClientGoneError:
            client.keep_alive = False
        except (ProxyError, BrproxyError) as error:
            failure = error if isinstance(error, ProxyError) else self._failure(error)
            if not client.has_begun and not client.transport.is_closing():
                return self._rejection(failure, request)
            sink.end_with(failure.event(request.path))
            self._service.metrics.reject("stream")
        finally:
            upload.give_back()
        return client.answered

    async def _answer(self, request: web.BaseRequest, sink: ClientSink, upload: Upload) -> None:
        """Have a worker answer ``request``; raises ProxyError, BrproxyError or ClientGoneError."""
        service = self._service
        requests_max = service.limits.requests_max
        if self._requests >= requests_max:
            raise self._no_room()
        incoming = await self._reader.read(request, sink.client, upload)
        # A place is taken when the request is there: those that never come take none.
        if self._requests >= requests_max:
            raise self._no_room()
        self._requests += 1
        try:
            sink.request_id = incoming.request_id
            group = service.choose(incoming.facts.model or _model_in_path(incoming.path))
            pending = self._pending(incoming.facts, incoming.batch)
            counting, counted = service.counting, None
            if counting is not None:
                counted = counting.begin(group, incoming, pending, credentials_of(request.raw_headers))
            if counted is None:
                await self._serve(group, pending, incoming, sink)
            else:
                with counted:
                    await counted.wait()
                    if group.group.leaves:
                        # It was removed meanwhile, and there may be another in its place.
                        group = service.choose(incoming.facts.model or _model_in_path(incoming.path))
                    await self._serve(group, pending, incoming, sink)
        finally:
            self._requests -= 1

    async def _serve(
        self, group: GroupService, pending: PendingRequest, incoming: Incoming, sink: ClientSink
    ) -> None:
        """Have a worker of ``group`` answer, or two of them; raises as ``_answer``."""
        if group.handover is not None:
            await self._split(self._service, group, group.handover, pending, incoming, sink)
            return
        adapters = group.adapters
        avoid = adapters.lacking(pending.model) if adapters.names else NOBODY
        with group.driver.admit(pending, avoid) as lease:
            await self._attempts(self._service, group, lease, incoming, sink).run()

    def _no_room(self) -> ProxyError:
        reason = f"{self._requests} requests are in the proxy already"
        return errors.pool_full(reason, self._service.limits.retry_after_s)

    def _pending(self, facts: RequestFacts, batch: str) -> PendingRequest:
        """Return the request as the decision core sees it."""
        prompt_tokens = facts.prompt_tokens
        if prompt_tokens is None:
            prompt_tokens = self._service.estimator.prompt_tokens(facts.model, facts.user, facts.prompt_text)
        session = facts.session
        # By position, in the order of its fields: this is done for each request.
        return PendingRequest(
            prompt_tokens,
            facts.model,
            facts.output_tokens_max,
            facts.runs_to_max,
            facts.prompt_hash,
            facts.prefix_hash,
            facts.user,
            None,
            facts.prompt_is_exact,
            facts.sequences,
            session.keys,
            session.goes_on,
            0,
            batch,
        )

    def _failure(self, error: BrproxyError) -> ProxyError:
        """Return what a request is answered that never came as far as a worker; raises what is a bug."""
        retry_after_s = self._service.limits.retry_after_s
        if isinstance(error, UnknownModelError):
            return errors.unknown_model(str(error))
        if isinstance(error, InvalidInputError):
            is_unmet = isinstance(error, UnknownExpectationError)
            return (errors.unmet_expectation if is_unmet else errors.bad_request)(str(error))
        if isinstance(error, PoolFullError):
            return errors.pool_full(str(error), retry_after_s)
        if isinstance(error, NoWorkerError):
            return errors.no_worker(str(error).capitalize(), retry_after_s)
        if isinstance(error, WaitExpiredError):
            return errors.waited_too_long(str(error), retry_after_s)
        if isinstance(error, DecisionFailedError):
            return errors.undecidable(str(error))
        raise error

    def _rejection(self, error: ProxyError, request: web.BaseRequest) -> web.Response:
        self._service.metrics.reject(error.status)
        response = error.response(request.path)
        if request.body_exists and not request.content.is_eof():
            # What is left of the body is no request.
            response.force_close()
        return response


def _ways(service: Service) -> tuple[type[Attempts], Split]:
    """Return what has workers answer, alone and in two legs: what nobody has asked for is no part of it."""
    limits, handovers = service.limits, [group.handover for group in service.groups.values()]
    attempts = FailoverAttempts if limits.failovers_max else Attempts
    may_go_on = limits.failovers_max or any(side and side.transfer.ASKS_AGAIN for side in handovers)
    split: Split = run_split_in_parts if may_go_on else run_split
    if not limits.comments_s:
        return attempts, split
    return CommentedFailoverAttempts if limits.failovers_max else CommentedAttempts, commented(split)


def _model_in_path(path: str) -> str:
    """Return the model that ``/v1/models/NAME`` asks about, "" for any other path."""
    return path.removeprefix(MODELS_PATH + "/") if path.startswith(MODELS_PATH + "/") else ""
