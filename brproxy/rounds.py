"""When the next decision round of a group is due. Pure: whoever runs the rounds says when it did.

A round that nobody remembers to run is the worst that can happen to a group: its requests wait for ever,
while everything else looks well. So it is decided here, in one place, whether one is due, and anybody may ask
whether requests wait for one in vain.
"""

from __future__ import annotations

_LATE_TICKS = 10
_LATE_S_MIN = 1.0


class Rounds:
    """A round every ``tick_s`` seconds while requests wait; ``due_s`` is when, None while none is needed."""

    def __init__(self, tick_s: float) -> None:
        self._tick_s = tick_s
        # A loop that is busy runs its timers late: that is no reason to call the group stuck.
        self._late_s = max(_LATE_S_MIN, _LATE_TICKS * tick_s)
        self.due_s: float | None = None

    def next_after(self, now_s: float, waiting: int) -> float | None:
        """Return the seconds to the next round, which is due then; None if ``waiting`` (requests) is 0."""
        self.due_s = now_s + self._tick_s if waiting else None
        return self._tick_s if waiting else None

    def stopped(self) -> None:
        """Note that what was due will not be run."""
        self.due_s = None

    def is_stuck(self, now_s: float, waiting_since_s: float | None) -> bool:
        """Tell whether the oldest request waits (since then, None: none waits) and no round is coming."""
        if waiting_since_s is None:
            return False
        should_have_been_s = waiting_since_s if self.due_s is None else self.due_s
        return now_s - should_have_been_s > self._late_s
