"""Wakes those who wait for something by its key."""

from __future__ import annotations

import asyncio


class Signals:
    """Futures by key: who is told True got what it waited for."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[asyncio.Future[bool]]] = {}

    def awaited(self, key: str) -> bool:
        """Tell whether somebody waits."""
        return key in self._waiting

    def expect(self, key: str) -> asyncio.Future[bool]:
        """Return a future that is set when ``key`` is told; it is forgotten once it is done or cancelled."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append(future)
        future.add_done_callback(lambda future: self._forget(key, future))
        return future

    async def wait(self, key: str, timeout_s: float) -> bool:
        """Wait until ``key`` is told and return what; False after ``timeout_s`` real seconds."""
        try:
            return await asyncio.wait_for(self.expect(key), timeout_s)
        except TimeoutError:
            return False

    def tell(self, key: str, *, good: bool) -> bool:
        """Wake those who wait for ``key``; False: nobody did."""
        waiting = self._waiting.pop(key, [])
        for future in waiting:
            if not future.done():
                future.set_result(good)
        return bool(waiting)

    def _forget(self, key: str, future: asyncio.Future[bool]) -> None:
        waiting = self._waiting.get(key, [])
        if future in waiting:
            waiting.remove(future)
            if not waiting:
                del self._waiting[key]
