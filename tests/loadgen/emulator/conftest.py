"""Emulators over real sockets, and what is asked of them."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass

import aiohttp
import orjson
import pytest

from loadgen.cluster_settings import ClusterSettings
from loadgen.emulator.server import EmulatorSettings, RunningEmulator, running_emulator


@pytest.fixture
async def stack():
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def client(stack):
    return await stack.enter_async_context(aiohttp.ClientSession())


@pytest.fixture
def until():
    async def until(condition):
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.001)

    return until


@dataclass
class Legs:
    """A prefill and a decode deployment side by side, and a client of both."""

    client: aiohttp.ClientSession
    prefill: RunningEmulator
    decode: RunningEmulator

    def post(self, url, *, headers=None, chat=False, **document):
        text = "x " * 20
        prompt = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        return self.client.post(url + path, json={"model": "emulated"} | prompt | document, headers=headers)

    async def ask(self, url, **more):
        async with self.post(url, **more) as response:
            return response.status, orjson.loads(await response.read())

    async def stream(self, url, **more):
        """Return the documents of a stream that ends with [DONE]."""
        async with self.post(url, stream=True, **more) as response:
            assert response.status == 200
            *data, last = [event[6:] for event in (await response.read()).split(b"\n\n")[:-1]]
        assert last == b"[DONE]"
        return [orjson.loads(event) for event in data]

    async def error(self, url, *, stream=False, **more):
        if stream:
            (document,) = await self.stream(url, **more)
            return 200, document["error"]
        status, document = await self.ask(url, **more)
        return status, document["error"]

    async def stats(self, url):
        async with self.client.get(url + "/emulator/stats") as response:
            return orjson.loads(await response.read())

    async def handover(self, emulator=None):
        return (await self.stats((emulator or self.prefill).urls[0]))["handover"]

    async def held(self):
        handover = await self.handover()
        return handover["held_requests"], handover["held_tokens"]

    async def metric(self, url, name):
        """Return the values of a metric, one for each rank behind ``url``."""
        async with self.client.get(url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{")]


@pytest.fixture
def start_legs(stack, client):
    async def start(transfer, *, prefill_workers=1, decode_workers=2, decode=None, prefill=None, **common):
        """Start both; ``common`` settings are of clusters where those have them."""
        of_cluster = {"slots", "kv_capacity_tokens", "step_base_s"} & common.keys()
        cluster = {"slots": 8, "step_s_per_kv_token": 0.0} | {name: common.pop(name) for name in of_cluster}
        # No lease ends because the machine is slow.
        common = {"speed": 50.0, "lease_s": 100_000.0} | common
        common |= {"transfer": transfer, "sglang": transfer == "sglang"}
        started = [
            await stack.enter_async_context(
                running_emulator(
                    EmulatorSettings(
                        ClusterSettings(workers, **cluster), **common | {"role": role} | (own or {})
                    )
                )
            )
            for role, workers, own in (
                ("prefill", prefill_workers, prefill),
                ("decode", decode_workers, decode),
            )
        ]
        return Legs(client, *started)

    return start
