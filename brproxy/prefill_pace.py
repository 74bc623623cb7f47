"""How long workers that prefill for others take for a prompt token, given or learnt. Pure.

A *wave* is what one round has bound. It has begun when it was bound, or when the wave before was over.
Workers that were idle begin with what comes first, and the rest of a wave is the next step: so what a wave
tells is how long its first step took, by those whose first tokens came first. By the prompt tokens of the
worker that has most of them in it, and what a step costs besides, that is so many seconds a token. Of the
last waves the lower quartile counts: whoever goes by it is rather too early than too late.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from brproxy.happenings import Observer
from brproxy.lifecycle import Entry, State
from brproxy.step_costs import BASE_TOKENS, StepCosts
from brproxy.step_model import GivenCosts

WAVES_MAX = 64
"""Waves that are remembered, the last ones."""

WAVES_MIN = 8
"""With fewer nothing is known yet."""

_QUANTILE = 0.25

_TOGETHER = 0.25
"""First tokens are of the same step that come within that share of it."""

_RUNNING_MAX = 32
"""Waves that may not be over; beyond, the oldest is forgotten: a worker that is gone never ends it."""


class _Wave(NamedTuple):
    """What was bound at one time (seconds). An entry may have been bound anew since."""

    bound_s: float
    entries: list[Entry]

    def is_over(self) -> bool:
        """Tell whether all have their first token, or will never have it of this wave."""
        return all(e.state is not State.PREFILL or e.bound_s != self.bound_s for e in self.entries)


class PrefillPace(Observer):
    """The costs of a step in the group whose happenings it is told, as far as they are not ``given``."""

    def __init__(self, given: GivenCosts) -> None:
        self._given = given
        self._running: deque[_Wave] = deque(maxlen=_RUNNING_MAX)
        self._over_s = float("-inf")
        self._s_per_token: deque[float] = deque(maxlen=WAVES_MAX)
        self._costs = self._known()

    def costs(self) -> StepCosts:
        """Return what a step costs; ``s_per_prefill_token`` is 0 as long as nobody knows it."""
        return self._costs

    def bound(self, entry: Entry, waited_s: float) -> None:
        """See Observer.bound."""
        if entry.bound_s is None:
            return
        if self._running and self._running[-1].bound_s == entry.bound_s:
            self._running[-1].entries.append(entry)
            return
        while self._running and self._running[0].is_over():
            self._learn(*self._running.popleft())
        self._running.append(_Wave(entry.bound_s, [entry]))

    def _learn(self, bound_s: float, wave: list[Entry]) -> None:
        """Take note of a wave that is over, unless some of it was lost."""
        ends_s = [e.first_token_s for e in wave if e.first_token_s is not None and e.bound_s == bound_s]
        if len(ends_s) < len(wave):
            return
        begun_s, first_s, self._over_s = max(bound_s, self._over_s), min(ends_s), max(ends_s)
        last_s = first_s + _TOGETHER * (first_s - begun_s)
        tokens: dict[int, int] = {}
        for entry, end_s in zip(wave, ends_s, strict=True):
            if end_s <= last_s:
                tokens[entry.worker] = tokens.get(entry.worker, 0) + entry.uncached_tokens
        base_s, most = self._given.base_s, max(tokens.values(), default=0)
        if base_s is None:
            seconds = (first_s - begun_s) / (BASE_TOKENS + most)
        else:
            seconds = (first_s - begun_s - base_s) / max(most, 1)
        if seconds > 0 and most:
            self._s_per_token.append(seconds)
            self._costs = self._known()

    def _known(self) -> StepCosts:
        given, learnt = self._given, sorted(self._s_per_token)
        s_per_token = given.s_per_prefill_token
        if s_per_token is None:
            s_per_token = learnt[int(_QUANTILE * len(learnt))] if len(learnt) >= WAVES_MIN else 0.0
        base_s = BASE_TOKENS * s_per_token if given.base_s is None else given.base_s
        return StepCosts(base_s, 0.0, s_per_token, given.prefill_tokens_max)
