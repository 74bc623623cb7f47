"""KV that simulated prefill workers keep for those that decode: who has what, for whom, and how it moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from loadgen.emulator.handover import Holdings
from tests.simulation.actions import Parted
from tests.simulation.loop import VirtualLoop
from tests.simulation.wire import Wire

FREED_BY_DECODE = frozenset({"nixl", "ascend"})
"""Transfers whose KV is freed by a decode leg that asks for nothing else."""

MAY_ASK_AGAIN = frozenset({"ascend", "ascend-layerwise"})
"""Transfers whose decode workers may give a request up and ask for another prefill."""

TOGETHER = frozenset({"mooncake", "sglang"})
"""Transfers whose legs wait for each other."""


@dataclass
class Kept:
    """KV of request ``ask_id`` at ``host``, under ``key``.

    ``wire`` has brought its handles once ``until_bytes`` have been taken of it. It is held from ``since_s``
    on, and nobody has to have it behind ``ends_s``; None: it was fetched or freed before.
    """

    ask_id: int
    host: str
    key: str
    wire: Wire
    since_s: float = 0.0
    until_bytes: int | None = None
    ends_s: float | None = None

    @property
    def is_told(self) -> bool:
        """Whether the proxy knows how it is fetched."""
        return self.until_bytes is not None and self.wire.transport.peer.taken_bytes >= self.until_bytes


class Board:
    """Has everybody look again whenever anything may have changed."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._changed: asyncio.Future[None] = loop.create_future()

    def changed(self) -> None:
        """Have all that wait look again."""
        self._changed.set_result(None)
        self._changed = self._loop.create_future()

    async def until(self, holds: Callable[[], bool], limit_s: float) -> bool:
        """Wait until ``holds``; return False where it does not within ``limit_s``."""
        ends_s = self._loop.time() + limit_s
        while not holds():
            left_s = ends_s - self._loop.time()
            if left_s <= 0:
                return False
            await asyncio.wait((self._changed,), timeout=left_s)
        return True


class Engine:
    """A prefill engine from its start to its death, with what it keeps."""

    def __init__(self, name: str, loop: VirtualLoop, lease_s: float) -> None:
        self.name = name
        self.is_alive, self.is_frozen = True, False
        self.kept: dict[str, Kept] = {}
        self.fetching: set[str] = set()
        self._loop = loop
        self._lease_s = lease_s
        self._holdings = Holdings(lease_s, lambda _worker, _tokens: None)

    def hold(self, key: str, kept: Kept) -> bool:
        """Keep KV; False: whoever was to fetch it has said already that nobody will."""
        self.kept[key] = kept
        kept.since_s = self._loop.time()
        kept.ends_s = kept.since_s + self._lease_s
        return self._holdings.hold(key, 0, 1, self._loop.time())

    def holds(self, key: str) -> bool:
        """Tell whether KV is there."""
        return self._holdings.get(key, self._loop.time()) is not None

    def renew(self, key: str, for_s: float) -> None:
        """Have KV stay for longer: somebody comes for it."""
        self.kept[key].ends_s = self._loop.time() + for_s
        self._holdings.renew(key, self._loop.time(), for_s)

    def fetched(self, key: str) -> bool:
        """Let go of KV that has been fetched; False: it was gone before."""
        self._let_go(key)
        return self._holdings.fetched(key, self._loop.time())

    def free(self, key: str, *, ahead: bool) -> None:
        """Let go of KV that nobody will fetch."""
        self._let_go(key)
        self._holdings.free(key, self._loop.time(), ahead=ahead)

    def ended_s(self, key: str) -> float:
        """Return how long ago the lease of KV has ended that nobody came for; 0 for any other (seconds)."""
        kept = self.kept.get(key)
        if kept is None or kept.ends_s is None or not self.is_alive:
            return 0.0
        return max(0.0, self._loop.time() - kept.ends_s)

    def _let_go(self, key: str) -> None:
        if self.holds(key):
            self.kept[key].ends_s = None

    def left(self, ask_id: int) -> list[tuple[str, Kept]]:
        """Return what is still kept for a request."""
        return [(key, kept) for key, kept in self.kept.items() if kept.ask_id == ask_id and self.holds(key)]


class Cluster:
    """All engines of a scenario, and what they are to do.

    Those that decode ``expected`` KV under these names, and ``delivered`` was that. KV may be asked for
    ``late_s`` seconds after the end of its lease, None: nobody can tell. ``out_s`` tells for how many seconds
    the proxy has had a host out, ``is_out`` whether it has. It trusts a lease for ``trusted_s``. ``is_calm``:
    nobody is in trouble.
    """

    def __init__(self, loop: VirtualLoop, parted: Parted) -> None:
        self.loop = loop
        self.parted = parted
        self.board = Board(loop)
        self.engines: dict[str, Engine] = {}
        self.expected: set[str] = set()
        self.delivered: set[str] = set()
        self.late_s: float | None = 0.1
        self.out_s: Callable[[str], int] = lambda _host: 0
        self.is_out: Callable[[str], bool] = lambda _host: False
        self.trusted_s = parted.lease_s
        self.is_calm = True
        self._names = 0

    def name(self, host: str) -> str:
        """Return a name that nobody has had."""
        self._names += 1
        return f"{host}-{self._names}"

    def start(self, host: str) -> Engine:
        """Start an engine."""
        engine = Engine(self.name(host), self.loop, self.parted.lease_s)
        self.engines[engine.name] = engine
        return engine

    def free(self, engine_name: str, key: str, transfer: str) -> None:
        """Have KV freed, as a decode worker does that will not fetch it."""
        engine = self.engines.get(engine_name)
        if engine is not None:
            engine.free(key, ahead=transfer in TOGETHER)
            self.board.changed()

    async def fetch(self, engine_name: str, key: str, transfer: str) -> bool:
        """Have KV come; False: it does not."""
        engine, board = self.engines.get(engine_name), self.board
        if engine is None or not engine.is_alive:
            return False
        wait_s = self.parted.wait_s
        engine.fetching.add(key)
        board.changed()
        try:
            if not await board.until(lambda: not engine.is_frozen or not engine.is_alive, wait_s):
                return False
            if transfer in TOGETHER:
                await board.until(lambda: engine.holds(key) or not engine.is_alive, wait_s)
            if not engine.is_alive or not engine.holds(key):
                return False
            engine.renew(key, self.parted.transfer_s + self.parted.lease_s)
            await asyncio.sleep(self.parted.transfer_s)
            return engine.is_alive and engine.fetched(key)
        finally:
            engine.fetching.discard(key)
            board.changed()

    async def send(self, name: str) -> bool:
        """Send KV to the decode worker that expects it under ``name``; False: nobody does."""
        await asyncio.sleep(self.parted.transfer_s)
        if name not in self.expected:
            return False
        self.delivered.add(name)
        self.board.changed()
        return True

    def was_kept(self, key: str) -> bool:
        """Tell whether there ever was KV under ``key``."""
        return any(key in engine.kept for engine in self.engines.values())

    def is_to_be_had(self, kept: Kept) -> bool:
        """Tell whether the proxy must take KV for something that can be fetched."""
        return self.loop.time() < kept.since_s + self.trusted_s and not self.is_out(kept.host)

    def left(self, ask_id: int) -> list[tuple[str, Kept]]:
        """Return what living engines still keep for a request."""
        alive = [engine for engine in self.engines.values() if engine.is_alive]
        return [one for engine in alive for one in engine.left(ask_id)]
