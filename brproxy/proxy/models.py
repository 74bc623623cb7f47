"""The models of all workers: asked for once for all clients that ask alike, and kept for some seconds."""

from __future__ import annotations

import asyncio
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from http import HTTPStatus
from typing import NamedTuple

import orjson

from brproxy.proxy import errors
from brproxy.proxy.asking import Question, ask
from brproxy.proxy.exchange.collect import Reply
from brproxy.relay.endpoint import Endpoint
from brproxy.relay.errors import ShortageError

# An answer may depend on who asks and from which web page. Nothing else of a request is passed on, so that
# it cannot depend on more than it is kept under.
_PASSED = frozenset(
    {
        b"authorization",
        b"api-key",
        b"cookie",
        b"openai-organization",
        b"openai-project",
        b"origin",
        b"x-api-key",
    }
)
_GZIP_OR_ZLIB = 47
"""Window size by which zlib finds out which of the two it reads."""

ASKED_AT_ONCE_MAX = 64
"""Workers asked at the same time for one client (workers), and clients that ask differently (clients)."""

KEPT_MAX = 64
"""Answers kept for clients that ask differently (answers)."""


class Answer(NamedTuple):
    """What the client gets: status, header fields, body."""

    status: int
    fields: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """Seconds for a worker to answer, bytes of its answer, and seconds that the union is kept (0: not)."""

    timeout_s: float
    bytes_max: int
    kept_s: float
    retry_after_s: int


class ModelList:
    """Answers ``/v1/models`` with the union of what workers list, in the words of the first that has it.

    ``asked`` gives who is asked now, and for which path. Needs a running event loop.
    """

    def __init__(self, asked: Callable[[], Sequence[tuple[Endpoint, str]]], limits: ModelLimits) -> None:
        self._asked = asked
        self.limits = limits
        self._loop = asyncio.get_running_loop()
        self._kept: OrderedDict[bytes, tuple[float, Answer]] = OrderedDict()
        self._asking: dict[bytes, asyncio.Task[Answer]] = {}

    async def answer(self, fields: Sequence[tuple[bytes, bytes]]) -> Answer:
        """Return the answer to a client with these header fields; raises ProxyError when there is none."""
        passed = sorted((name.lower(), value) for name, value in fields if name.lower() in _PASSED)
        lines = b"".join(b"%b: %b\r\n" % field for field in passed)
        # A digest: what identifies clients need not be kept.
        key = blake2b(lines, digest_size=16).digest()
        kept = self._kept.get(key)
        if kept is not None and self._loop.time() < kept[0]:
            return kept[1]
        task = self._asking.get(key)
        if task is None:
            if len(self._asking) >= ASKED_AT_ONCE_MAX:
                reason = f"{len(self._asking)} clients ask for models already"
                raise errors.pool_full(reason, self.limits.retry_after_s)
            task = self._asking[key] = self._loop.create_task(self._ask_all(key, lines))
            task.add_done_callback(lambda done: self._forget(key, done))
        # One client that leaves takes nothing from the others.
        return await asyncio.shield(task)

    async def close(self) -> None:
        """End what is being asked."""
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, key: bytes, done: asyncio.Task[Answer]) -> None:
        del self._asking[key]
        if not done.cancelled():
            # Seen, whoever still waits for it.
            done.exception()

    async def _ask_all(self, key: bytes, lines: bytes) -> Answer:
        limits = self.limits
        asked = {(endpoint.origin, path): endpoint for endpoint, path in self._asked()}
        together = asyncio.Semaphore(ASKED_AT_ONCE_MAX)

        async def ask_one(endpoint: Endpoint, path: str) -> Reply:
            async with together:
                coding = lines + b"Accept-Encoding: identity\r\n"
                return await ask(endpoint, Question(path, limits.timeout_s, limits.bytes_max, lines=coding))

        tasks = [self._loop.create_task(ask_one(endpoint, path)) for (_, path), endpoint in asked.items()]
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=2 * limits.timeout_s)
        finally:
            for task in tasks:
                task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        answer = self._merge([reply for reply in answers if isinstance(reply, Reply)])
        if answer is None:
            if answers and all(isinstance(failure, ShortageError) for failure in answers):
                raise errors.waited_too_long("this proxy is out of files or ports", limits.retry_after_s)
            raise errors.workers_failed("No worker could be asked for its models.")
        if answer.status == HTTPStatus.OK and limits.kept_s:
            self._keep(key, answer)
        return answer

    def _keep(self, key: bytes, answer: Answer) -> None:
        self._kept[key] = (self._loop.time() + self.limits.kept_s, answer)
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT_MAX or (
            len(self._kept) > 1
            and sum(len(kept.body) for _, kept in self._kept.values()) > 4 * self.limits.bytes_max
        ):
            self._kept.popitem(last=False)

    def _merge(self, replies: Sequence[Reply]) -> Answer | None:
        """Return the union of ``replies``, or the first of them when none is a list; None without any."""
        models: dict[str, bytes] = {}
        first: Reply | None = None
        for reply in replies:
            listed = listed_models(reply, self.limits.bytes_max)
            if listed is not None:
                first = first or reply
                for name, entry in listed.items():
                    # The first that has a model tells of it.
                    models.setdefault(name, entry)
        if first is not None:
            body = b'{"object":"list","data":[%b]}' % b",".join(models.values())
            fields = (("Content-Type", "application/json"), *_own_fields(first, _ABOUT_ORIGINS))
            return Answer(int(HTTPStatus.OK), fields, body)
        if replies:
            reply = replies[0]
            return Answer(reply.head.status, tuple(_own_fields(reply, _OF_AN_ERROR)), reply.body)
        return None


def listed_models(reply: Reply, bytes_max: int) -> dict[str, bytes] | None:
    """Return the entries (JSON) of a list of models by id; None where ``reply`` is no such list."""
    body = _decoded(reply, bytes_max) if reply.head.status == HTTPStatus.OK else None
    if body is None:
        return None
    try:
        entries = orjson.loads(body)["data"]
        # As bytes at once: what was nested too deeply to be written again is no entry either.
        listed = {entry["id"]: orjson.dumps(entry) for entry in entries}
    except (orjson.JSONDecodeError, orjson.JSONEncodeError, KeyError, TypeError):
        return None
    return listed if all(isinstance(name, str) for name in listed) else None


def _decoded(reply: Reply, bytes_max: int) -> bytes | None:
    """Return the body without its content coding; None where that is unknown, or the body too large."""
    coding = reply.head.known.get(b"content-encoding", b"identity").strip().lower()
    if coding == b"identity":
        return reply.body
    if coding not in {b"gzip", b"x-gzip", b"deflate"}:
        return None
    decoder = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        body = decoder.decompress(reply.body, bytes_max)
    except zlib.error:
        return None
    return body if decoder.eof else None


_ABOUT_ORIGINS = ("access-control-", "vary")
_OF_AN_ERROR = (*_ABOUT_ORIGINS, "content-type", "content-encoding", "www-authenticate", "retry-after")


def _own_fields(reply: Reply, prefixes: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return the worker's own fields whose names begin with one of ``prefixes``."""
    lines = reply.head.lines.decode("utf-8", "replace").split("\r\n")[:-1]
    pairs = (line.split(": ", 1) for line in lines)
    return [(name, value) for name, value in pairs if name.lower().startswith(prefixes)]
