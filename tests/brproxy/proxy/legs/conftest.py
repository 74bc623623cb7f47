"""Prefill and decode workers of each kind, and a proxy in front of them."""

import asyncio
import json

import aiohttp
import pytest

from loadgen.cluster import ClusterSettings
from loadgen.emulator.server import EmulatorSettings, running_emulator
from tests.brproxy.proxy.legs.shaping import Shaper

TRANSFERS = ["nixl", "ascend", "mooncake", "sglang", "ascend-layerwise"]
WORDS = "one two three four five"


class Pair:
    """Prefill and decode workers, and the proxy that splits requests between them."""

    def __init__(self, transfer, prefill, decode, proxy, client):
        self.transfer = transfer
        self.prefill = prefill
        self.decode = decode
        self.proxy = proxy
        self._client = client

    @property
    def decodes(self):
        """The ledger of the workers that decode."""
        return self.proxy.running.service.groups["default"].group.dispatcher.ledger

    @property
    def handover(self):
        return self.proxy.running.service.groups["default"].handover

    @property
    def counts(self):
        return self.handover.counts

    @property
    def held(self):
        """KV that prefill workers keep for others (tokens)."""
        return self.prefill.holdings.stats(self.prefill.deployment.now_s())["held_tokens"]

    async def ask(self, path="/v1/completions", headers=None, **document):
        body = {"model": "emulated", "prompt": WORDS, "max_tokens": 6} | document
        async with self._client.post(self.proxy.url + path, json=body, headers=headers) as response:
            return response.status, await response.read()

    async def broken(self, path, **document):
        """Return what comes of a stream that has no clean end."""
        received = b""

        async def read():
            nonlocal received
            body = {"model": "emulated"} | document
            async with self._client.post(self.proxy.url + path, json=body) as response:
                async for piece in response.content.iter_any():
                    received += piece

        with pytest.raises(aiohttp.ClientPayloadError):
            await read()
        return received

    async def text(self, **document):
        status, body = await self.ask(**document)
        assert status == 200, body
        if not document.get("stream"):
            return json.loads(body)["choices"][0]["text"]
        events = [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event]
        assert events[-1] == b"[DONE]"
        return "".join(
            choice["text"] for event in events[:-1] for choice in json.loads(event).get("choices", [])
        )


@pytest.fixture
def start_side(stack):
    async def start(transfer, role, workers, speed=20.0, **settings):
        cluster = ClusterSettings(workers=workers, slots=8, step_base_s=0.02)
        own = EmulatorSettings(
            cluster, speed=speed, role=role, transfer=transfer, sglang=transfer == "sglang", **settings
        )
        return await stack.enter_async_context(running_emulator(own))

    return start


@pytest.fixture
def shape(stack):
    """Return a function that puts a Shaper before the worker at a URL, and returns the URL of that."""

    async def start(url, pieces):
        host, _, port = url.removeprefix("http://").partition(":")
        server = await asyncio.start_server(Shaper((host, int(port)), pieces).handle, "127.0.0.1", 0)
        stack.push_async_callback(server.wait_closed)
        stack.callback(server.close)
        return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    return start


@pytest.fixture
def start_pair(start_side, start_proxy, client, unused_tcp_port, shape):
    """Return a function that starts a Pair; ``pieces``: see Shaper, of the workers that decode."""

    async def start(
        transfer,
        *,
        prefills=2,
        decodes=2,
        more=(),
        prefill_settings=None,
        decode_settings=None,
        pieces=None,
        **tables,
    ):
        prefill = await start_side(transfer, "prefill", prefills, **(prefill_settings or {}))
        decode = await start_side(transfer, "decode", decodes, **(decode_settings or {}))
        engine = "sglang" if transfer == "sglang" else "vllm"
        common = {"transfer": transfer, "engine": engine, "slots": 8}
        ports = [int(url.rpartition(":")[2]) for url in prefill.bootstrap_urls] or [8998] * prefills
        workers = [
            common | {"url": url, "role": "prefill", "bootstrap_port": port}
            for url, port in zip(prefill.urls, ports, strict=True)
        ]
        urls = decode.urls if pieces is None else [await shape(url, pieces) for url in decode.urls]
        workers += [common | {"url": url, "role": "decode"} for url in urls]
        workers += [common | worker for worker in more]
        proxy = await start_proxy([], workers=workers, listen={"port": unused_tcp_port}, **tables)
        return Pair(transfer, prefill, decode, proxy, client)

    return start
