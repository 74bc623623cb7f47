"""One coarse timer for all time-outs of the data plane.

A timer for each read would cost as much as relaying the read. Instead everything that may time out notes
that it made progress, and one look at all of them every ``interval_s`` moves their deadlines: a time-out is
late by up to that, and a read costs one assignment.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger(__name__)


class Watched(Protocol):
    """What can time out: ``limit_s`` seconds after ``progressed`` was last set."""

    progressed: bool
    limit_s: float
    deadline_s: float

    def timed_out(self) -> None:
        """Nothing has happened for ``limit_s``."""

    def crashed(self, error: Exception) -> None:
        """End, wherever this is: ``timed_out`` has raised ``error``. Must not raise."""


class Watch:
    """Looks after everything added to it every ``interval_s`` (seconds), and calls each of ``also`` then."""

    def __init__(self, interval_s: float, *also: Callable[[float], None]) -> None:
        self.interval_s = interval_s
        self._also = list(also)
        # In the order of coming: one of a set would be another in every run.
        self._watched: dict[Watched, None] = {}
        self.loop = asyncio.get_running_loop()
        self._timer = self.loop.call_later(interval_s, self._look)

    def add(self, watched: Watched) -> None:
        """Start looking after ``watched``, whose time begins with the next look."""
        watched.progressed = True
        self._watched[watched] = None

    def discard(self, watched: Watched) -> None:
        """Forget ``watched``."""
        self._watched.pop(watched, None)

    def watched(self) -> tuple[Watched, ...]:
        """Return all that is looked after."""
        return tuple(self._watched)

    def also(self, call: Callable[[float], None]) -> None:
        """Have ``call(now_s)`` made at each look as well, in seconds of the loop."""
        self._also.append(call)

    def close(self) -> None:
        """Stop looking."""
        self._timer.cancel()

    def _look(self) -> None:
        self._timer = self.loop.call_later(self.interval_s, self._look)
        now_s = self.loop.time()
        late = []
        for watched in self._watched:
            if watched.progressed:
                watched.progressed = False
                watched.deadline_s = now_s + watched.limit_s
            elif now_s >= watched.deadline_s:
                late.append(watched)
        for watched in late:
            try:
                watched.timed_out()
            except Exception as error:
                # It must not keep the others from being looked at.
                log.exception("a request that timed out could not be ended")
                watched.crashed(error)
        for call in self._also:
            try:
                call(now_s)
            except Exception:
                # As above: what is done now and then must not keep the rest from being done.
                log.exception("what is looked after now and then failed")
