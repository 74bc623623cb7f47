"""The admin API: workers listed, added, drained, resumed and removed, and the configuration read again.

It has a listener of its own, so that nobody who may send requests may thereby take workers away. Everything
is bounded: connections, bodies, and the time for either.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from hmac import compare_digest
from http import HTTPMethod, HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import orjson
from aiohttp import web

from brproxy.config_sections import Admin, Listen, is_token
from brproxy.config_workers import Worker
from brproxy.deployment import Deployment, RefusedError, UnknownWorkerError
from brproxy.fleet import Group
from brproxy.listening import start_listening
from brproxy.plans import Plan
from brproxy.proxy import errors
from brproxy.proxy.errors import ProxyError
from brproxy.proxy.service import Service
from brproxy.relay.server import ClientLimits, RelayServer
from brproxy.reloading import Reloading
from brproxy.roster import Member, MemberState
from brproxy.types import InvalidInputError
from brproxy.validation import ConfigError, validate

log = logging.getLogger(__name__)

BODY_BYTES_MAX = 1 << 16
CONNECTIONS_MAX = 64
PATIENCE_S = 10.0
"""For a head, for a body, and for an answer to be read (seconds)."""

_WORKERS = "/admin/workers"
_RELOAD = "/admin/reload"


class AdminApi:
    """Answers requests; ``token`` is what clients must show, empty: whoever reaches the listener may ask."""

    def __init__(self, service: Service, deployment: Deployment, reloading: Reloading, token: str) -> None:
        self._service = service
        self._deployment = deployment
        self._reloading = reloading
        self._token = token.encode()

    async def handle(self, request: web.BaseRequest) -> web.Response:
        """Answer ``request``."""
        try:
            self._admit(request.headers)
            response = await self._answer(request)
        except ProxyError as error:
            response = error.response(request.path)
            if error.status == HTTPStatus.UNAUTHORIZED:
                response.headers["WWW-Authenticate"] = "Bearer"
        if request.body_exists and not request.content.is_eof():
            # What is left of the body is no request.
            response.force_close()
        return response

    def _admit(self, headers: Mapping[str, str]) -> None:
        """Raise ProxyError for whoever may not ask."""
        if self._token:
            scheme, _, shown = headers.get("Authorization", "").partition(" ")
            # In constant time: how much of it was right must not be told.
            is_right = compare_digest(shown.strip().encode(errors="surrogateescape"), self._token)
            if scheme.lower() != "bearer" or not is_right:
                msg = "The admin API needs its token: Authorization: Bearer TOKEN."
                raise errors.not_allowed(HTTPStatus.UNAUTHORIZED, msg)
        elif "Origin" in headers:
            # Any page that a browser on this machine shows can send requests to the loopback.
            msg = "Web pages may not use an admin API without a token."
            raise errors.not_allowed(HTTPStatus.FORBIDDEN, msg)

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        """Do what is asked; raises ProxyError."""
        # As it was sent: a worker's name may have a slash.
        path, _, query = request.raw_path.partition("?")
        try:
            if query:
                raise errors.bad_request("The admin API takes no query.")
            if path == _RELOAD:
                return await _by_method(request, POST=self._reload)
            if path == _WORKERS:
                return await _by_method(request, GET=self._list, POST=self._add)
            segments = path.removeprefix(_WORKERS + "/").split("/") if path.startswith(_WORKERS + "/") else []
            name = unquote(segments[0]) if segments else ""
            if len(segments) == 1:
                return await _by_method(request, DELETE=self._changing(name, self._deployment.remove))
            changes = {"drain": self._deployment.drain, "resume": self._deployment.resume}
            if len(segments) == 2 and segments[1] in changes:
                return await _by_method(request, POST=self._changing(name, changes[segments[1]]))
        except UnknownWorkerError as error:
            raise ProxyError(HTTPStatus.NOT_FOUND, f"{error}.", "not_found_error") from error
        except RefusedError as error:
            raise ProxyError(HTTPStatus.CONFLICT, f"{error}.", "invalid_request_error") from error
        except ConfigError as error:
            # A line, as of all errors; who wants them apart finds the mistakes beside it.
            return _refusal(str(error).split("\n"), request.path)
        msg = f"The admin API has no such path; it has {_WORKERS} and {_RELOAD}."
        raise ProxyError(HTTPStatus.NOT_FOUND, msg, "not_found_error")

    async def _reload(self, _request: web.BaseRequest) -> web.Response:
        return _json(_plan_row(await self._reloading.reload()))

    async def _list(self, _request: web.BaseRequest) -> web.Response:
        rows, groups = [], []
        for service in self._service.groups.each():
            service.driver.catch_up()
            groups.append(group_row(service.group))
            rows += [worker_row(service.group, member) for member in service.group.roster.members]
        return _json({"workers": rows, "groups": groups})

    async def _add(self, request: web.BaseRequest) -> web.Response:
        worker = validate(Worker, await _document(request), "worker")
        members = self._deployment.add(worker)
        log.info("admin: worker %s [%s] was added", worker.label, worker.group)
        group, _ = self._deployment.find(worker.label)
        return _json({"workers": [worker_row(group, member) for member in members]}, HTTPStatus.CREATED)

    def _changing(
        self, name: str, change: Callable[[str], list[Member]]
    ) -> Callable[[web.BaseRequest], Awaitable[web.Response]]:
        async def answer(_request: web.BaseRequest) -> web.Response:
            group, _ = self._deployment.find(name)
            rows = [worker_row(group, member) for member in change(name)]
            for row in rows:
                log.info("admin: worker %s [%s] is %s now", row["name"], group.name, row["state"])
            return _json({"workers": rows})

        return answer


def group_row(group: Group) -> dict[str, object]:
    """Return what the API tells of a group."""
    dispatcher = group.dispatcher
    return {
        "name": group.name,
        "models": sorted(group.models),
        "prefills": group.prefills,
        "state": "leaving" if group.leaves else "active",
        "workers": len(group.roster),
        "requests": dispatcher.ledger.bound,
        "waiting": len(dispatcher.waiting),
    }


def worker_row(group: Group, member: Member) -> dict[str, object]:
    """Return what the API tells of a worker."""
    ledger, is_gone = group.dispatcher.ledger, member.state is MemberState.GONE
    return {
        "group": group.name,
        "name": member.key,
        "url": member.origin,
        "state": "leaving" if (member.leaves or group.leaves) and not is_gone else member.state.name.lower(),
        "health": member.health.state.value,
        "requests": 0 if is_gone else ledger.requests[member.index],
        "kv_tokens": 0 if is_gone else ledger.kv_tokens[member.index],
        "slots": member.limits.slots,
        "kv_capacity_tokens": member.limits.kv_capacity_tokens,
        "reason": member.health.reason,
    }


def _plan_row(plan: Plan) -> dict[str, object]:
    return {
        "changes": [str(step) for step in (*plan.groups, *plan.steps)],
        "taken_up": list(plan.changed),
        "needs_restart": list(plan.restart),
        "kept": list(plan.kept),
    }


async def _by_method(
    request: web.BaseRequest, **answers: Callable[[web.BaseRequest], Awaitable[web.Response]]
) -> web.Response:
    answer = answers.get(request.method)
    if answer is None:
        msg = f"This path of the admin API takes {' and '.join(answers)}."
        raise ProxyError(HTTPStatus.METHOD_NOT_ALLOWED, msg, "invalid_request_error")
    if request.body_exists and request.method != HTTPMethod.POST:
        raise errors.bad_request("This path of the admin API takes no body.")
    return await answer(request)


async def _document(request: web.BaseRequest) -> dict[str, Any]:
    """Return the JSON object that is the request's body; raises ProxyError."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            body = await request.read()
    except TimeoutError:
        raise errors.body_too_slow(PATIENCE_S) from None
    except web.HTTPRequestEntityTooLarge:
        raise errors.body_too_large(BODY_BYTES_MAX) from None
    except InvalidInputError as error:
        raise errors.bad_request(str(error)) from error
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise errors.bad_request(f"The body is no JSON: {error}.") from error
    if not isinstance(document, dict):
        raise errors.bad_request("The body must be a JSON object, with the keys of a [[worker]] table.")
    return document


def _json(content: object, status: int = HTTPStatus.OK) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(content) + b"\n", content_type="application/json")


def _refusal(mistakes: list[str], path: str) -> web.Response:
    error = orjson.loads(errors.bad_request("; ".join(mistakes)).body(path))
    return _json(error | {"mistakes": mistakes}, HTTPStatus.BAD_REQUEST)


def read_token(admin: Admin) -> str:
    """Return the token, "" where none is wanted; raises ConfigError."""
    if not admin.token_file:
        return admin.token
    try:
        token = Path(admin.token_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        msg = f"admin.token_file: {admin.token_file!r} cannot be read: {reason}"
        raise ConfigError(msg) from error
    if not is_token(token):
        msg = f"admin.token_file: {admin.token_file!r} must have the token, printable ASCII without spaces"
        raise ConfigError(msg)
    return token


@asynccontextmanager
async def running_admin(
    admin: Admin, service: Service, deployment: Deployment, reloading: Reloading
) -> AsyncIterator[int | None]:
    """Listen for the admin API for as long as the block runs; the port is None where it is off.

    Raises ConfigError and ListenError.
    """
    if not admin.enabled:
        yield None
        return
    server = RelayServer(
        AdminApi(service, deployment, reloading, read_token(admin)).handle,
        BODY_BYTES_MAX,
        limits=ClientLimits(CONNECTIONS_MAX, head_s=PATIENCE_S, unread_s=PATIENCE_S),
        error_page=lambda status, message: errors.of_status(status, message).response(""),
        auto_decompress=False,
        access_log=None,
        keepalive_timeout=PATIENCE_S,
    )
    runner = web.ServerRunner(server, shutdown_timeout=1.0)
    await runner.setup()
    try:
        yield await start_listening(
            runner, Listen(host=admin.host, port=admin.port, backlog=CONNECTIONS_MAX, accepts_per_turn=1)
        )
    finally:
        await runner.cleanup()
