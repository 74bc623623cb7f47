"""How fast the slots of a group turn over, by the sequences that run and not by the slots there are. Pure.

A worker that has slots for 512 sequences and KV room for 65 is left by one every ``mean output / 65`` steps.
What runs changes with each arrival, and how far a policy looks ahead hangs on it, with all that is cached for
that: so it counts as a *level*, an average over rounds that is taken up only now and then.
"""

from __future__ import annotations

from brproxy.ledger import Ledger

_LOOKS = 32
"""Looks that the average is over, once there have been so many."""

_ROUNDS_A_LOOK = 4
"""Rounds for one of which what runs is looked at: each request has one, and one more tells little."""

_MOVED = 1.25
"""The level takes the average up at once where one of the two is more than so many times the other."""


_EACH_MIN = 64
"""Sequences that count as running on each worker at least, as far as it has slots: where fewer run, looking
further ahead for it costs. Idle time of 8 workers of 64 slots (proprietary, 3 to 4 seeds) at half the load is
14.3 % by 64 and 15.7 % by what runs, at four fifths 8.9 and 9.4 %; with 16 and 32 slots nothing differs.
"""


class Turnover:
    """The turnover of the group of ``ledger``; ``version`` changes with the level."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._looks = 0
        self._rounds_to_look = 1
        self._average = 0.0
        self._level = 0.0
        self.version = 0

    def look(self) -> None:
        """Look at what runs, as a round finds it; called in each of them."""
        self._rounds_to_look -= 1
        if self._rounds_to_look:
            return
        self._rounds_to_look = _ROUNDS_A_LOOK
        running = self._ledger.sequences_total
        if self._looks < _LOOKS:
            self._looks += 1
        self._average += (running - self._average) / self._looks
        if self._average > self._level * _MOVED or self._level > self._average * _MOVED:
            self.settle()

    def settle(self) -> None:
        """Take the average up, also where it has moved by little: something else changes anyway."""
        self._level = self._average
        self.version += 1

    def steps(self, output_tokens_mean: float) -> float:
        """Return how many steps pass between two sequences that leave a worker (steps).

        Where more are bound than there are slots the others wait in the worker.
        """
        slots, workers = self._ledger.slots_total, len(self._ledger.roster)
        running = min(max(self._level, _EACH_MIN * workers), slots)
        return output_tokens_mean * workers / running
