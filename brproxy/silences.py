"""Whether an engine has all the requests that are bound to its worker, silent ones too. Pure.

A stream may be silent although all is well: its request waits in the engine, was preempted, or the engine is
paused. Then the engine counts it, among those that run or wait. That count says nothing of one request, but
where the engine has as many as are bound to it, that one is among them; where it has fewer, nobody knows
which are missing.

The count lags by seconds, as a load does (see ``offsets.py``): what is bound is taken as the range of all
that was bound within the lag, and two reports in a row that there are fewer are believed. A page that does
not change may be as old as its last change: engines that are paused count nothing new. What the engine has
beyond the range is not ours; the most that was seen of that in the last while is taken off, since it may hide
that one of ours is missing.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

OTHERS_KEPT_S = 900.0
"""How long the most requests that are not ours are remembered at least; twice that at most (seconds)."""

_NOTHING_SAID = 1
"""Requests that are missing before the first report: one that says so is believed at once."""


class _Bound(NamedTuple):
    """Requests that an engine has, as far as is known here: at least ``fewest``, at most ``most``."""

    at_s: float
    fewest: int
    most: int


class Tally:
    """The requests of one worker: told how many are bound and how many its engine has, it says who is there.

    ``lag_s``: how old an engine's figures may be (seconds).
    """

    __slots__ = (
        "_anew_s",
        "_believed",
        "_bound",
        "_changed_s",
        "_fewest",
        "_held",
        "_lag_s",
        "_most",
        "_others",
        "_shortfall",
        "_since_s",
        "_surplus",
        "_told_s",
    )

    def __init__(self, lag_s: float) -> None:
        self._lag_s = lag_s
        self._bound: deque[_Bound] = deque()
        self._others = _Peak()
        self._anew_s = float("-inf")
        self._told_s: float | None = None
        self._changed_s = self._since_s = 0.0
        self._held = self._fewest = self._most = self._surplus = 0
        self._shortfall = self._believed = _NOTHING_SAID

    def bound(self, now_s: float, fewest: int, most: int) -> None:
        """Note how many requests are bound; more than ``fewest`` where some are several to an engine."""
        bound = self._bound
        bound.append(_Bound(now_s, fewest, most))
        while len(bound) > 1 and bound[1].at_s <= now_s - self._lag_s:
            bound.popleft()

    def told(self, now_s: float, held: int | None, *, is_news: bool) -> None:
        """Take in how many requests the engine has (None: it does not say); ``bound`` has just been.

        ``is_news``: some figure of the page is another than on the one before.
        """
        if held is None:
            self.forget()
            return
        fewest = min((one.fewest for one in self._bound), default=0)
        most = max((one.most for one in self._bound), default=0)
        if is_news or self._told_s is None:
            self._changed_s, self._fewest, self._most = now_s, fewest, most
            self._since_s = self._bound[0].at_s if self._bound else now_s
        else:
            self._fewest, self._most = min(self._fewest, fewest), max(self._most, most)
        self._told_s, self._held = now_s, held
        surplus = max(held - self._most, 0)
        self._others.add(now_s, min(surplus, self._surplus))
        self._surplus = surplus
        shortfall = self._fewest + self._others.value - held
        self._believed = min(shortfall, self._shortfall)
        self._shortfall = shortfall

    def forget(self) -> None:
        """Forget what the engine has said."""
        self._told_s = None
        self._surplus = 0
        self._shortfall = self._believed = _NOTHING_SAID

    def started_anew(self, now_s: float) -> None:
        """Note that the engine is another one, which has nothing of what was bound before."""
        self._anew_s = now_s
        self._others = _Peak()
        self.forget()

    def has(self, bound_s: float, now_s: float, fresh_s: float) -> bool:
        """Tell whether the engine has a request that was bound at ``bound_s``, by figures of ``fresh_s``."""
        told_s = self._told_s
        if told_s is None or now_s - told_s > fresh_s or bound_s <= self._anew_s:
            return False
        if self._since_s > bound_s:
            return self._believed <= 0
        # The range may be without it: then only all of them will do.
        return self._changed_s >= bound_s and self._held >= self._most + self._others.value


class _Peak:
    """The largest of the values that came in the last while."""

    __slots__ = ("_before", "_begun_s", "_now")

    def __init__(self) -> None:
        self._before = self._now = 0
        self._begun_s: float | None = None

    @property
    def value(self) -> int:
        return max(self._before, self._now)

    def add(self, now_s: float, value: int) -> None:
        if self._begun_s is None or now_s - self._begun_s >= OTHERS_KEPT_S:
            self._before, self._now, self._begun_s = self._now, 0, now_s
        self._now = max(self._now, value)


def put_off_s(kept_s: float, again_s: float, kept_s_max: float) -> float:
    """Return for how long a silent request is kept that its engine has; 0 once ``kept_s_max`` are over.

    It has been kept for ``kept_s`` beyond its time-out, and is looked at again after ``again_s`` (seconds).
    """
    return max(min(again_s, kept_s_max - kept_s), 0.0)
