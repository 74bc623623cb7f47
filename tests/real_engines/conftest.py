"""Real engines, a proxy in front of them, and what the engines say of themselves.

``pytest tests/real_engines --real-vllm http://127.0.0.1:8101`` runs the tests of one vLLM; other options name
other engines, and what needs one that is not named is skipped. Each engine should serve one model with eight
slots (vLLM: ``--max-num-seqs 8``) and be used by nobody else.
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
FETCHED = "vllm:external_prefix_cache_hits_total"


class Engine:
    """An engine that listens at ``url``: the model that it serves, and what its KV cache is given out by."""

    block_tokens = 1

    def __init__(self, url, session):
        self.url = url
        self.session = session
        self.model = ""

    async def look(self):
        async with self.session.get(self.url + "/v1/models") as response:
            self.model = (await response.json())["data"][0]["id"]

    async def page(self, path):
        async with self.session.get(self.url + path) as response:
            return await response.read()

    async def gauges(self):
        """Return KV tokens in use, and the requests that run and wait."""
        raise NotImplementedError

    async def idle(self):
        async with asyncio.timeout(PATIENCE_S):
            while any((await self.gauges())[1:]):
                await asyncio.sleep(0.02)


class Vllm(Engine):
    """A vLLM server: what it serves, and what its page of metrics says."""

    def __init__(self, url, session):
        super().__init__(url, session)
        self.block_tokens = self.blocks = 0

    async def look(self):
        await super().look()
        (info,) = samples(await self.page("/metrics"), ["vllm:cache_config_info"])[:1]
        self.block_tokens, self.blocks = int(info.labels["block_size"]), int(info.labels["num_gpu_blocks"])

    async def sum_of(self, name):
        return sum(sample.value for sample in samples(await self.page("/metrics"), [name]))

    async def gauges(self):
        """See Engine.gauges."""
        page = samples(await self.page("/metrics"), GAUGES)
        found = {sample.name: sample.value for sample in page}
        used, running, waiting = (found.get(name, 0.0) for name in GAUGES)
        return used * (self.blocks - 1) * self.block_tokens, running, waiting


class Proxy:
    """A running proxy, and its books of one group."""

    def __init__(self, running):
        self.url = f"http://127.0.0.1:{running.port}"
        self.services = running.service.groups

    def booked(self, group="default"):
        """Return the KV tokens that are booked now, all that has streamed included."""
        self.services[group].driver.catch_up()
        return sum(self.ledger(group).kv_tokens)

    def ledger(self, group="default"):
        return self.services[group].group.dispatcher.ledger


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
def open_engine(request, session):
    async def open_at(option, kind=Vllm):
        url = request.config.getoption(option)
        if url is None:
            pytest.skip(f"needs {option} URL")
        engine = kind(url.rstrip("/"), session)
        await engine.look()
        await engine.idle()
        return engine

    return open_at


@pytest.fixture
def start_proxy(stack):
    async def start(*workers, **tables):
        document = {"listen": {"port": 0}, "worker": list(workers), "log": {"level": "warning"}} | tables
        return Proxy(await stack.enter_async_context(running_proxy(parse_config(document, "test"))))

    return start
