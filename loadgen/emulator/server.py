"""The HTTP shell of the emulator: one port for each worker, and a deployment that they share."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field

import orjson
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from brproxy.types import InvalidInputError
from loadgen.cluster import ClusterSettings
from loadgen.emulator.deployment import Deployment, Generation
from loadgen.emulator.wire import (
    LENGTH_HEADER,
    Answer,
    GenerationRequest,
    RequestError,
    error_body,
    read_request,
)

_BODY_BYTES_MAX = 64 << 20
_LABEL_NAMES = ("model_name", "engine")


@dataclass(frozen=True, slots=True)
class EmulatorSettings:
    """A deployment and how it is served.

    ``base_port`` is the first worker's, the next follow it; 0 takes free ones. ``queued_requests_max``: a
    worker whose queue is that long answers 503, as vLLM does with a queue limit; None: no limit.
    ``sglang``: workers tell their load at ``/v1/loads`` as SGLang does, instead of ``/metrics`` as vLLM.
    """

    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    speed: float = 1.0
    model: str = "emulated"
    host: str = "127.0.0.1"
    base_port: int = 0
    queued_requests_max: int | None = None
    sglang: bool = False

    def __post_init__(self) -> None:
        """Refuse a speed that is none."""
        if not 0 < self.speed <= 1000:
            msg = f"the speed must be more than 0 and at most 1000, got {self.speed}"
            raise InvalidInputError(msg)


class Worker:
    """The HTTP surface of one emulated DP rank."""

    def __init__(self, index: int, settings: EmulatorSettings, deployment: Deployment) -> None:
        self._index = index
        self._settings = settings
        self._deployment = deployment
        self._registry = CollectorRegistry()
        self._registry.register(VllmCollector(index, settings, deployment))

    def application(self) -> web.Application:
        """Return the application that serves this worker."""
        app = web.Application(client_max_size=_BODY_BYTES_MAX)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._text)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        if self._settings.sglang:
            app.router.add_get("/v1/loads", self._loads)
        else:
            app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/emulator/stats", self._stats)
        app.router.add_post("/emulator/reset", self._reset)
        return app

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _request: web.Request) -> web.Response:
        model = {"id": self._settings.model, "object": "model", "created": 0, "owned_by": "vllm"}
        return _json(orjson.dumps({"object": "list", "data": [model]}))

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(self._registry), headers={"Content-Type": "text/plain; version=0.0.4"}
        )

    async def _loads(self, _request: web.Request) -> web.Response:
        return _json(orjson.dumps({"version": "emulated", "loads": [self._load()]}))

    def _load(self) -> dict[str, int]:
        """Return the worker's load under SGLang's names."""
        cluster, i = self._deployment.cluster, self._index
        used_tokens, queued_tokens = int(cluster.kv_tokens[i]), cluster.queued_tokens[i]
        load = {
            "dp_rank": 0,
            "num_running_reqs": int(cluster.running[i]),
            "num_waiting_reqs": cluster.queued[i],
            "num_waiting_uncached_tokens": queued_tokens,
            "num_used_tokens": used_tokens,
            "num_total_tokens": used_tokens + queued_tokens,
            "total_prefill_uncached_tokens": self._deployment.prompt_tokens_total[i],
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
        clock = {"now_s": self._deployment.now_s(), "lag_s": self._deployment.lag_s}
        return _json(orjson.dumps(stats | clock | {"preemptions": self._deployment.cluster.preemptions}))

    async def _reset(self, _request: web.Request) -> web.Response:
        self._deployment.reset()
        return _json(orjson.dumps({"now_s": self._deployment.now_s()}))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, chat=True)

    async def _text(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, chat=False)

    async def _generate(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        queue_max = self._settings.queued_requests_max
        if queue_max is not None and self._deployment.cluster.queued[self._index] >= queue_max:
            return _json(error_body(503, "Service Unavailable", "The request queue is full."), 503)
        try:
            asked = read_request(
                await request.read(), chat=chat, length_header=request.headers.get(LENGTH_HEADER)
            )
            if asked.model != self._settings.model:
                message = f"The model `{asked.model}` does not exist."
                return _json(error_body(404, "NotFoundError", message, "model"), 404)
            generation = self._deployment.submit(self._index, asked.prompt_tokens, asked.output_tokens)
        except InvalidInputError as error:
            param = error.param if isinstance(error, RequestError) else "prompt"
            return _json(error_body(400, "BadRequestError", str(error), param), 400)
        request_id = request.headers.get("X-Request-Id") or uuid.uuid4().hex
        answer = Answer(asked, request_id, int(time.time()))
        try:
            if asked.stream:
                return await self._stream(request, asked, generation, answer)
            await generation.more_than(asked.output_tokens - 1)
            return _json(answer.complete())
        finally:
            self._deployment.leave(generation)

    @staticmethod
    async def _stream(
        request: web.Request, asked: GenerationRequest, generation: Generation, answer: Answer
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        # As vLLM: the head goes out at once, the first event when prefill is over.
        await response.prepare(request)
        sent, opening = 0, answer.opening()
        while sent < asked.output_tokens:
            decoded = await generation.more_than(sent)
            chunk = opening + answer.chunk(sent, decoded)
            sent, opening = decoded, b""
            await response.write(chunk if sent < asked.output_tokens else chunk + answer.closing(sent))
        return response


class VllmCollector(Collector):
    """One worker's metrics under vLLM's names and labels."""

    def __init__(self, index: int, settings: EmulatorSettings, deployment: Deployment) -> None:
        self._index = index
        self._settings = settings
        self._deployment = deployment

    def collect(self) -> list[Metric]:
        """Return the families that load balancers read."""
        cluster, i = self._deployment.cluster, self._index
        return [
            self._gauge("vllm:num_requests_running", "Requests that run", int(cluster.running[i])),
            self._gauge("vllm:num_requests_waiting", "Requests that wait", cluster.queued[i]),
            *self._cache(int(cluster.kv_tokens[i])),
            self._counter("vllm:num_preemptions", "Preemptions", cluster.preempted[i]),
            self._counter("vllm:prompt_tokens", "Prefill tokens", self._deployment.prompt_tokens_total[i]),
            self._counter(
                "vllm:generation_tokens", "Generation tokens", self._deployment.output_tokens_total[i]
            ),
        ]

    def _cache(self, kv_tokens: int) -> list[Metric]:
        """Return what a worker with a KV cache of known size says of it; usage has no meaning without."""
        capacity = self._settings.cluster.kv_capacity_tokens
        if capacity is None:
            return []
        config = GaugeMetricFamily(
            "vllm:cache_config_info", "The cache's configuration", labels=("engine", "kv_cache_size_tokens")
        )
        config.add_metric([str(self._index), str(capacity)], 1)
        usage = kv_tokens / capacity
        return [self._gauge("vllm:kv_cache_usage_perc", "KV-cache usage, 1 is full", usage), config]

    @property
    def _labels(self) -> list[str]:
        return [self._settings.model, str(self._index)]

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=_LABEL_NAMES)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=_LABEL_NAMES)
        family.add_metric(self._labels, value)
        return family


@dataclass(frozen=True, slots=True)
class RunningEmulator:
    """An emulator that listens: its workers' URLs, and the deployment behind them."""

    urls: tuple[str, ...]
    deployment: Deployment


@asynccontextmanager
async def running_emulator(settings: EmulatorSettings) -> AsyncIterator[RunningEmulator]:
    """Serve the deployment for as long as the block runs; raises InvalidInputError when a port is taken."""
    deployment = Deployment(settings.cluster, settings.speed)
    runners: list[web.AppRunner] = []
    stepping = asyncio.create_task(deployment.run())
    try:
        urls = [
            await _serve(runners, Worker(index, settings, deployment), settings, index)
            for index in range(settings.cluster.workers)
        ]
        yield RunningEmulator(tuple(urls), deployment)
    finally:
        stepping.cancel()
        await asyncio.gather(*(runner.cleanup() for runner in runners))
        await asyncio.gather(stepping, return_exceptions=True)


async def _serve(runners: list[web.AppRunner], worker: Worker, settings: EmulatorSettings, index: int) -> str:
    runner = web.AppRunner(
        worker.application(),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=0.1,
        # Engines close idle connections after five seconds.
        keepalive_timeout=5.0,
    )
    runners.append(runner)
    await runner.setup()
    port = settings.base_port + index if settings.base_port else 0
    try:
        await web.TCPSite(runner, settings.host, port, backlog=1024).start()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        msg = f"cannot listen on {settings.host}:{port}: {reason}; choose another base port"
        raise InvalidInputError(msg) from error
    return f"http://{settings.host}:{runner.addresses[0][1]}"


def _json(body: bytes, status: int = 200) -> web.Response:
    return web.Response(status=status, body=body, content_type="application/json")
