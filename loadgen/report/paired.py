"""How one policy's figures differ from another's on the same requests, seed by seed. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loadgen.report.schema import PolicyResult
from loadgen.report.statistics import half_width_95

_MORE_IS_BETTER = frozenset({"output_tokens_per_s", "throughput_of_perfect", "prefill_balance"})


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean over the seeds of how many % more a figure is, and the 95 % interval's half-width.

    ``half_width`` is None of a single seed.
    """

    percent: float
    half_width: float | None


def paired_difference(ours: PolicyResult, theirs: PolicyResult, figure: str) -> Difference | None:
    """Return how ``ours`` differs from ``theirs``; None where that is not known, or relative to nothing.

    Policies meet the same requests with the same seed, so what the seed did to both cancels out.
    """
    our_values, their_values = _by_seed(ours, figure), _by_seed(theirs, figure)
    if not our_values or len(our_values) != len(their_values) or 0 in their_values:
        return None
    percents = [100 * (our / their - 1) for our, their in zip(our_values, their_values, strict=True)]
    half_width = half_width_95(percents) if len(percents) > 1 else None
    return Difference(float(np.mean(percents)), half_width)


def is_worse(difference: Difference, figure: str) -> bool:
    """Tell whether ours is worse, and the interval has nothing that is not; one seed shows nothing."""
    if difference.half_width is None:
        return False
    sign = -1 if figure in _MORE_IS_BETTER else 1
    return sign * difference.percent > difference.half_width


def _by_seed(result: PolicyResult, figure: str) -> list[float]:
    value: float | None = getattr(result, figure)
    return result.by_seed.get(figure, [] if value is None else [value])
