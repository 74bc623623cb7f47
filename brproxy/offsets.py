"""How far one worker's load, as its engine sees it, is from what is booked for it. Pure.

What is booked is exact for what came through here, and blind to the rest: traffic past the proxy, prompts
that share a prefix, estimates that were wrong. The engine's gauge has all of that, but lags by seconds under
load and is read between two steps. So a report is not compared with what is booked now, but with all that was
booked within the lag: what lies in that range may be any of it, and says nothing; of what lies outside, the
distance to the range is what did not come through here, or less. Two reports in a row that are on the same
side are believed, as far as both of them go.

Below the range two things stand in for a distance that is none: requests that the engine has not begun hold
no KV tokens there (so the range begins without them), and while it has requests that wait nobody knows what
they held before they were preempted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class OffsetSettings:
    """``lag_s``: how old an engine's gauge may be. A report is good for ``stale_s``, then it fades (seconds).

    It fades by half in each ``half_life_s``.
    """

    lag_s: float = 6.0
    stale_s: float = 5.0
    half_life_s: float = 10.0


class _Booked(NamedTuple):
    """What was booked at one time, and how much of that the engine has certainly begun (tokens)."""

    at_s: float
    kv_tokens: int
    begun_tokens: int


class Offset:
    """The offset of one worker: told what is booked and what the engine reports, it says what to add."""

    def __init__(self, settings: OffsetSettings) -> None:
        self._settings = settings
        self._booked: deque[_Booked] = deque()
        self._last = 0
        self._believed = 0
        self._told_s = 0.0

    def booked(self, now_s: float, kv_tokens: int, begun_tokens: int) -> None:
        """Note what is booked, and what of it is for requests that have begun to answer (tokens)."""
        booked = self._booked
        booked.append(_Booked(now_s, kv_tokens, min(begun_tokens, kv_tokens)))
        # One that is as old as the lag stays: the gauge may be just as old.
        while len(booked) > 1 and booked[1].at_s <= now_s - self._settings.lag_s:
            booked.popleft()

    @property
    def was_busy(self) -> bool:
        """Whether something has been booked all through the lag."""
        booked = self._booked
        spans = bool(booked) and booked[-1].at_s - booked[0].at_s >= self._settings.lag_s
        return spans and all(one.kv_tokens for one in booked)

    def told(self, now_s: float, kv_used_tokens: int, waiting: int | None) -> None:
        """Take in a report: tokens that the engine holds, and requests that wait there (None: unknown)."""
        distance = self._distance(kv_used_tokens)
        if distance < 0 and waiting != 0:
            distance = 0
        last, self._last, self._told_s = self._last, distance, now_s
        same_side = (last > 0) == (distance > 0)
        self._believed = min(last, distance, key=abs) if same_side else 0

    def value(self, now_s: float, capacity_tokens: int) -> int:
        """Return the offset now, from less than nothing booked to ``capacity_tokens`` (tokens)."""
        faded_s = now_s - self._told_s - self._settings.stale_s
        if faded_s > 0:
            # Without new reports there is no last one to agree with either.
            self._last = 0
            offset = int(self._believed * 0.5 ** min(faded_s / self._settings.half_life_s, 64.0))
        else:
            offset = self._believed
        booked_tokens = self._booked[-1].kv_tokens if self._booked else 0
        return max(-booked_tokens, min(offset, capacity_tokens))

    def forget(self) -> None:
        """Forget the reports: the engine is another one."""
        self._last = self._believed = 0

    def _distance(self, kv_used_tokens: int) -> int:
        """Return how far a report is outside of what was booked within the lag; below it is negative."""
        highest = max((one.kv_tokens for one in self._booked), default=0)
        lowest = min((one.begun_tokens for one in self._booked), default=0)
        return kv_used_tokens - max(lowest, min(kv_used_tokens, highest))
