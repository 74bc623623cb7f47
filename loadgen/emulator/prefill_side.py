"""Prefill workers keep KV and send it: what is held, its leases on the clock, the requests that fetch it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable

import orjson
from aiohttp import web

from brproxy.types import InvalidInputError
from loadgen.emulator.deployment import Deployment
from loadgen.emulator.handover import Holdings
from loadgen.emulator.handover_wire import (
    FETCH_PATH,
    FREE_PATH,
    QUERY_PATH,
    RENEW_PATH,
    query_page,
    read_named,
)
from loadgen.emulator.settings import EmulatorSettings, Transfer
from loadgen.emulator.signals import Signals

RENEWED_SHARE = 2 / 3
"""Part of a lease that a sign of life of the decode worker adds (nixl: 20 of 30 seconds)."""

TOGETHER = frozenset({Transfer.MOONCAKE, Transfer.SGLANG})
"""Forms in which both legs are sent at once, so that either side waits for the other."""


class PrefillSide:
    """What the workers of one deployment keep for others; ``engines`` are their ids by worker."""

    def __init__(self, settings: EmulatorSettings, deployment: Deployment) -> None:
        self.holdings = Holdings(settings.wait_s, deployment.reserve)
        name = uuid.uuid4().hex
        self.engines = [f"{name}_dp{worker}" for worker in range(settings.cluster.workers)]
        self._settings = settings
        self._deployment = deployment
        self._held, self._wanted, self._gone = Signals(), Signals(), Signals()
        self._fetching: dict[str, int] = {}
        self._timer: asyncio.TimerHandle | None = None

    def key(self, worker: int, request_id: str) -> str:
        """Return what a request's KV on ``worker`` is held under."""
        return f"{self.engines[worker]}/{request_id}"

    def hold(self, worker: int, request_id: str, kv_tokens: int) -> asyncio.Future[bool]:
        """Keep the KV of a prefill that is done; the future tells whether it was fetched."""
        key = self.key(worker, request_id)
        gone = self._gone.expect(key)
        if self.holdings.hold(key, worker, kv_tokens, self._deployment.now_s()):
            self._held.tell(key, good=True)
            self._arm()
        else:
            self._gone.tell(key, good=False)
        return gone

    def sent(self, worker: int, request_id: str) -> None:
        """Let go of KV that the prefill worker itself has sent."""
        self._let_go(self.key(worker, request_id), fetched=True)

    async def wanted(self, worker: int, request_id: str) -> bool:
        """Wait until the decode worker asks for a request's KV; False: it did not come in time."""
        key = self.key(worker, request_id)
        return key in self._fetching or await self._wanted.wait(key, self._real_s(self._settings.wait_s))

    def close(self) -> None:
        """Stop the clock of leases."""
        if self._timer is not None:
            self._timer.cancel()

    def routes(self, ranks: range) -> list[web.RouteDef]:
        """Return what the server of ``ranks`` serves to decode workers."""

        def named(serve: Callable[[str], Awaitable[web.Response]]) -> Callable[..., Awaitable[web.Response]]:
            async def handler(request: web.Request) -> web.Response:
                try:
                    key = self._key_of(orjson.loads(await request.read()), ranks)
                except (InvalidInputError, orjson.JSONDecodeError) as error:
                    return web.json_response({"error": str(error)}, status=400)
                return await serve(key)

            return handler

        paths = {FETCH_PATH: self._fetch, FREE_PATH: self._free, RENEW_PATH: self._renew}
        return [web.post(path, named(serve)) for path, serve in paths.items()]

    def bootstrap(self, ranks: range, url: str) -> web.Application:
        """Return what the server of ``ranks``, itself at ``url``, serves on its bootstrap port."""
        page = query_page({worker - self._first(ranks): self.engines[worker] for worker in ranks}, url)

        async def query(_request: web.Request) -> web.Response:
            return web.json_response(page)

        app = web.Application()
        app.router.add_routes([web.get(QUERY_PATH, query), *self.routes(ranks)])
        return app

    def _key_of(self, document: object, ranks: range) -> str:
        engine, request_id = read_named(document)
        if self._settings.transfer != Transfer.SGLANG:
            return f"{engine}/{request_id}"
        if not request_id.isdecimal() or not (engine or "0").isdecimal():
            msg = f"rank and room must be numbers, got {engine!r} and {request_id!r}"
            raise InvalidInputError(msg)
        worker = self._first(ranks) + int(engine) if engine else ranks[int(request_id) % len(ranks)]
        if worker not in ranks:
            msg = f"there are {len(ranks)} ranks, got rank {engine}"
            raise InvalidInputError(msg)
        return self.key(worker, request_id)

    def _first(self, ranks: range) -> int:
        """Return the worker whose rank's number is 0."""
        return 0 if self._settings.ranks_are_global else ranks.start

    async def _fetch(self, key: str) -> web.Response:
        settings = self._settings
        self._fetching[key] = self._fetching.get(key, 0) + 1
        try:
            self._wanted.tell(key, good=True)
            held = self.holdings.get(key, self._deployment.now_s())
            if held is None and settings.transfer in TOGETHER:
                await self._held.wait(key, self._real_s(settings.wait_s))
                held = self.holdings.get(key, self._deployment.now_s())
            if held is None:
                return web.json_response({"error": "nothing is held under this id (any more)"}, status=404)
            transfer_s = settings.transfer_s(held.kv_tokens)
            self.holdings.renew(key, self._deployment.now_s(), transfer_s + settings.wait_s)
            await asyncio.sleep(self._real_s(transfer_s))
        finally:
            self._fetching[key] -= 1
            if not self._fetching[key]:
                del self._fetching[key]
        if not self._let_go(key, fetched=True):
            return web.json_response({"error": "it was freed while it was fetched"}, status=404)
        return web.json_response({"kv_tokens": held.kv_tokens})

    async def _free(self, key: str) -> web.Response:
        self._let_go(key, fetched=False)
        return web.json_response({})

    async def _renew(self, key: str) -> web.Response:
        lease_s = self._settings.wait_s * RENEWED_SHARE
        found = self.holdings.renew(key, self._deployment.now_s(), lease_s)
        return web.json_response({}, status=200 if found else 404)

    def _let_go(self, key: str, *, fetched: bool) -> bool:
        now_s = self._deployment.now_s()
        if fetched:
            found = self.holdings.fetched(key, now_s)
        else:
            found = self.holdings.free(key, now_s, ahead=self._settings.transfer in TOGETHER)
        self._gone.tell(key, good=fetched and found)
        return found

    def _arm(self) -> None:
        """Have the clock look when the first lease ends."""
        expiry_s = self.holdings.next_expiry_s
        if self._timer is None and expiry_s is not None:
            wait_s = self._real_s(max(0.0, expiry_s - self._deployment.now_s()))
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._expire)

    def _expire(self) -> None:
        self._timer = None
        for key in self.holdings.expire(self._deployment.now_s()):
            self._gone.tell(key, good=False)
        self._arm()

    def _real_s(self, emulated_s: float) -> float:
        return emulated_s / self._deployment.speed
