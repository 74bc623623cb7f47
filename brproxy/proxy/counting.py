"""Has prompts counted, beside their requests: by an engine's ``/tokenize``, or by a tokenizer from a file.

A request goes on by its estimate meanwhile, and waits for its count only as long as it was told to. What
cannot be counted, or is not for a limit, stays estimated.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol, Self

from brproxy.clock import Clock
from brproxy.engines.body import read_json
from brproxy.engines.dialect import RequestFacts
from brproxy.engines.paths import path_kind
from brproxy.engines.prompt import prompt_size
from brproxy.engines.tokenize import asks_prompts_of
from brproxy.estimate import TokenEstimator
from brproxy.logs import SparingLog
from brproxy.prompt_counts import CountStats, Gate, Pauses, PromptCounts
from brproxy.proxy.asking import IDENTITY, Question, ask
from brproxy.proxy.incoming import Incoming
from brproxy.proxy.service import GroupService
from brproxy.relay.endpoint import Endpoint
from brproxy.relay.errors import ShortageError, WorkerFailedError
from brproxy.tokenizer_file import TextTokens
from brproxy.types import PendingRequest

log = logging.getLogger(__name__)

_NO_SUCH_PAGE = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED})


class NotCountedError(Exception):
    """A prompt was to be counted and was not."""


@dataclass(frozen=True, slots=True)
class CountedPrompt:
    """A prompt to be counted: a request's ``body``, and the ``lines`` by which its client says who it is."""

    group: GroupService
    path: str
    body: bytes
    facts: RequestFacts
    lines: bytes


class Source(Protocol):
    """What counts prompts."""

    def counts(self, group: GroupService, path: str, facts: RequestFacts) -> bool:
        """Tell whether a request of this path may have a prompt that can be counted here; at no cost."""

    def is_lesson(self, facts: RequestFacts) -> bool:
        """Tell whether a count is of the whole prompt, and of nothing that is estimated."""

    async def tokens(self, prompt: CountedPrompt) -> int | None:
        """Return what a prompt is (tokens), None for one that cannot be counted; raises NotCountedError."""

    def close(self) -> None:
        """Leave."""


class EngineSource:
    """Asks the engines, one after another of those that may be chosen."""

    def __init__(self, clock: Clock, pauses: Pauses[Endpoint], timeout_s: float, bytes_max: int) -> None:
        self._clock = clock
        self._pauses = pauses
        self._timeout_s = timeout_s
        self._bytes_max = bytes_max
        self._turn = 0

    def counts(self, group: GroupService, path: str, facts: RequestFacts) -> bool:
        """See Source.counts."""
        return bool(group.dialect.TOKENIZE_PATH) and asks_prompts_of(path)

    def is_lesson(self, facts: RequestFacts) -> bool:
        """See Source.is_lesson."""
        return True

    async def tokens(self, prompt: CountedPrompt) -> int | None:
        """See Source.tokens."""
        dialect = prompt.group.dialect
        document = dialect.tokenize_body(prompt.path, prompt.body)
        endpoint = self._next(prompt.group) if document is not None else None
        if document is None or endpoint is None:
            return None
        lines = IDENTITY + prompt.lines
        path = dialect.TOKENIZE_PATH
        question = Question(path, self._timeout_s, self._bytes_max, lines=lines, document=document)
        try:
            reply = await ask(endpoint, question)
        except ShortageError as error:
            raise NotCountedError(str(error)) from error
        except WorkerFailedError as error:
            raise self._failed(endpoint, str(error)) from error
        status = reply.head.status
        tokens = dialect.read_tokenized(reply.body) if status == HTTPStatus.OK else None
        if tokens is not None:
            self._pauses.succeeded(endpoint)
            return tokens
        reason = f"{path} answers {status}" + (" without a count" if status == HTTPStatus.OK else "")
        if (
            HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR
            and status not in _NO_SUCH_PAGE
        ):
            # That is about the request, or about who sent it.
            raise NotCountedError(reason)
        raise self._failed(endpoint, reason)

    def close(self) -> None:
        """See Source.close."""

    def _next(self, group: GroupService) -> Endpoint | None:
        there, now_s = group.endpoints, self._clock.now_s()
        may_be_asked = [
            endpoint
            for endpoint in there
            if self._pauses.may_ask(endpoint, now_s) and any(m.is_routable for m in group.behind(endpoint))
        ]
        self._turn += 1
        return may_be_asked[self._turn % len(may_be_asked)] if may_be_asked else None

    def _failed(self, endpoint: Endpoint, reason: str) -> NotCountedError:
        if self._pauses.failed(endpoint, self._clock.now_s()):
            log.warning(
                "%s does not count prompts, which stay estimated while it does not: %s",
                endpoint.origin,
                reason,
            )
        return NotCountedError(reason)


class FileSource:
    """Counts texts by a tokenizer, in one thread of its own.

    A file has no template: what stands around the messages of a chat is estimated as ever. ``model``: which
    it is of, "" for all.
    """

    def __init__(
        self, text_tokens: TextTokens, model: str, estimator: TokenEstimator, timeout_s: float
    ) -> None:
        self._text_tokens = text_tokens
        self._model = model
        self._estimator = estimator
        self._timeout_s = timeout_s
        self._thread = ThreadPoolExecutor(1, "tokenizer")

    def counts(self, group: GroupService, path: str, facts: RequestFacts) -> bool:
        """See Source.counts."""
        return self._model in {"", facts.model} and asks_prompts_of(path)

    def is_lesson(self, facts: RequestFacts) -> bool:
        """See Source.is_lesson."""
        return not _is_chat(facts)

    async def tokens(self, prompt: CountedPrompt) -> int | None:
        """See Source.tokens."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s):
                # One that still waits for its turn when the time is over never has it.
                tokens = await loop.run_in_executor(self._thread, self._count, prompt)
        except TimeoutError as error:
            msg = f"it was not counted within {self._timeout_s:g} s"
            raise NotCountedError(msg) from error
        if tokens is None:
            return None
        return tokens + self._estimator.template_tokens(prompt.facts.model, prompt.facts.prompt_text)

    def close(self) -> None:
        """See Source.close."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _count(self, prompt: CountedPrompt) -> int | None:
        """Count, in the thread."""
        texts: list[str] = []
        read = read_json(prompt.body)
        prompt_size(read.document, text_is_prompt=path_kind(prompt.path).text_is_prompt, texts=texts)
        if not texts or read.large or not _is_unicode(texts):
            return None
        is_whole = not _is_chat(prompt.facts) and read.document.get("add_special_tokens") is not False
        return self._text_tokens(texts, is_whole)


def _is_unicode(texts: list[str]) -> bool:
    """Tell whether texts are any: JSON may hold halves of characters, of which no tokenizer knows."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_chat(facts: RequestFacts) -> bool:
    return facts.prompt_text[-1] > 0


class Counted:
    """A prompt that is being counted while its request is served: a context manager around that."""

    __slots__ = ("_counts", "_number", "_request", "_task", "_wait_s")

    def __init__(
        self,
        counts: PromptCounts,
        number: int,
        request: PendingRequest,
        task: asyncio.Task[int | None],
        wait_s: float,
    ) -> None:
        self._counts = counts
        self._number = number
        self._request = request
        self._task = task
        self._wait_s = wait_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._counts.end(self._number)

    async def wait(self) -> None:
        """Wait for the count as long as a request does, which mostly is not at all."""
        if not self._wait_s:
            return
        task = self._task
        await asyncio.wait((task,), timeout=self._wait_s)
        tokens = task.result() if task.done() and not task.cancelled() else None
        if tokens is not None:
            # Whether it is split into two legs depends on that, too.
            self._request.prompt_tokens = tokens


class Counting:
    """Has the prompts of requests counted; ``counts`` brings the answers to who books them.

    A request waits ``wait_s`` seconds for its count at most. One of more than ``body_bytes_max`` is not
    counted.
    """

    def __init__(
        self,
        source: Source,
        gate: Gate,
        estimator: TokenEstimator,
        clock: Clock,
        *,
        wait_s: float,
        body_bytes_max: int,
    ) -> None:
        self.counts = PromptCounts()
        self.stats = CountStats()
        self._source = source
        self._gate = gate
        self._estimator = estimator
        self._clock = clock
        self._wait_s = wait_s
        self._body_bytes_max = body_bytes_max
        self._tasks: set[asyncio.Task[int | None]] = set()
        self._bugs = SparingLog(log)

    def begin(
        self, group: GroupService, incoming: Incoming, request: PendingRequest, lines: bytes
    ) -> Counted | None:
        """Have a prompt counted, if it is only estimated; None where it stays so.

        ``lines`` are those by which the client says who it is.
        """
        facts, upload = incoming.facts, incoming.upload
        # What is more than text is neither what engines count nor what a file knows.
        if facts.prompt_tokens is not None or not facts.teaches or not any(facts.prompt_text):
            return None
        body = upload.beginning
        if not body or not upload.is_whole or not self._source.counts(group, incoming.path, facts):
            return None
        if len(body) > self._body_bytes_max or not self._gate.enter(self._clock.now_s()):
            self.stats.prompts["dropped"] += 1
            return None
        self.stats.prompts["asked"] += 1
        number = self.counts.begin(request)
        prompt = CountedPrompt(group, incoming.path, body, facts, lines)
        task = asyncio.create_task(self._count(number, prompt, request.prompt_tokens))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return Counted(self.counts, number, request, task, self._wait_s)

    def group_came(self, service: GroupService) -> None:
        """See groups.Follower."""
        self.counts.watch(service.group.dispatcher)

    def group_gone(self, service: GroupService) -> None:
        """See groups.Follower. What watched its dispatcher goes with it."""

    async def close(self) -> None:
        """End all that is being counted."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._source.close()

    def _done(self, task: asyncio.Task[int | None]) -> None:
        self._tasks.discard(task)
        self._gate.leave()

    async def _count(self, number: int, prompt: CountedPrompt, estimate: int) -> int | None:
        """Count one prompt, and tell who wants to know; return what it is, None if that is not known."""
        prompts, facts = self.stats.prompts, prompt.facts
        try:
            tokens = await self._source.tokens(prompt)
        except Exception as error:  # noqa: BLE001 - the request is served by its estimate
            prompts["failed"] += 1
            if not isinstance(error, NotCountedError):
                self._bugs.log(logging.ERROR, "counting a prompt failed", exc_info=error)
            return None
        if tokens is None:
            prompts["dropped"] += 1
            return None
        prompts["answered"] += 1
        self.stats.compare(estimate, tokens)
        self.counts.told(number, tokens)
        if self._source.is_lesson(facts):
            self._estimator.learn_prompt(facts.model, facts.user, facts.prompt_text, tokens)
        return tokens
