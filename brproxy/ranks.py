"""DP ranks behind one URL: their list as an operator writes it, and how a request names one. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

from brproxy.types import InvalidInputError

RANK_MAX = 65535
"""The largest number of a rank."""

RANKS_MAX = 1024
"""Ranks behind one URL (ranks)."""

_PART = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", re.ASCII)


def read_ranks(text: str) -> tuple[int, ...]:
    """Return the ranks of a list like "0-7" or "0,2,4-6", in order; raises InvalidInputError."""
    ranks: set[int] = set()
    for part in text.split(","):
        found = _PART.fullmatch(part.strip(" "))
        if found is None:
            msg = f'must be numbers and ranges like "0-7" or "0,2,4-6": {part[:40]!r} is none'
            raise InvalidInputError(msg)
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last <= RANK_MAX:
            msg = f"must have ranges that rise, to {RANK_MAX} at most: {part.strip()!r} is none"
            raise InvalidInputError(msg)
        if ranks.intersection(span := range(first, last + 1)):
            msg = f"must name each rank once: {part.strip()!r} names one again"
            raise InvalidInputError(msg)
        # Before they are made: a few bytes could ask for millions.
        if len(ranks) + len(span) > RANKS_MAX:
            msg = f"must be {RANKS_MAX} ranks at most"
            raise InvalidInputError(msg)
        ranks.update(span)
    return tuple(sorted(ranks))


_RANK_FIELD = b"X-data-parallel-rank: "


def rank_line(number: int) -> bytes:
    """Return the header line that sends a request to the rank that a server calls ``number``."""
    return b"%b%d\r\n" % (_RANK_FIELD, number)


def line_number(line: bytes) -> int | None:
    """Return the number in a line that ``rank_line`` has made, None for any other."""
    return int(line[len(_RANK_FIELD) :]) if line.startswith(_RANK_FIELD) else None


class RankGuess(NamedTuple):
    """What an operator takes a server to understand: the ranks behind it, and which number addresses one."""

    ranks: tuple[int, ...]
    mode: str
    base: int

    def number(self, rank: int) -> int:
        """Return what the server calls ``rank``: less the base in mode "local", itself in mode "global"."""
        return rank - self.base if self.mode == "local" else rank

    def others(self) -> list[RankGuess]:
        """Return the guesses that address the highest rank by another number."""
        ranks = self.ranks
        guesses = [RankGuess(ranks, "local", ranks[0]), RankGuess(ranks, "global", 0)]
        return [guess for guess in guesses if guess.number(ranks[-1]) != self.number(ranks[-1])]

    def __str__(self) -> str:
        """Return the keys that say so, as they are written."""
        base = f" and rank_base = {self.base}" if self.base else " without rank_base"
        return f'rank_mode = "{self.mode}"{base}'
