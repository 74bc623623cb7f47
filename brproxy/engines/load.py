"""What an engine says about its own load, by rank, within bounds. Pure.

Absent is not zero: an engine whose gauge is missing is not idle, and one that has been renamed must be loud.
So each figure is None where the page does not have it, and a reading names what was missing and what came by
an older name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

from brproxy.types import TOKENS_MAX

RANKS_MAX = 1024
"""Ranks that are read of one page; more are no deployment."""

FIGURE_MAX = 1 << 62
"""Largest sum or counter that is taken in; what is larger counts as this."""

FULL_MAX = 1.01
"""Largest usage of a KV cache that is read as full; what is more is in another unit, and says nothing."""

MOMENTS = 6
"""Numbers of SGLang's ``decode_moments``: n, Σb, Σt_us, Σb², Σb·t, Σgenerated."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What one rank says: tokens, requests and counters, each None where it does not.

    ``kv_used_tokens`` of ``kv_capacity_tokens`` are taken, by the requests that run. ``running`` and
    ``waiting`` are requests in the engine, ``waiting_tokens`` the prompt tokens of those that wait which no
    cache holds. Counters grow from the engine's start: ``preemptions``, ``prefill_tokens`` computed (SGLang:
    without cached ones) and ``prefill_busy_us`` spent on them. ``decode_moments`` are MOMENTS numbers.
    """

    kv_used_tokens: int | None = None
    kv_capacity_tokens: int | None = None
    running: int | None = None
    waiting: int | None = None
    waiting_tokens: int | None = None
    preemptions: int | None = None
    prefill_tokens: int | None = None
    prefill_busy_us: int | None = None
    decode_moments: tuple[float, ...] | None = None

    def __add__(self, other: LoadReport) -> LoadReport:
        """Return the load of two ranks together: unknown where one of them does not say it."""
        counts = {name: _sum(getattr(self, name), getattr(other, name)) for name in _COUNTS}
        return LoadReport(decode_moments=_sum_each(self.decode_moments, other.decode_moments), **counts)

    def started_anew(self, before: LoadReport) -> bool:
        """Tell whether the engine has started anew since the report ``before``: a counter fell."""
        pairs = ((getattr(before, name), getattr(self, name)) for name in ("preemptions", "prefill_tokens"))
        return any(old is not None and new is not None and new < old for old, new in pairs)


@dataclass(frozen=True, slots=True)
class LoadReading:
    """What one page says: a report for each rank that it names.

    ``wanted`` are the figures that each report should have, by their name there; ``renamed`` are those that
    came by another name than the newest, which is the value.
    """

    reports: Mapping[int, LoadReport] = field(default_factory=dict)
    wanted: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)

    def missing(self, report: LoadReport) -> frozenset[str]:
        """Return the wanted figures that ``report`` does not have."""
        return frozenset(name for name in self.wanted if getattr(report, name) is None)


_COUNTS = (
    *("kv_used_tokens", "kv_capacity_tokens", "running", "waiting", "waiting_tokens"),
    *("preemptions", "prefill_tokens", "prefill_busy_us"),
)


def count_of(value: object, highest: int = TOKENS_MAX) -> int | None:
    """Return a number from outside as a count, at most ``highest``; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return None if value < 0 else int(min(value, highest))


def moments_of(value: object) -> tuple[float, ...] | None:
    """Return the moments in ``value``, None where it is not what they should be."""
    if not isinstance(value, list) or len(value) != MOMENTS:
        return None
    moments = [count_of(one, FIGURE_MAX) for one in value]
    found = tuple(float(one) for one in moments if one is not None)
    return found if len(found) == MOMENTS else None


def matched(ranks: Sequence[int | None], reports: Mapping[int, LoadReport]) -> list[LoadReport | None]:
    """Return the report of each of the members behind one endpoint, whose ``ranks`` these are.

    One without a rank is all that is there: it gets the sum. Ranks that are not those of the page, but as
    many, are taken in order: a server may count within itself what its page counts across all servers.
    """
    together = reduce(LoadReport.__add__, reports.values()) if reports else None
    known = sorted(rank for rank in ranks if rank is not None)
    by_rank = reports
    if len(known) == len(reports) and set(known) != set(reports):
        by_rank = dict(zip(known, (reports[rank] for rank in sorted(reports)), strict=True))
    return [together if rank is None else by_rank.get(rank) for rank in ranks]


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else min(one + other, FIGURE_MAX)


def _sum_each(one: tuple[float, ...] | None, other: tuple[float, ...] | None) -> tuple[float, ...] | None:
    return None if one is None or other is None else tuple(a + b for a, b in zip(one, other, strict=True))
