"""The health of workers, from consecutive results. Pure: results and time come in, states come out.

A worker starts UNKNOWN and may not be chosen before its first success, so that a proxy which starts before
its workers does not send traffic into nothing. ``unhealthy_after`` failures in a row take a HEALTHY worker
out, ``healthy_after`` successes in a row bring one back. Only active checks and connections that could not
be opened count: a worker that answers an error is alive. One that says of itself that it cannot serve is out
at once and for as long as it says so, whatever checks find.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Health(Enum):
    """What is known of a worker."""

    UNKNOWN = "unknown"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


@dataclass(frozen=True, slots=True)
class HealthThresholds:
    """Consecutive results that change a state: failures to take out, successes to bring back."""

    unhealthy_after: int = 3
    healthy_after: int = 1


class HealthTracker:
    """One worker's state, when it last changed (seconds), and why it is not healthy by its last result."""

    def __init__(self, thresholds: HealthThresholds) -> None:
        self._thresholds = thresholds
        self._successes = 0
        self._failures = 0
        self._by_results = Health.UNKNOWN
        self._last_reason = "not checked yet"
        self._accusation = ""
        self.state = Health.UNKNOWN
        self.since_s: float | None = None
        self.reason = self._last_reason

    def record(self, *, ok: bool, reason: str, now_s: float) -> bool:
        """Take in one result with its reason; return whether the state changed."""
        self._successes = self._successes + 1 if ok else 0
        self._failures = 0 if ok else self._failures + 1
        self._by_results = self._after()
        self._last_reason = reason
        return self._settle(now_s)

    def accuse(self, reason: str, now_s: float) -> bool:
        """Take the worker out for what it says of itself, until ``reason`` is ""; return as ``record``."""
        self._accusation = reason
        return self._settle(now_s)

    @property
    def is_accused(self) -> bool:
        """Whether the worker says of itself that it cannot serve."""
        return bool(self._accusation)

    def _settle(self, now_s: float) -> bool:
        state = Health.UNHEALTHY if self._accusation else self._by_results
        changed = state is not self.state
        if changed:
            self.state, self.since_s = state, now_s
        if changed or state is not Health.HEALTHY:
            self.reason = self._accusation or self._last_reason
        return changed

    def _after(self) -> Health:
        if self._failures >= self._thresholds.unhealthy_after:
            return Health.UNHEALTHY
        # A worker that has never failed is trusted on its first success.
        needed = 1 if self._by_results is Health.UNKNOWN else self._thresholds.healthy_after
        return Health.HEALTHY if self._successes >= needed else self._by_results
