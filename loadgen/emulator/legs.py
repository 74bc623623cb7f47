"""How one request is served where prefill and decode are apart: a class for each kind of leg."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from brproxy.types import InvalidInputError
from loadgen.emulator.decode_side import DecodeSide
from loadgen.emulator.deployment import Deployment, Generation
from loadgen.emulator.handover_wire import (
    PARAMS,
    Place,
    TransferFailedError,
    conflict,
    metaserver_post,
    params_of,
    read_origin,
    read_rank,
    read_room,
    read_transfer_id,
    reply_params,
    room_place,
)
from loadgen.emulator.prefill_side import PrefillSide
from loadgen.emulator.settings import EmulatorSettings, Role, Transfer
from loadgen.emulator.wire import GenerationRequest

RECOMPUTED = "recomputed"


class Leg:
    """A request that one worker serves by itself; ``request_id`` is the engine's."""

    def __init__(self, server: Legs, asked: GenerationRequest, request_id: str, worker: int) -> None:
        self.asked = asked
        self._server = server
        self._deployment = server.deployment
        self._request_id = request_id
        self._worker = worker
        self._generation: Generation | None = None

    async def start(self) -> Generation:
        """Have the request run; raises TransferFailedError where its KV does not come."""
        return self._submit()

    def reply(self) -> dict[str, Any]:
        """Return what the whole answer has besides what every answer has."""
        return {}

    def close(self) -> None:
        """Forget the request: done, failed or its client has left."""
        if self._generation is not None:
            self._deployment.leave(self._generation)

    def _submit(self, *, remote: bool = False) -> Generation:
        prompt_tokens, output_tokens = self.asked.prompt_tokens, self.asked.output_tokens
        generation = self._deployment.submit(self._worker, prompt_tokens, output_tokens, remote=remote)
        self._generation = generation
        return generation


class HeldLeg(Leg):
    """A prefill whose KV waits for a decode worker (nixl, ascend and mooncake)."""

    def __init__(self, server: Legs, asked: GenerationRequest, request_id: str, worker: int) -> None:
        super().__init__(server, asked, request_id, worker)
        # As vLLM: a suffix of its own, since a client's id may come twice.
        self._held_id = f"{request_id}-{uuid.uuid4().hex[:8]}"
        if server.is_mooncake:
            self._held_id = read_transfer_id(params_of(asked.handles))

    async def start(self) -> Generation:
        """Have the prefill run; its KV is held with its last token."""
        generation = self._submit()
        # With the last token, before the next step: in between somebody else could take the room.
        generation.on_done = self._hold
        return generation

    def _hold(self) -> None:
        self._gone = self._server.prefill.hold(self._worker, self._held_id, self.asked.prompt_tokens)

    def reply(self) -> dict[str, Any]:
        """Return the handles of what is held."""
        if self._server.is_mooncake:
            return {PARAMS: None}
        engine, tokens = self._server.prefill.engines[self._worker], self.asked.prompt_tokens
        settings = self._server.settings
        params = reply_params(settings.transfer or "", self._server.origin, engine, self._held_id, tokens)
        return {PARAMS: params}


class RoomLeg(HeldLeg):
    """A prefill that begins when the decode worker is there, and answers when it has its KV (sglang)."""

    def __init__(self, server: Legs, asked: GenerationRequest, request_id: str, worker: int) -> None:
        # Whatever the request asks for: the rest is the decode worker's.
        first_token = replace(asked, output_tokens=1, length_limited=True)
        super().__init__(server, first_token, request_id, worker)
        self._room = read_room(asked.handles)
        self._held_id = str(self._room)

    async def start(self) -> Generation:
        """Wait for the decode worker, have the prefill run and its KV fetched."""
        ranks, rank = len(self._server.ranks), self._worker - self._server.ranks.start
        named = read_rank(self.asked.handles, "disagg_prefill_dp_rank")
        if named is None and rank != self._room % ranks:
            raise TransferFailedError(conflict(rank, self._room, ranks))
        prefill = self._server.prefill
        if not await prefill.wanted(self._worker, self._held_id):
            raise TransferFailedError(f"Request {self._request_id} timed out when bootstrapping")
        generation = await super().start()
        await generation.more_than(self.asked.output_tokens - 1)
        if not await self._gone:
            raise TransferFailedError(f"Prefill transfer failed for request {self._request_id}")
        return generation

    def reply(self) -> dict[str, Any]:
        """Return nothing: the room says all."""
        return {}


class SentLeg(Leg):
    """A prefill that sends its KV to where the request says (ascend-layerwise)."""

    async def start(self) -> Generation:
        """Have the prefill run and send its KV."""
        params = params_of(self.asked.handles)
        try:
            # Both legs have one request id: the decode worker knows its request by it.
            place = Place(
                read_origin(params, "remote"), str(params.get("remote_engine_id")), self._request_id
            )
        except InvalidInputError as error:
            raise TransferFailedError(str(error)) from error
        generation, prefill = self._submit(), self._server.prefill
        generation.on_done = lambda: self._hold(prefill)
        transfer_s = self._server.settings.transfer_s(self.asked.prompt_tokens)
        try:
            # Within: it is held with its last token, which nobody may be there to take.
            await generation.more_than(self.asked.output_tokens - 1)
            await asyncio.sleep(transfer_s / self._deployment.speed)
            await self._server.decode.deliver(place)
        finally:
            prefill.sent(self._worker, self._request_id)
        return generation

    def _hold(self, prefill: PrefillSide) -> None:
        prefill.hold(self._worker, self._request_id, self.asked.prompt_tokens)


class FetchedLeg(Leg):
    """A decode that fetches its KV once it has a slot and room (nixl, ascend, mooncake, sglang)."""

    _fetched = False

    async def start(self) -> Generation:
        """Fetch the KV and have the decode run."""
        server, generation = self._server, self._submit(remote=True)
        place = await server.decode.place(self.asked.handles)
        alive = asyncio.create_task(server.decode.keep_alive(place)) if server.is_nixl else None
        try:
            await self._deployment.admitted(generation)
            await server.decode.fetch(place)
        finally:
            if alive is not None:
                alive.cancel()
                with suppress(asyncio.CancelledError):
                    await alive
        self._fetched = True
        self._deployment.loaded(generation)
        return generation

    def close(self) -> None:
        """Forget the request, and have the KV freed that was not fetched."""
        super().close()
        if not self._fetched:
            self._server.decode.free_soon(self.asked.handles)


class AwaitedLeg(Leg):
    """A decode that has its prefill begun by a metaserver, and waits for the KV (ascend-layerwise)."""

    async def start(self) -> Generation:
        """Ask for the prefill, wait for its KV and have the decode run."""
        server, generation = self._server, self._submit(remote=True)
        await self._deployment.admitted(generation)
        engine = server.prefill.engines[self._worker]
        document = metaserver_post(server.origin, engine, self._request_id, self.asked.prompt_tokens)
        url = str(params_of(self.asked.handles).get("metaserver"))
        await server.decode.ask_metaserver(url, document, f"{engine}/{self._request_id}")
        self._deployment.loaded(generation)
        return generation


@dataclass(slots=True)
class Legs:
    """What the legs of requests at one server have in common; ``origin`` is its host and port."""

    settings: EmulatorSettings
    deployment: Deployment
    prefill: PrefillSide
    decode: DecodeSide
    ranks: range
    origin: tuple[str, int] = ("", 0)
    _random: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        """Seed each server of the deployment by itself."""
        self._random = np.random.default_rng([self.settings.seed, self.ranks.start])

    @property
    def is_mooncake(self) -> bool:
        """Tell whether legs meet by a transfer id."""
        return self.settings.transfer == Transfer.MOONCAKE

    @property
    def is_nixl(self) -> bool:
        """Tell whether the decode side renews leases."""
        return self.settings.transfer == Transfer.NIXL

    def kind(self, asked: GenerationRequest) -> type[Leg]:
        """Return what a request is served as; raises InvalidInputError where the engine answers 400."""
        transfer, role, params = self.settings.transfer, self.settings.role, params_of(asked.handles)
        if transfer is None:
            return Leg
        if transfer == Transfer.SGLANG:
            if role == Role.PREFILL:
                read_room(asked.handles)
                return RoomLeg
            room_place(asked.handles, self.settings.bootstrap_port)
            return FetchedLeg
        layerwise = transfer == Transfer.ASCEND_LAYERWISE
        if params.get("do_remote_decode") and role != Role.DECODE:
            return SentLeg if layerwise else HeldLeg
        if params.get("do_remote_prefill") and role != Role.PREFILL:
            return AwaitedLeg if layerwise else FetchedLeg
        return Leg

    def leg(self, asked: GenerationRequest, request_id: str, worker: int) -> Leg:
        """Return how to serve a request on ``worker``; raises InvalidInputError where that is a 400."""
        kind = self.kind(asked)
        share = self.settings.recomputed_share
        if self.settings.role == Role.DECODE and share and asked.output_tokens > 1:
            draw, tokens = self._random.random(), int(self._random.integers(1, asked.output_tokens))
            if draw < share:
                asked = replace(asked, output_tokens=tokens, length_limited=False, stop_reason=RECOMPUTED)
        return kind(self, asked, request_id, worker)

    def refused(self, asked: GenerationRequest) -> None:
        """Take in that a request is not served: what is kept for it is freed."""
        with suppress(InvalidInputError):
            if self.kind(asked) is FetchedLeg:
                self.decode.free_soon(asked.handles)
