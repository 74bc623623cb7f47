"""The HTTP shell of the emulator: a port for each worker or for several, and a deployment that they share."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator, Sequence
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
from loadgen.emulator.pages import models_page, server_info_page, version_page
from loadgen.emulator.wire import (
    DONE,
    LENGTH_HEADER,
    RANK_HEADER,
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

    ``base_port`` is the first, the next follow it; 0 takes free ones. ``queued_requests_max``: a worker whose
    queue is that long answers 503, as vLLM does with a queue limit; None: no limit. Behind each port are
    ``ranks_per_url`` workers: X-data-parallel-rank says which, by its number behind that port or, where
    ``ranks_are_global``, in the deployment. ``sglang``: workers say of themselves and their load what
    SGLang says, not what vLLM does.
    """

    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    speed: float = 1.0
    model: str = "emulated"
    host: str = "127.0.0.1"
    base_port: int = 0
    queued_requests_max: int | None = None
    ranks_per_url: int = 1
    ranks_are_global: bool = False
    sglang: bool = False

    def __post_init__(self) -> None:
        """Refuse a speed that is none, and workers that do not fill their ports."""
        if not 0 < self.speed <= 1000:
            msg = f"the speed must be more than 0 and at most 1000, got {self.speed}"
            raise InvalidInputError(msg)
        if self.ranks_per_url < 1 or self.cluster.workers % self.ranks_per_url:
            workers = self.cluster.workers
            msg = f"workers behind a port must be a part of all {workers}, got {self.ranks_per_url}"
            raise InvalidInputError(msg)


class Worker:
    """The HTTP surface of one emulated API server: ``ranks`` are the workers behind it."""

    def __init__(self, ranks: range, settings: EmulatorSettings, deployment: Deployment) -> None:
        self._ranks = ranks
        self._settings = settings
        self._deployment = deployment
        self._registry = CollectorRegistry()
        self._registry.register(VllmCollector(ranks, settings, deployment))

    def application(self) -> web.Application:
        """Return the application that serves this worker."""
        app = web.Application(client_max_size=_BODY_BYTES_MAX)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._text)
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
        return app

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _request: web.Request) -> web.Response:
        return _json(orjson.dumps(models_page(self._settings.model, sglang=self._settings.sglang)))

    async def _version(self, _request: web.Request) -> web.Response:
        return _json(orjson.dumps(version_page()))

    async def _server_info(self, _request: web.Request) -> web.Response:
        cluster = self._settings.cluster
        page = server_info_page(
            self._settings.model, len(self._ranks), cluster.slots, cluster.kv_capacity_tokens
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
        used_tokens, queued_tokens = int(cluster.kv_tokens[i]), cluster.queued_tokens[i]
        load = {
            "dp_rank": i - self._ranks.start,
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
        rank = self._rank(request.headers.get(RANK_HEADER))
        queue_max = self._settings.queued_requests_max
        if rank is not None and queue_max is not None and self._deployment.cluster.queued[rank] >= queue_max:
            return _json(error_body(503, "Service Unavailable", "The request queue is full."), 503)
        try:
            asked = read_request(
                await request.read(), chat=chat, length_header=request.headers.get(LENGTH_HEADER)
            )
            if asked.model != self._settings.model:
                message = f"The model `{asked.model}` does not exist."
                return _json(error_body(404, "NotFoundError", message, "model"), 404)
            if rank is None:
                return self._no_such_rank(asked)
            generation = self._deployment.submit(rank, asked.prompt_tokens, asked.output_tokens)
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

    def _rank(self, number: str | None) -> int | None:
        """Return the worker that a request goes to, None where it names one that is not here."""
        ranks, cluster = self._ranks, self._deployment.cluster
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
    """The metrics of the workers behind one port under vLLM's names and labels."""

    def __init__(self, ranks: range, settings: EmulatorSettings, deployment: Deployment) -> None:
        self._ranks = ranks
        self._settings = settings
        self._deployment = deployment

    def collect(self) -> list[Metric]:
        """Return the families that load balancers read."""
        deployment, cluster = self._deployment, self._deployment.cluster
        running = [int(requests) for requests in cluster.running]
        return [
            self._family(GaugeMetricFamily, "vllm:num_requests_running", "Requests that run", running),
            self._family(
                GaugeMetricFamily, "vllm:num_requests_waiting", "Requests that wait", cluster.queued
            ),
            *self._cache(),
            self._family(CounterMetricFamily, "vllm:num_preemptions", "Preemptions", cluster.preempted),
            self._family(
                CounterMetricFamily, "vllm:prompt_tokens", "Prefill tokens", deployment.prompt_tokens_total
            ),
            self._family(
                CounterMetricFamily,
                "vllm:generation_tokens",
                "Generation tokens",
                deployment.output_tokens_total,
            ),
        ]

    def _cache(self) -> list[Metric]:
        """Return what workers with a KV cache of known size say of it; usage has no meaning without."""
        capacity = self._settings.cluster.kv_capacity_tokens
        if capacity is None:
            return []
        config = GaugeMetricFamily(
            "vllm:cache_config_info", "The cache's configuration", labels=("engine", "kv_cache_size_tokens")
        )
        for rank in self._ranks:
            config.add_metric([str(rank), str(capacity)], 1)
        usage = [int(tokens) / capacity for tokens in self._deployment.cluster.kv_tokens]
        text = "KV-cache usage, 1 is full"
        return [self._family(GaugeMetricFamily, "vllm:kv_cache_usage_perc", text, usage), config]

    def _family(
        self,
        kind: type[GaugeMetricFamily | CounterMetricFamily],
        name: str,
        text: str,
        values: Sequence[float],
    ) -> Metric:
        """Return a family with the value of each worker here, of ``values`` by worker."""
        family = kind(name, text, labels=_LABEL_NAMES)
        for rank in self._ranks:
            family.add_metric([self._settings.model, str(rank)], values[rank])
        return family


@dataclass(frozen=True, slots=True)
class RunningEmulator:
    """An emulator that listens: its URLs, and the deployment behind them."""

    urls: tuple[str, ...]
    deployment: Deployment


@asynccontextmanager
async def running_emulator(settings: EmulatorSettings) -> AsyncIterator[RunningEmulator]:
    """Serve the deployment for as long as the block runs; raises InvalidInputError when a port is taken."""
    deployment = Deployment(settings.cluster, settings.speed)
    runners: list[web.AppRunner] = []
    stepping = asyncio.create_task(deployment.run())
    try:
        workers, width = range(settings.cluster.workers), settings.ranks_per_url
        urls = [
            await _serve(
                runners, Worker(workers[first : first + width], settings, deployment), settings, index
            )
            for index, first in enumerate(workers[::width])
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
