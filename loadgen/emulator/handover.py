"""What prefill workers keep for decode workers: KV by a key that both sides know, under a lease. Pure.

A key is what the form of transfer has: engine and request id, transfer id, or rank and room. What is kept
takes room on its worker until it was fetched, is freed or its lease ends.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

FREED_AHEAD_MAX = 10_000
"""Keys that are remembered because they were freed before there was anything to free."""


class Held(NamedTuple):
    """KV tokens that a worker keeps until an emulated time (seconds)."""

    worker: int
    kv_tokens: int
    until_s: float


@dataclass(slots=True)
class HandoverCounts:
    """What became of requests that were to be handed over; ``failed`` counts both sides' failures."""

    fetched_requests: int = 0
    fetched_tokens: int = 0
    freed_requests: int = 0
    expired_requests: int = 0
    failed_requests: int = 0


class Holdings:
    """The KV that the workers of a deployment keep; ``reserve(worker, kv_tokens)`` takes and gives its room.

    Times are emulated seconds.
    """

    def __init__(self, lease_s: float, reserve: Callable[[int, int], None]) -> None:
        self.counts = HandoverCounts()
        self._lease_s = lease_s
        self._reserve = reserve
        self._held: dict[str, Held] = {}
        self._held_tokens = self._held_tokens_max = 0
        self._freed_ahead: OrderedDict[str, float] = OrderedDict()

    @property
    def next_expiry_s(self) -> float | None:
        """When the first lease ends, None if nothing is held."""
        return min((held.until_s for held in self._held.values()), default=None)

    def hold(self, key: str, worker: int, kv_tokens: int, now_s: float) -> bool:
        """Keep the KV of a prefill that is done; False: nobody wants it any more, it is not kept."""
        self.expire(now_s)
        if self._freed_ahead.pop(key, None) is not None:
            self.counts.freed_requests += 1
            return False
        # A key that comes twice is a new request: nobody can tell the old one's KV from it.
        self.free(key, now_s)
        self._held[key] = Held(worker, kv_tokens, now_s + self._lease_s)
        self._room(worker, kv_tokens)
        self._held_tokens_max = max(self._held_tokens_max, self._held_tokens)
        return True

    def get(self, key: str, now_s: float) -> Held | None:
        """Return what is held under ``key``, None if nothing is (any more)."""
        self.expire(now_s)
        return self._held.get(key)

    def renew(self, key: str, now_s: float, for_s: float) -> bool:
        """Have a lease last for ``for_s`` seconds at least; False: there is none."""
        held = self.get(key, now_s)
        if held is None:
            return False
        self._held[key] = held._replace(until_s=max(held.until_s, now_s + for_s))
        return True

    def fetched(self, key: str, now_s: float) -> bool:
        """Let go of what has been fetched; False: it was gone before."""
        held = self._let_go(key, now_s)
        if held is None:
            return False
        self.counts.fetched_requests += 1
        self.counts.fetched_tokens += held.kv_tokens
        return True

    def free(self, key: str, now_s: float, *, ahead: bool = False) -> bool:
        """Let go of what nobody will fetch; False: there was nothing.

        ``ahead``: what is not held yet is not kept when it comes, for the length of a lease.
        """
        if self._let_go(key, now_s) is not None:
            self.counts.freed_requests += 1
            return True
        if ahead:
            self._freed_ahead[key] = now_s + self._lease_s
            while len(self._freed_ahead) > FREED_AHEAD_MAX:
                self._freed_ahead.popitem(last=False)
        return False

    def expire(self, now_s: float) -> list[str]:
        """Let go of what has been held for too long; return its keys."""
        expired = [key for key, held in self._held.items() if held.until_s <= now_s]
        for key in expired:
            held = self._held.pop(key)
            self._room(held.worker, -held.kv_tokens)
        self.counts.expired_requests += len(expired)
        while self._freed_ahead and next(iter(self._freed_ahead.values())) <= now_s:
            self._freed_ahead.popitem(last=False)
        return expired

    def stats(self, now_s: float) -> dict[str, int]:
        """Return what is held, the most that was held at a time since ``reset``, and the counts."""
        self.expire(now_s)
        held = {"held_requests": len(self._held), "held_tokens": self._held_tokens}
        return held | {"held_tokens_max": self._held_tokens_max} | asdict(self.counts)

    def reset(self) -> None:
        """Forget the counts; what is held stays."""
        self.counts = HandoverCounts()
        self._held_tokens_max = self._held_tokens

    def _room(self, worker: int, kv_tokens: int) -> None:
        self._held_tokens += kv_tokens
        self._reserve(worker, kv_tokens)

    def _let_go(self, key: str, now_s: float) -> Held | None:
        self.expire(now_s)
        held = self._held.pop(key, None)
        if held is not None:
            self._room(held.worker, -held.kv_tokens)
        return held
