"""Numbers that clients and workers state, bounded where they enter. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from brproxy.types import TOKENS_MAX


def first_count(holder: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """Return the first of ``keys`` whose value is a count, at most TOKENS_MAX; None if none is."""
    for key in keys:
        value = holder.get(key)
        if value is None:
            continue
        if type(value) is int:
            if 0 <= value <= TOKENS_MAX:
                return value
            if value > 0:
                return TOKENS_MAX
        # Integers beyond 64 bits come as floats, and engines take 7.0 for 7.
        elif type(value) is float and value >= 0 and value.is_integer():
            return int(min(value, TOKENS_MAX))
    return None
