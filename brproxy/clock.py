"""Time as an argument: pure cores take a clock, so that a simulator can run them in virtual time."""

from __future__ import annotations

import time
from typing import Protocol

from brproxy.types import InvalidInputError


class Clock(Protocol):
    """A source of monotonic seconds."""

    def now_s(self) -> float:
        """Return seconds since an arbitrary origin; never decreases."""
        ...


class MonotonicClock:
    """The machine's monotonic clock."""

    # Not a method that calls it: every request asks several times.
    now_s = staticmethod(time.monotonic)


class VirtualClock:
    """A clock that stands still until it is told to advance."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        """Return the virtual time in seconds."""
        return self._now_s

    def advance_to(self, now_s: float) -> None:
        """Move to ``now_s``; raises InvalidInputError when that is in the past."""
        if now_s < self._now_s:
            msg = f"a clock cannot go back from {self._now_s} s to {now_s} s"
            raise InvalidInputError(msg)
        self._now_s = now_s
