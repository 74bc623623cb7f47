"""How many prompt tokens hold up all workers of a group, from when first tokens came. Pure.

A step waits for the worker that prefills most in it. Prompts that are prefilled whole are in the step of
their first token. An engine that prefills so many tokens a step at most has a long prompt in several, back
from that; when these were is worked out by how long such steps take, which the window's own length says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from brproxy.types import TOKENS_MAX

CHUNKS = (None, 512, 1024, 2048, 4096, 8192, 16_384)
"""Most prompt tokens that a worker may prefill in one step, as engines are set up; None: whole prompts."""

_CHUNKS_MAX = 1024
"""Most steps that one prompt is taken to be prefilled in."""

_TOGETHER = 0.25
"""First tokens are of the same step that come within that share of one without prefill."""

_TOGETHER_GUESS = 0.75
"""As above where the time of one is worked out: by how long a step with the later one takes."""


class Prefill(NamedTuple):
    """A prompt that was prefilled: when its first token came, by whom, and the tokens that no cache had."""

    first_token_s: float
    worker: int
    tokens: int


class _Part(NamedTuple):
    """What a worker prefilled in the step that ended at ``at_s``; ``is_guess``: that time is worked out."""

    at_s: float
    worker: int
    tokens: int
    is_guess: bool = False


def prefill_sums(
    prefills: Iterable[Prefill],
    between_s: tuple[float, float],
    steps: float,
    plain_s: float,
    s_per_token: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """Return the sum over the ``steps`` in ``between_s`` of what the worker prefilled that did most.

    For each of CHUNKS (tokens). ``plain_s``: a step without prefill (seconds); ``s_per_token``: what a token
    makes it longer by if that is the chunk (seconds), None: that is not known yet.
    """
    duration_s = between_s[1] - between_s[0]
    plain_s = min(plain_s, duration_s / steps)
    # Tokens of one step come one after the other: those of the step at an end are of the window before.
    from_s, to_s = (end_s + _TOGETHER * plain_s for end_s in between_s)
    prefills = [prefill for prefill in prefills if prefill.first_token_s > from_s]
    most_tokens = max((prefill.tokens for prefill in prefills), default=0)
    whole = _sum((_Part(*prefill) for prefill in prefills if prefill.first_token_s <= to_s), plain_s, 0.0)
    longer_s = max(duration_s - steps * plain_s, 0.0)

    def in_chunks(number: int, chunk: int) -> float:
        total, longer_by_s = whole, s_per_token[number] if s_per_token else 0.0
        for _ in range(1 if longer_by_s else 2):
            # What a token takes follows from how many there were, and that from when they were.
            by_s = longer_by_s or (longer_s / total if total else 0.0)
            chunk_s = plain_s + by_s * chunk
            # Most are of later windows, and no part of them is of this one.
            near = [p for p in prefills if p.first_token_s - (p.tokens / chunk + 1) * chunk_s <= to_s]
            parts = (part for p in near for part in _parts(p, chunk, (from_s, to_s), (plain_s, by_s)))
            total = _sum(parts, plain_s, by_s, chunk)
        return total

    return tuple(
        in_chunks(number, chunk) if chunk and most_tokens > chunk else whole
        for number, chunk in enumerate(CHUNKS)
    )


def _parts(
    prefill: Prefill, chunk: int, between_s: tuple[float, float], cost: tuple[float, float]
) -> Iterator[_Part]:
    """Yield what a prompt was prefilled in, in steps that ended in between, the last part first.

    ``cost``: a step without prefill, and what a token makes it longer by (seconds).
    """
    at_s, worker, tokens = prefill
    from_s, to_s = between_s
    before = min(-(-tokens // chunk), _CHUNKS_MAX) - 1
    last_tokens = tokens - max(before, 0) * chunk
    if from_s < at_s <= to_s:
        yield _Part(at_s, worker, last_tokens)
    if before > 0:
        at_s -= cost[0] + cost[1] * last_tokens
        chunk_s = cost[0] + cost[1] * chunk
        first = max(math.ceil((at_s - to_s) / chunk_s), 0)
        for back in range(first, before):
            if at_s - back * chunk_s <= from_s:
                break
            yield _Part(at_s - back * chunk_s, worker, chunk, is_guess=True)


def _sum(parts: Iterable[_Part], plain_s: float, s_per_token: float, chunk: int = TOKENS_MAX) -> float:
    """Return the sum over the steps of the tokens of the worker that has most."""
    total, ended_s, has_guess = 0, float("-inf"), False
    by_worker: dict[int, int] = {}
    for at_s, worker, tokens, is_guess in sorted(parts):
        within_s = _TOGETHER * plain_s
        if is_guess or has_guess:
            # In a step of its own it would have come so much later.
            within_s = _TOGETHER_GUESS * (plain_s + s_per_token * tokens)
        if at_s > ended_s + within_s:
            total += min(max(by_worker.values(), default=0), chunk)
            by_worker, ended_s, has_guess = {}, at_s, False
        has_guess |= is_guess
        by_worker[worker] = by_worker.get(worker, 0) + tokens
    return float(total + min(max(by_worker.values(), default=0), chunk))
