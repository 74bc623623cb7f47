"""What went wrong in parts that decide or look on: contained where it happened, counted, logged. Pure.

A policy or a predictor may raise, and so may whoever is told what happens. None of them may take a round, the
end of a request or another request with it. So their errors stop here: each is counted by the part that
raised, and the first, the second, the fourth, the eighth … of a part are logged with their traceback.
"""

from __future__ import annotations

import logging
from collections import Counter

log = logging.getLogger(__name__)


class Faults:
    """Errors of one barrier group by part: "policy", "predictor", "booking", "observer", "round"."""

    def __init__(self, group: str = "") -> None:
        self._group = group
        self.counts: Counter[str] = Counter()

    def note(self, part: str, error: Exception) -> None:
        """Count ``error``, raised by ``part``."""
        self.counts[part] += 1
        count = self.counts[part]
        # A part that is broken fails in each round: its log must not grow as fast.
        if count & (count - 1) == 0:
            log.error("group %s: %s failed (%d so far): %r", self._group, part, count, error, exc_info=error)
