"""The load generator's client: open-loop replay of a workload against an OpenAI-compatible URL.

Open loop: every request is sent when its time has come, however late earlier answers are. Latencies count
from the time at which a request was due, so that a client that falls behind cannot hide what users would
have seen.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import aiohttp
import orjson

from loadgen.emulator.wire import LENGTH_HEADER
from loadgen.prompts import PromptMaker
from loadgen.workload import TraceRequest, Workload

EVENT_BYTES_MAX = 1 << 22


class Failure(Enum):
    """Why a request was lost."""

    REFUSED_429 = "refused-429"
    REFUSED_503 = "refused-503"
    HTTP_4XX = "http-4xx"
    HTTP_5XX = "http-5xx"
    CONNECT = "connect"
    RESET = "reset"
    ERROR_EVENT = "error-event"
    INCOMPLETE = "incomplete"
    OUT_OF_ORDER = "out-of-order"
    TIMEOUT = "timeout"
    CLIENT_LIMIT = "client-limit"


class Lengths(Enum):
    """How the engine learns how long the answer is to be.

    MAX_TOKENS: ``max_tokens`` with ``ignore_eos``, for real engines. HIDDEN: a header that only the emulator
    reads, so that nobody on the way can know.
    """

    MAX_TOKENS = "max-tokens"
    HIDDEN = "hidden"


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How to replay.

    ``speed``: the target runs that many times as fast as real time: requests are sent faster, and durations
    are reported as if it ran at normal speed. ``verify``: the target is the emulator, whose tokens are
    numbered: check that each arrives once and in order.
    """

    target: str
    model: str = "emulated"
    chat: bool = True
    speed: float = 1.0
    lengths: Lengths = Lengths.MAX_TOKENS
    verify: bool = False
    timeout_s: float = 600.0
    in_flight_max: int = 16_384
    api_key: str | None = None
    seed: int = 0


@dataclass(slots=True)
class Outcome:
    """What became of one request. Seconds since the replay's start, at normal speed (times ``speed``)."""

    request: TraceRequest
    due_s: float
    sent_s: float = 0.0
    first_token_s: float | None = None
    last_token_s: float | None = None
    finished_s: float | None = None
    output_tokens: int = 0
    gaps_s: array[float] = field(default_factory=lambda: array("f"))
    failure: Failure | None = None
    detail: str = ""


class _FailedError(Exception):
    def __init__(self, failure: Failure, detail: str = "") -> None:
        super().__init__(detail)
        self.failure = failure
        self.detail = detail


class Replay:
    """One replay of a workload; ``outcomes`` are in order of arrival."""

    def __init__(
        self, workload: Workload, settings: ClientSettings, on_finished: Callable[[Outcome], None]
    ) -> None:
        self._workload = workload
        self._settings = settings
        self._on_finished = on_finished
        self._prompts = PromptMaker(settings.seed)
        self._in_flight: set[asyncio.Task[None]] = set()
        self._started_s = 0.0
        self.outcomes = [Outcome(request, request.arrival_s) for request in workload.requests]

    def now_s(self) -> float:
        """Return seconds since the start, at normal speed."""
        return (asyncio.get_running_loop().time() - self._started_s) * self._settings.speed

    async def run(self) -> list[Outcome]:
        """Replay everything and return what became of each request."""
        headers = {"Content-Type": "application/json"}
        if self._settings.api_key:
            headers["Authorization"] = f"Bearer {self._settings.api_key}"
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0),
            timeout=aiohttp.ClientTimeout(total=self._settings.timeout_s),
            headers=headers,
        ) as session:
            self._started_s = asyncio.get_running_loop().time()
            try:
                for number, outcome in enumerate(self.outcomes):
                    await asyncio.sleep((outcome.due_s - self.now_s()) / self._settings.speed)
                    self._start(session, outcome, number)
                await asyncio.gather(*self._in_flight)
            finally:
                for task in self._in_flight:
                    task.cancel()
        return self.outcomes

    def _start(self, session: aiohttp.ClientSession, outcome: Outcome, number: int) -> None:
        outcome.sent_s = self.now_s()
        if len(self._in_flight) >= self._settings.in_flight_max:
            outcome.failure = Failure.CLIENT_LIMIT
            self._on_finished(outcome)
            return
        task = asyncio.create_task(self._one(session, outcome, number))
        self._in_flight.add(task)
        task.add_done_callback(self._in_flight.discard)

    async def _one(self, session: aiohttp.ClientSession, outcome: Outcome, number: int) -> None:
        try:
            await self._send(session, outcome, number)
        except _FailedError as error:
            outcome.failure, outcome.detail = error.failure, error.detail
        except TimeoutError:
            outcome.failure = Failure.TIMEOUT
        except aiohttp.ClientConnectorError as error:
            outcome.failure, outcome.detail = Failure.CONNECT, str(error)
        except aiohttp.ClientError as error:
            outcome.failure, outcome.detail = Failure.RESET, str(error)
        outcome.finished_s = self.now_s()
        self._on_finished(outcome)

    async def _send(self, session: aiohttp.ClientSession, outcome: Outcome, number: int) -> None:
        settings, request = self._settings, outcome.request
        headers = {}
        if settings.lengths is Lengths.HIDDEN:
            headers[LENGTH_HEADER] = str(request.output_tokens)
        path = "/v1/chat/completions" if settings.chat else "/v1/completions"
        body = orjson.dumps(self._document(request, number))
        async with session.post(settings.target + path, data=body, headers=headers) as response:
            if response.status != 200:
                raise _FailedError(status_failure(response.status), (await response.text())[:500])
            await self._read(response, outcome)
        if settings.verify and outcome.output_tokens != request.output_tokens:
            detail = f"{outcome.output_tokens} of {request.output_tokens} tokens"
            raise _FailedError(Failure.INCOMPLETE, detail)

    def _document(self, request: TraceRequest, number: int) -> dict[str, Any]:
        text = self._prompts.text(request, number)
        document: dict[str, Any] = {"model": self._settings.model, "stream": True}
        if self._settings.chat:
            document["messages"] = [{"role": "user", "content": text}]
        else:
            document["prompt"] = text
        if request.user:
            document["user"] = request.user
        if self._settings.lengths is Lengths.MAX_TOKENS:
            document |= {"max_tokens": request.output_tokens, "ignore_eos": True}
        if not self._settings.verify:
            # A chunk is not always a token: only usage tells how many there were.
            document["stream_options"] = {"include_usage": True}
        return document

    async def _read(self, response: aiohttp.ClientResponse, outcome: Outcome) -> None:
        stream = _StreamReader(outcome, self._settings.verify)
        rest = b""
        async for chunk in response.content.iter_any():
            *events, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
            if len(rest) > EVENT_BYTES_MAX:
                raise _FailedError(Failure.INCOMPLETE, f"an event of more than {EVENT_BYTES_MAX} bytes")
            now_s = self.now_s()
            for event in events:
                stream.take(event, now_s)
        if not stream.done:
            raise _FailedError(Failure.INCOMPLETE, "the stream ended without [DONE]")


class _StreamReader:
    """Takes the events of one stream and notes times and tokens in its outcome."""

    def __init__(self, outcome: Outcome, verify: bool) -> None:
        self._outcome = outcome
        self._verify = verify
        self.done = False

    def take(self, event: bytes, now_s: float) -> None:
        """Take one event; raises _FailedError."""
        if not event.startswith(b"data: "):
            return
        if event == b"data: [DONE]":
            self.done = True
            return
        document = orjson.loads(event[6:])
        if document.get("error") is not None:
            raise _FailedError(Failure.ERROR_EVENT, str(document["error"])[:500])
        text = "".join(_text(choice) for choice in document.get("choices", ()))
        if text:
            self._tokens(text, now_s)
        usage = document.get("usage")
        if usage and usage.get("completion_tokens") is not None:
            self._outcome.output_tokens = usage["completion_tokens"]

    def _tokens(self, text: str, now_s: float) -> None:
        outcome = self._outcome
        if outcome.last_token_s is None:
            outcome.first_token_s = now_s
        else:
            outcome.gaps_s.append(now_s - outcome.last_token_s)
        outcome.last_token_s = now_s
        if not self._verify:
            outcome.output_tokens += 1
            return
        numbers = text.split()
        expected = [str(outcome.output_tokens + i) for i in range(1, len(numbers) + 1)]
        if numbers != expected:
            raise _FailedError(
                Failure.OUT_OF_ORDER, f"got {text[:80]!r} after {outcome.output_tokens} tokens"
            )
        outcome.output_tokens += len(numbers)


def _text(choice: dict[str, Any]) -> str:
    delta = choice.get("delta") or {}
    return choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""


def status_failure(status: int) -> Failure:
    """Return the kind of failure that an HTTP status other than 200 is."""
    exact = {429: Failure.REFUSED_429, 503: Failure.REFUSED_503}
    return exact.get(status, Failure.HTTP_4XX if status < 500 else Failure.HTTP_5XX)
