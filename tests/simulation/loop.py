"""An event loop whose time is virtual: when nothing is ready, the clock jumps to the next timer.

No selector, no threads, no sockets: whoever connects or listens gets a connection in memory (``network``).
All that asyncio builds on top (tasks, futures, timers, time-outs) is asyncio's own.
"""

from __future__ import annotations

import asyncio
import heapq
import socket
from collections.abc import Callable

from tests.simulation.network import Network

START_S = 1000.0
"""Where time begins: not at zero, so that nobody takes a time of 0 for "never"."""


class DeadlockError(Exception):
    """Nothing is ready and no timer is set, but somebody still waits."""


class SpinningError(Exception):
    """Callbacks go on and on without any time passing."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs callbacks one after another; ``after_event`` is called behind each.

    ``network``: see Network. ``complaints`` are what came to the exception handler. ``upheavals`` count what
    breaks off anybody's request: jumps in time, and the end of the proxy.
    """

    EVENTS_AT_ONE_TIME_MAX = 50_000

    def __init__(self) -> None:
        super().__init__()
        self.set_debug(enabled=False)
        self._now_s = START_S
        # (when, number, timer): compared without calling Python, and in the order set where times are equal.
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._timers_set = 0
        self._time_since_events = 0
        self.events = self.upheavals = 0
        self.after_event: Callable[[], None] = _nothing
        self.network = Network(self)
        self.complaints: list[dict] = []
        self.set_exception_handler(lambda _loop, context: self.complaints.append(context))

    def time(self) -> float:
        return self._now_s

    def jump(self, seconds: float) -> None:
        """Step forward in time, as a machine does that was suspended or a loop that was held up."""
        self._now_s += seconds
        self.upheavals += 1
        self._time_since_events = self.events

    def timers(self) -> list[asyncio.TimerHandle]:
        """Return the timers that are set."""
        return [timer for _, _, timer in self._timers if not timer.cancelled()]

    def call_later(self, delay, callback, *args, context=None):
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(self, when, callback, *args, context=None):
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._timers_set += 1
        heapq.heappush(self._timers, (when, self._timers_set, timer))
        return timer

    def _run_once(self) -> None:
        timers, ready = self._timers, self._ready
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not ready and not self._stopping:
            if not timers:
                msg = f"nothing will ever happen again: {asyncio.all_tasks(self)}"
                raise DeadlockError(msg)
            when_s = timers[0][0]
            if when_s > self._now_s:
                self._now_s, self._time_since_events = when_s, self.events
        while timers and timers[0][0] <= self._now_s:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()
                self.events += 1
                self.after_event()
        if self.events - self._time_since_events > self.EVENTS_AT_ONE_TIME_MAX:
            msg = f"{self.EVENTS_AT_ONE_TIME_MAX} events at one time, the last of {handle!r}"
            raise SpinningError(msg)

    # What would reach the outside is answered in memory.

    async def create_connection(self, protocol_factory, host=None, port=None, *, ssl=None, **_settings):
        assert ssl is None, "the simulated network has no TLS"
        return await self.network.connect_from_proxy(protocol_factory, host, port)

    async def create_server(self, protocol_factory, host=None, port=None, **_settings):
        return self.network.listen(protocol_factory, host, port)

    async def getaddrinfo(self, host, port, *, family=0, type=0, proto=0, flags=0):  # noqa: A002 - as in asyncio
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port))]

    def run_in_executor(self, executor, func, *args):
        msg = f"{func!r} wants a thread, and there is none in a simulation"
        raise RuntimeError(msg)

    def call_soon_threadsafe(self, callback, *args, context=None):
        return self.call_soon(callback, *args, context=context)


def _nothing() -> None:
    """Check nothing."""
