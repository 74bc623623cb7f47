"""A real engine, a proxy in front of it, and what the engine says of itself.

``pytest tests/real_engines --real-vllm http://127.0.0.1:8101`` runs these tests. The engine should serve one
model with ``--max-num-seqs 8`` and be used by nobody else.
"""

import asyncio
from contextlib import AsyncExitStack

import aiohttp
import pytest

from brproxy.app import running_proxy
from brproxy.config import parse_config
from brproxy.engines.exposition import samples

PATIENCE_S = 120.0
GAUGES = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting")


class Engine:
    """A vLLM server: what it serves, and what its page of metrics says."""

    def __init__(self, url, session):
        self.url = url
        self.session = session
        self.model = ""
        self.block_tokens = self.blocks = 0

    async def look(self):
        async with self.session.get(self.url + "/v1/models") as response:
            self.model = (await response.json())["data"][0]["id"]
        (info,) = samples(await self.page(), ["vllm:cache_config_info"])[:1]
        self.block_tokens, self.blocks = int(info.labels["block_size"]), int(info.labels["num_gpu_blocks"])

    async def page(self):
        async with self.session.get(self.url + "/metrics") as response:
            return await response.read()

    async def gauges(self):
        """Return KV tokens in use, and the requests that run and wait."""
        found = {sample.name: sample.value for sample in samples(await self.page(), GAUGES)}
        used, running, waiting = (found.get(name, 0.0) for name in GAUGES)
        return used * (self.blocks - 1) * self.block_tokens, running, waiting

    async def idle(self):
        async with asyncio.timeout(PATIENCE_S):
            while any((await self.gauges())[1:]):
                await asyncio.sleep(0.02)


class Proxy:
    def __init__(self, running):
        self.url = f"http://127.0.0.1:{running.port}"
        self.group = running.service.groups["default"].group
        self.driver = running.service.groups["default"].driver

    @property
    def kv_tokens(self):
        """What is booked now, all that has streamed included."""
        self.driver.catch_up()
        return sum(self.group.dispatcher.ledger.kv_tokens)


@pytest.fixture
async def stack():
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def session(stack):
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    return await stack.enter_async_context(aiohttp.ClientSession(connector=connector, timeout=timeout))


@pytest.fixture
async def engine(request, session):
    url = request.config.getoption("--real-vllm")
    if url is None:
        pytest.skip("needs --real-vllm URL")
    engine = Engine(url.rstrip("/"), session)
    await engine.look()
    await engine.idle()
    return engine


@pytest.fixture
async def proxy(engine, stack):
    worker = {"url": engine.url, "slots": 8}
    document = {"listen": {"port": 0}, "worker": [worker], "log": {"level": "warning"}}
    return Proxy(await stack.enter_async_context(running_proxy(parse_config(document, "test"))))
