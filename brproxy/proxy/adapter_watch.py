"""LoRA adapters: workers are asked which they have, and what loads or unloads one goes to all of them.

They are asked at start, when they come or come back, and after a load or an unload went through the proxy.
vLLM's and SGLang's lists of models name an adapter's parent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from functools import partial
from http import HTTPStatus

from aiohttp import web

from brproxy.engines.body import read_json
from brproxy.engines.identity import MODELS, identify
from brproxy.logs import SparingLog
from brproxy.proxy import errors
from brproxy.proxy.asking import IDENTITY, Question, ask, credentials_of
from brproxy.proxy.errors import ProxyError
from brproxy.proxy.exchange.collect import Reply
from brproxy.proxy.posts import read_post
from brproxy.proxy.service import GroupService, Service
from brproxy.relay.endpoint import Endpoint
from brproxy.relay.errors import WorkerFailedError
from brproxy.roster import Change, Member

log = logging.getLogger(__name__)

PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter")
"""vLLM's, and SGLang's own."""

BYTES_MAX = 1 << 16
"""A name, a path and some options (bytes)."""

_MAY_HAVE_MORE = frozenset({Change.ADDED, Change.HEALTHY, Change.RESUMED})


class AdapterWatch:
    """Keeps ``GroupService.adapters`` true, and answers the requests that change them."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._asking: dict[Endpoint, asyncio.Task[None]] = {}
        self._ask_again: set[Endpoint] = set()
        self._bugs = SparingLog(log)
        self._is_running = False

    def start(self) -> None:
        """Begin to ask: nobody waits for the first answers."""
        self._is_running = True
        for group in self._service.groups.each():
            self.group_came(group)
            for endpoint in group.endpoints:
                self._ask_later(group, endpoint)

    async def stop(self) -> None:
        """End all questions."""
        self._is_running = False
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def group_came(self, service: GroupService) -> None:
        """See groups.Follower."""
        service.group.roster.observe(partial(self._member_changed, service))

    def group_gone(self, service: GroupService) -> None:
        """See groups.Follower: questions to its workers end with their connections."""

    async def page(self, request: web.BaseRequest) -> web.Response:
        """Pass a request on to every worker; answer with the first failure, or the last success.

        Which workers are asked: those of the groups that serve ``base_model_name``, without it all.
        """
        service, limits = self._service, self._service.limits
        try:
            body = await read_post(request, BYTES_MAX, service.body_limits.whole_s)
        except ProxyError as error:
            return error.response(request.path)
        base = read_json(body).document.get("base_model_name")
        asked = [
            (group, endpoint)
            for group in service.groups.each()
            if not group.group.leaves and group.group.serves(base if isinstance(base, str) else "")
            for endpoint in group.endpoints
        ]
        lines = IDENTITY + credentials_of(request.raw_headers)
        timeout_s = service.relay_limits.first_byte_s
        question = Question(request.path, timeout_s, limits.control_bytes_max, lines=lines, document=body)
        answers = await asyncio.gather(*(_answer(endpoint, question) for _, endpoint in asked))
        # Before the client knows: what it sends next finds who has the adapter.
        await asyncio.gather(*(self._ask(group, endpoint) for group, endpoint in asked))
        return _first_failure(answers, request.path)

    def _member_changed(self, group: GroupService, member: Member, change: Change) -> None:
        if change in _MAY_HAVE_MORE and self._is_running:
            self._ask_later(group, group.endpoint(member.index))

    def _ask_later(self, group: GroupService, endpoint: Endpoint) -> None:
        if endpoint in self._asking:
            # What it answers now may be from before.
            self._ask_again.add(endpoint)
            return
        task = self._asking[endpoint] = asyncio.create_task(self._ask(group, endpoint))
        task.add_done_callback(lambda _: self._asked(group, endpoint))

    def _asked(self, group: GroupService, endpoint: Endpoint) -> None:
        del self._asking[endpoint]
        if endpoint in self._ask_again:
            self._ask_again.remove(endpoint)
            if self._is_running and group.behind(endpoint):
                self._ask_later(group, endpoint)

    async def _ask(self, group: GroupService, endpoint: Endpoint) -> None:
        limits = self._service.limits
        question = Question(MODELS, limits.control_timeout_s, limits.control_bytes_max, lines=IDENTITY)
        try:
            reply = await ask(endpoint, question)
            identity = identify({MODELS: reply.body}) if reply.head.status == HTTPStatus.OK else None
        except WorkerFailedError:
            # Checks say what is wrong with it.
            return
        except Exception as error:  # noqa: BLE001 - logged; what is known of this worker stays
            self._bugs.log(
                logging.ERROR, "asking %s for its adapters failed", endpoint.origin, exc_info=error
            )
            return
        if identity is not None:
            names = frozenset(model.name for model in identity.models if model.parent)
            group.adapters.told(group.behind(endpoint), names)


async def _answer(endpoint: Endpoint, question: Question) -> Reply | WorkerFailedError:
    try:
        return await ask(endpoint, question)
    except WorkerFailedError as error:
        return error


def _first_failure(answers: Iterable[Reply | WorkerFailedError], path: str) -> web.Response:
    last: Reply | None = None
    for answer in answers:
        if isinstance(answer, WorkerFailedError):
            return errors.workers_failed(f"Not every worker took it: {answer}.").response(path)
        last = answer
        if answer.head.status >= HTTPStatus.BAD_REQUEST:
            break
    if last is None:
        return errors.bad_request("No worker serves the model in base_model_name.").response(path)
    media_type = last.head.known.get(b"content-type", b"text/plain").decode("latin-1")
    return web.Response(status=last.head.status, body=last.body, headers={"Content-Type": media_type})
