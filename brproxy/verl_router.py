"""A rollout router for verl, which takes one by its fully qualified name: ``brproxy.verl_router.VerlRouter``.

verl (``verl/workers/rollout/router.py``) makes a Ray actor of the class that ``rollout.router_config_path``
names, with its servers and that file's keys, asks it for a server before each generation and tells it after.
Nothing of verl or Ray is needed here. Methods that wait are coroutines, so that Ray runs them beside each
other: a request that finds no slot waits here, and the longest expected goes first.

verl does not say how many tokens came. In a barrier group each request gets one in every step, so time tells:
``step_s`` is how long one takes, and only its relation to prompts matters. What runs together is one batch:
it ends when nobody runs or waits. A conversation has one ``request_id`` and stays near its KV cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from pydantic import Field

from brproxy.balancer import Balancer, PendingRequest, RequestId, WorkerLimits
from brproxy.clock import Clock, MonotonicClock
from brproxy.config_sections import Seconds
from brproxy.sessions import SessionLimits
from brproxy.validation import Section, validate


class VerlRouterSection(Section):
    """The keys of verl's router file beside ``router_class``."""

    router_class: str = ""
    slots: int = Field(default=256, ge=1, description="Requests that a server runs at once.")
    kv_capacity_tokens: int | None = Field(default=None, ge=1, description="A server's KV cache (tokens).")
    step_s: Seconds = Field(default=0.03, description="A decode step (seconds).")
    policy: str = Field(default="br-0", description="Name of the routing policy.")
    predictor: str = Field(default="exact-match", description="Name of the predictor.")


class _Running:
    """A generation that has a server: since when it decodes, and what is booked of it (tokens)."""

    def __init__(self, server_id: str, since_s: float) -> None:
        self.server_id = server_id
        self.since_s = since_s
        self.tokens = 0


class VerlRouter:
    """verl's ``RequestLoadBalancer``: ``servers`` are handles by id, ``router_kwargs`` the file's keys.

    Raises ConfigError, a line for each mistake.
    """

    def __init__(
        self, servers: Mapping[str, Any], router_kwargs: Mapping[str, Any], clock: Clock | None = None
    ) -> None:
        self._own: VerlRouterSection = validate(VerlRouterSection, dict(router_kwargs), "router_config_path")
        self._clock = clock or MonotonicClock()
        self._handles: dict[str, Any] = {}
        self._balancer = Balancer(
            {}, policy=self._own.policy, predictor=self._own.predictor, sessions=SessionLimits()
        )
        self._running: dict[RequestId, _Running] = {}
        # verl's ids are those of conversations, so there may be several with one.
        self._by_name: dict[str | None, list[RequestId]] = {}
        self._waiters: dict[RequestId, asyncio.Future[str]] = {}
        self._batch = 0
        self.add_servers(servers)

    def require_acquire_fields(self) -> list[str]:
        """Return what of a generation ``acquire_server`` is told."""
        return ["prompt_ids", "sampling_params"]

    def require_release_fields(self) -> list[str]:
        """Return what of a generation ``release_server`` is told."""
        return ["request_id"]

    async def acquire_server(
        self,
        request_id: str,
        prompt_ids: Sequence[int] | None = None,
        sampling_params: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> tuple[str, Any]:
        """Wait for a server, and return its id and its handle; raises RuntimeError where there is none."""
        if not self._handles:
            # verl retries on these words.
            msg = "No available servers in load balancer"
            raise RuntimeError(msg)
        if not self._running and not self._balancer.waiting:
            self._batch += 1
        own = self._balancer.enter(
            PendingRequest(
                len(prompt_ids or ()),
                output_tokens_max=_tokens_max(sampling_params or {}),
                prompt_hash=_hash(np.array(prompt_ids, dtype=np.int64).tobytes()) if prompt_ids else None,
                session_keys=(_hash(request_id.encode()),),
                batch=str(self._batch),
            ),
            self._clock.now_s(),
        )
        waiter = self._waiters[own] = asyncio.get_running_loop().create_future()
        try:
            self._decide()
            server_id = await waiter
        except BaseException:
            self._give_up(own)
            raise
        finally:
            del self._waiters[own]
        self._by_name.setdefault(request_id, []).append(own)
        return server_id, self._handles.get(server_id)

    async def release_server(self, server_id: str, request_id: str | None = None, **_: Any) -> None:
        """Take in that a generation is over; one that nobody knows is ignored."""
        named = self._by_name.get(request_id, [])
        own = next((each for each in named if self._running[each].server_id == server_id), None)
        if own is None:
            return
        named.remove(own)
        if not named:
            del self._by_name[request_id]
        self._catch_up()
        del self._running[own]
        self._balancer.end(own, self._clock.now_s())
        self._decide()

    def add_servers(self, servers: Mapping[str, Any]) -> None:
        """Take in servers; of one that is there already only the handle is another."""
        limits = WorkerLimits(self._own.slots, self._own.kv_capacity_tokens)
        for server_id, handle in servers.items():
            if server_id not in self._handles:
                self._balancer.add(server_id, limits)
            self._handles[server_id] = handle

    def remove_servers(self, server_ids: Sequence[str]) -> None:
        """Have servers get no more; what runs there is released as ever."""
        for server_id in server_ids:
            if self._handles.pop(server_id, None) is not None:
                self._balancer.remove(server_id)

    def get_all_servers(self) -> list[str]:
        """Return the ids of the servers."""
        return list(self._handles)

    def get_inflight_count(self, server_id: str) -> int:
        """Return how many generations a server has."""
        return self._balancer.requests.get(server_id, 0)

    def get_status(self) -> dict[str, Any]:
        """Return how things stand, with verl's own keys and what waits."""
        servers = {server_id: self.get_inflight_count(server_id) for server_id in self._handles}
        return {
            "servers": servers,
            "total_inflight": sum(servers.values()),
            "active_servers": len(servers),
            "registered_handles": list(self._handles),
            "waiting": self._balancer.waiting,
            "kv_tokens": self._balancer.kv_tokens,
        }

    def _decide(self) -> None:
        self._catch_up()
        now_s = self._clock.now_s()
        for own, server_id in self._balancer.decide(now_s):
            waiter = self._waiters.get(own)
            if server_id is not None:
                self._running[own] = _Running(server_id, now_s)
            if waiter is None or waiter.done():
                # Whoever waited for it is about to give it up.
                continue
            if server_id is None:
                waiter.set_exception(RuntimeError("no server could be chosen for the request"))
            else:
                waiter.set_result(server_id)

    def _catch_up(self) -> None:
        """Book the tokens that running generations must have had by now."""
        now_s = self._clock.now_s()
        for own, running in self._running.items():
            tokens = int((now_s - running.since_s) / self._own.step_s)
            if tokens > running.tokens:
                self._balancer.grow(own, tokens - running.tokens, now_s)
                running.tokens = tokens

    def _give_up(self, own: RequestId) -> None:
        """End a request that nobody waits for any more, unless it has ended."""
        if self._running.pop(own, None) is not None or self._balancer.is_waiting(own):
            self._balancer.end(own, self._clock.now_s(), finished=False)
            self._decide()


def _tokens_max(sampling_params: Mapping[str, Any]) -> int | None:
    limit = sampling_params.get("max_tokens", sampling_params.get("max_new_tokens"))
    return limit if isinstance(limit, int) and limit > 0 else None


def _hash(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest())
