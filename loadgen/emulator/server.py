"""The HTTP shell of the emulator: a port for each worker or for several, and a deployment that they share."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

import orjson
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from brproxy.types import InvalidInputError
from loadgen.emulator.decode_side import DecodeSide
from loadgen.emulator.deployment import Deployment
from loadgen.emulator.handover import Holdings
from loadgen.emulator.handover_wire import DELIVER_PATH, TransferFailedError, read_rank, read_room
from loadgen.emulator.legs import Leg, Legs
from loadgen.emulator.metrics import VllmCollector
from loadgen.emulator.pages import models_page, server_info_page, tokenize_page, version_page
from loadgen.emulator.prefill_side import PrefillSide
from loadgen.emulator.settings import EmulatorSettings, Role, Transfer
from loadgen.emulator.wire import (
    DONE,
    LENGTH_HEADER,
    RANK_HEADER,
    Answer,
    GenerationRequest,
    RequestError,
    error_body,
    read_prompt,
    read_request,
)

__all__ = ["EmulatorSettings", "RunningEmulator", "running_emulator"]

_BODY_BYTES_MAX = 64 << 20


class Worker:
    """The HTTP surface of one emulated API server, for the workers (ranks) behind it."""

    def __init__(self, legs: Legs) -> None:
        self._legs = legs
        self._ranks, self._settings, self._deployment = legs.ranks, legs.settings, legs.deployment
        self._registry = CollectorRegistry()
        self._registry.register(VllmCollector(legs.ranks, legs.settings, legs.deployment))

    def application(self) -> web.Application:
        """Return the application that serves this worker."""
        app = web.Application(client_max_size=_BODY_BYTES_MAX)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._text)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/v1/models", self._models)
        if self._settings.sglang:
            app.router.add_get("/server_info", self._server_info)
            app.router.add_get("/v1/loads", self._loads)
        else:
            app.router.add_get("/version", self._version)
            app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/health", self._health)
        app.router.add_get("/emulator/stats", self._stats)
        app.router.add_post("/emulator/reset", self._reset)
        if self._settings.transfer is not None:
            app.router.add_routes(self._legs.prefill.routes(self._ranks))
            app.router.add_post(DELIVER_PATH, self._legs.decode.delivered)
        return app

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _request: web.Request) -> web.Response:
        return _json(orjson.dumps(models_page(self._settings.model, sglang=self._settings.sglang)))

    async def _tokenize(self, request: web.Request) -> web.Response:
        try:
            tokens = read_prompt(await request.read())
        except RequestError as error:
            return _json(error_body(400, "BadRequestError", str(error), error.param), 400)
        return _json(orjson.dumps(tokenize_page(tokens)))

    async def _version(self, _request: web.Request) -> web.Response:
        return _json(orjson.dumps(version_page()))

    async def _server_info(self, _request: web.Request) -> web.Response:
        cluster = self._settings.cluster
        page = server_info_page(
            self._settings.model,
            len(self._ranks),
            cluster.slots,
            cluster.kv_capacity_tokens,
            mode="null" if self._settings.transfer is None else str(self._settings.role),
        )
        return _json(orjson.dumps(page))

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(self._registry), headers={"Content-Type": "text/plain; version=0.0.4"}
        )

    async def _loads(self, _request: web.Request) -> web.Response:
        loads = [self._load(rank) for rank in self._ranks]
        return _json(orjson.dumps({"version": "emulated", "loads": loads}))

    def _load(self, i: int) -> dict[str, int]:
        """Return the load of worker ``i`` under SGLang's names."""
        cluster = self._deployment.cluster
        used_tokens, queued_tokens = int(cluster.kv_used_tokens[i]), cluster.queued_tokens[i]
        load = {
            "dp_rank": i - self._ranks.start,
            "num_running_reqs": int(cluster.running[i]),
            "num_waiting_reqs": cluster.queued[i],
            "num_waiting_uncached_tokens": queued_tokens,
            "num_used_tokens": used_tokens,
            "num_total_tokens": used_tokens + queued_tokens,
            "total_prefill_uncached_tokens": self._deployment.prefill_tokens_total[i],
        }
        capacity = self._settings.cluster.kv_capacity_tokens
        return load if capacity is None else load | {"max_total_num_tokens": capacity}

    async def _stats(self, request: web.Request) -> web.Response:
        """Barrier statistics of a window of emulated seconds, ``from_s`` to ``to_s``."""
        try:
            from_s = float(request.query.get("from_s", "0"))
            to_s = float(request.query.get("to_s", "inf"))
        except ValueError:
            return _json(error_body(400, "BadRequestError", "from_s and to_s must be seconds"), 400)
        stats = asdict(self._deployment.stats(from_s, to_s))
        deployment = self._deployment
        clock = {
            "now_s": deployment.now_s(),
            "lag_s": deployment.lag_s,
            "late_share": deployment.late_share,
        }
        more: dict[str, object] = {"preemptions": self._deployment.cluster.preemptions}
        if self._settings.transfer is not None:
            more["handover"] = self._legs.prefill.holdings.stats(self._deployment.now_s())
            more["prefill_tokens"] = sum(self._deployment.prefill_tokens_total)
        return _json(orjson.dumps(stats | clock | more))

    async def _reset(self, _request: web.Request) -> web.Response:
        self._deployment.reset()
        self._legs.prefill.holdings.reset()
        return _json(orjson.dumps({"now_s": self._deployment.now_s()}))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, chat=True)

    async def _text(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, chat=False)

    async def _generate(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        asked = None
        try:
            asked = read_request(
                await request.read(), chat=chat, length_header=request.headers.get(LENGTH_HEADER)
            )
            rank = self._rank(request.headers.get(RANK_HEADER), asked)
            refusal = self._refusal(asked, rank)
            if refusal is not None or rank is None:
                self._legs.refused(asked)
                return refusal or self._no_such_rank(asked)
            self._deployment.cluster.check(asked.prompt_tokens, asked.output_tokens)
            request_id = request.headers.get("X-Request-Id") or uuid.uuid4().hex
            answer_id = ("chatcmpl-" if chat else "cmpl-") + request_id
            leg = self._legs.leg(asked, answer_id if chat else f"{answer_id}-0", rank)
        except InvalidInputError as error:
            if asked is not None:
                self._legs.refused(asked)
            param = error.param if isinstance(error, RequestError) else "prompt"
            return _json(error_body(400, "BadRequestError", str(error), param), 400)
        answer = Answer(leg.asked, request_id, int(time.time()))
        try:
            if asked.stream:
                return await self._stream(request, leg, answer)
            generation = await leg.start()
            await generation.more_than(leg.asked.output_tokens - 1)
            return _json(answer.complete(leg.reply()))
        except TransferFailedError as error:
            return _json(self._failed(error), 500)
        finally:
            leg.close()

    def _failed(self, error: TransferFailedError) -> bytes:
        """Count a request whose KV did not come and return the error."""
        self._legs.prefill.holdings.counts.failed_requests += 1
        return error_body(500, "InternalServerError", str(error))

    def _refusal(self, asked: GenerationRequest, rank: int | None) -> web.Response | None:
        """Return the answer to a request that no worker here takes, None if one does."""
        queue_max = self._settings.queued_requests_max
        if rank is not None and queue_max is not None and self._deployment.cluster.queued[rank] >= queue_max:
            return _json(error_body(503, "Service Unavailable", "The request queue is full."), 503)
        if asked.model != self._settings.model:
            message = f"The model `{asked.model}` does not exist."
            return _json(error_body(404, "NotFoundError", message, "model"), 404)
        return None

    def _rank(self, number: str | None, asked: GenerationRequest) -> int | None:
        """Return the worker that a request goes to, None where it names one that is not here."""
        ranks, cluster = self._ranks, self._deployment.cluster
        if number is None and self._settings.transfer == Transfer.SGLANG:
            named = read_rank(asked.handles, "routed_dp_rank")
            if named is None and self._settings.role == Role.PREFILL:
                return ranks[read_room(asked.handles) % len(ranks)]
            number = None if named is None else str(named)
        if number is None or not number.isdecimal():
            # vLLM ignores what is no number, and its own balancer takes over.
            return min(ranks, key=lambda rank: cluster.queued[rank] * 4 + int(cluster.running[rank]))
        rank = int(number) if self._settings.ranks_are_global else ranks.start + int(number)
        return rank if rank in ranks else None

    @staticmethod
    def _no_such_rank(asked: GenerationRequest) -> web.Response:
        error = error_body(400, "BadRequestError", "data_parallel_rank is out of range.", RANK_HEADER)
        if not asked.stream:
            return _json(error, 400)
        # As vLLM: the status of a stream is sent before anybody looks.
        return web.Response(
            body=b"data: %b\n\n%b" % (error, DONE),
            headers={"Content-Type": "text/event-stream; charset=utf-8"},
        )

    async def _stream(self, request: web.Request, leg: Leg, answer: Answer) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        # As vLLM: the head goes out at once, the first event when prefill is over.
        await response.prepare(request)
        try:
            generation = await leg.start()
        except TransferFailedError as error:
            await response.write(b"data: %b\n\n%b" % (self._failed(error), DONE))
            return response
        sent, opening = 0, answer.opening()
        while sent < leg.asked.output_tokens:
            decoded = await generation.more_than(sent)
            chunk = opening + answer.chunk(sent, decoded)
            sent, opening = decoded, b""
            await response.write(chunk if sent < leg.asked.output_tokens else chunk + answer.closing(sent))
        return response


@dataclass(frozen=True, slots=True)
class RunningEmulator:
    """An emulator that listens: its URLs, the deployment behind them and what that keeps for others.

    ``bootstrap_urls`` are those of the same servers' bootstrap ports, empty in forms without.
    """

    urls: tuple[str, ...]
    deployment: Deployment
    holdings: Holdings
    bootstrap_urls: tuple[str, ...]


@asynccontextmanager
async def running_emulator(settings: EmulatorSettings) -> AsyncIterator[RunningEmulator]:
    """Serve the deployment for as long as the block runs; raises InvalidInputError when a port is taken."""
    deployment = Deployment(settings.cluster, settings.speed)
    prefill, decode = PrefillSide(settings, deployment), DecodeSide(settings, deployment)
    runners: list[web.AppRunner] = []
    stepping = asyncio.create_task(deployment.run())
    try:
        workers, width = range(settings.cluster.workers), settings.ranks_per_url
        urls, bootstrap_urls = [], []
        for index, first in enumerate(workers[::width]):
            legs = Legs(settings, deployment, prefill, decode, workers[first : first + width])
            port = settings.base_port + index if settings.base_port else 0
            legs.origin = await _serve(runners, Worker(legs).application(), settings.host, port)
            urls.append(_url(legs.origin))
            if settings.has_bootstrap:
                port = settings.bootstrap_port + index if settings.bootstrap_port else 0
                app = prefill.bootstrap(legs.ranks, urls[-1])
                bootstrap_urls.append(_url(await _serve(runners, app, settings.host, port)))
        yield RunningEmulator(tuple(urls), deployment, prefill.holdings, tuple(bootstrap_urls))
    finally:
        stepping.cancel()
        prefill.close()
        await decode.aclose()
        await asyncio.gather(*(runner.cleanup() for runner in runners))
        await asyncio.gather(stepping, return_exceptions=True)


async def _serve(runners: list[web.AppRunner], app: web.Application, host: str, port: int) -> tuple[str, int]:
    """Serve an application on a port, 0 takes a free one; return host and port."""
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=0.1,
        # Engines close idle connections after five seconds.
        keepalive_timeout=5.0,
    )
    runners.append(runner)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=1024).start()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        msg = f"cannot listen on {host}:{port}: {reason}; choose another base port"
        raise InvalidInputError(msg) from error
    return host, runner.addresses[0][1]


def _url(origin: tuple[str, int]) -> str:
    return f"http://{origin[0]}:{origin[1]}"


def _json(body: bytes, status: int = 200) -> web.Response:
    return web.Response(status=status, body=body, content_type="application/json")
