"""Decode workers fetch KV from prefill workers, or have it sent; over HTTP between the emulated servers."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from brproxy.types import InvalidInputError
from loadgen.emulator.deployment import Deployment
from loadgen.emulator.handover_wire import (
    DELIVER_PATH,
    FETCH_PATH,
    FREE_PATH,
    QUERY_PATH,
    RENEW_PATH,
    Place,
    TransferFailedError,
    held_place,
    mooncake_ids,
    params_of,
    queried_url,
    read_named,
    room_place,
)
from loadgen.emulator.settings import EmulatorSettings, Transfer
from loadgen.emulator.signals import Signals

_KEEPALIVE_S = 3.0
"""Servers close idle connections after five seconds; whoever uses one then is late."""

_CALL_S = 10.0
"""Real seconds that a call between emulated workers may take which waits for nothing."""

_ANSWER_BYTES_MAX = 1 << 20


class DecodeSide:
    """The calls of one deployment's workers to other deployments; ``aclose`` ends them."""

    def __init__(self, settings: EmulatorSettings, deployment: Deployment) -> None:
        self._settings = settings
        self._deployment = deployment
        self._delivered = Signals()
        self._background: set[asyncio.Task[None]] = set()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
        )

    @property
    def wait_s(self) -> float:
        """Real seconds that one side waits for the other."""
        return self._settings.wait_s / self._deployment.speed

    async def aclose(self) -> None:
        """End all calls."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._session.close()

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run what nobody waits for."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def place(self, handles: Mapping[str, Any]) -> Place:
        """Return where a request's KV is; raises TransferFailedError or InvalidInputError."""
        transfer = self._settings.transfer
        if transfer == Transfer.SGLANG:
            return room_place(handles, self._settings.bootstrap_port)
        if transfer != Transfer.MOONCAKE:
            return held_place(params_of(handles))
        url, place = mooncake_ids(params_of(handles))
        status, page = await self._call("GET", url + QUERY_PATH, None, _CALL_S)
        if status != 200:
            raise TransferFailedError(f"the bootstrap server answered {status}")
        return place._replace(url=queried_url(_parsed(page), place.engine))

    async def fetch(self, place: Place) -> None:
        """Wait until KV has come; raises TransferFailedError."""
        # The prefill worker ends what takes too long; if it is it that does not answer, this does.
        status, page = await self._call(
            "POST", place.url + FETCH_PATH, place.document(), 2 * self.wait_s + _CALL_S
        )
        if status != 200:
            raise TransferFailedError(f"the prefill worker answered {status}: {page[:200]!r}")

    async def keep_alive(self, place: Place) -> None:
        """Renew a lease until cancelled, a sixth of it apart (nixl)."""
        while True:
            await asyncio.sleep(self.wait_s / 6)
            try:
                await self._call("POST", place.url + RENEW_PATH, place.document(), _CALL_S)
            except TransferFailedError:
                return

    def free_soon(self, handles: Mapping[str, Any]) -> None:
        """Have the prefill worker free what will not be fetched; nobody waits for it."""
        self.background(self._free(handles))

    async def _free(self, handles: Mapping[str, Any]) -> None:
        try:
            place = await self.place(handles)
            await self._call("POST", place.url + FREE_PATH, place.document(), _CALL_S)
        except (TransferFailedError, InvalidInputError):
            # Then its lease ends.
            return

    async def ask_metaserver(self, url: str, document: Mapping[str, Any], key: str) -> None:
        """Have a prefill begin and wait until its KV is here; raises TransferFailedError."""
        delivered = self._delivered.expect(key)
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        # It goes on where the client leaves, or the KV comes before the answer: as the engine's own thread.
        self.background(self._post(url, document, answer))
        try:
            async with asyncio.timeout(self.wait_s):
                either: set[asyncio.Future[Any]] = {delivered, answer}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not delivered.done() and answer.result():
                    raise TransferFailedError(f"the metaserver failed: {answer.result()}")
                await delivered
        except TimeoutError as error:
            raise TransferFailedError("no KV came in time") from error
        finally:
            delivered.cancel()

    async def _post(self, url: str, document: Mapping[str, Any], answer: asyncio.Future[str]) -> None:
        try:
            status, _ = await self._call("POST", url, document, self.wait_s)
            answer.set_result("" if status < 400 else f"status {status}")
        except TransferFailedError as error:
            answer.set_result(str(error))

    async def deliver(self, place: Place) -> None:
        """Tell a decode worker that its KV is there; raises TransferFailedError."""
        status, _ = await self._call("POST", place.url + DELIVER_PATH, place.document(), _CALL_S)
        if status != 200:
            raise TransferFailedError(f"the decode worker answered {status}")

    async def delivered(self, request: web.Request) -> web.Response:
        """Serve ``DELIVER_PATH``."""
        try:
            engine, request_id = read_named(orjson.loads(await request.read()))
        except (InvalidInputError, orjson.JSONDecodeError) as error:
            return web.json_response({"error": str(error)}, status=400)
        found = self._delivered.tell(f"{engine}/{request_id}", good=True)
        return web.json_response({}, status=200 if found else 404)

    async def _call(
        self, method: str, url: str, document: Mapping[str, Any] | None, timeout_s: float
    ) -> tuple[int, bytes]:
        timeout, body = aiohttp.ClientTimeout(total=timeout_s), b""
        try:
            async with self._session.request(method, url, json=document, timeout=timeout) as response:
                async for part in response.content.iter_any():
                    body += part
                    if len(body) > _ANSWER_BYTES_MAX:
                        raise TransferFailedError(f"{url} answers more than {_ANSWER_BYTES_MAX} bytes")
                return response.status, body
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise TransferFailedError(f"{url} cannot be reached: {reason}") from error


def _parsed(page: bytes) -> object:
    try:
        return orjson.loads(page)
    except orjson.JSONDecodeError as error:
        raise TransferFailedError(f"the bootstrap server answers no JSON: {error}") from error
