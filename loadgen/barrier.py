"""What the barrier costs: statistics over the steps of a deployment, for any window of time. Pure."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from brproxy.types import InvalidInputError
from loadgen.cluster import Step
from loadgen.cluster_settings import IntArray

STEPS_MAX = 10_000_000
"""Most steps that are kept: at 10 ms each, more than a day."""


@dataclass(frozen=True, slots=True)
class BarrierStats:
    """Over the steps that began in a window.

    ``imbalance_kv_tokens``: time-average of max - min load. ``idle_fraction``: the KV work that the workers
    could have done while they waited at the barrier, ``1 - Σ mean·dt / Σ max·dt`` of what their loads weigh.
    ``mean_kv_tokens``: time-average of the mean load. ``prefill_balance``: the mean of the prompt tokens that
    each worker prefills, by the most that one does, averaged over the steps in which any is prefilled: 1
    where all do the same, 1 / G where one does all. ``output_tokens`` were decoded in ``busy_s`` seconds of
    steps.
    """

    steps: int
    busy_s: float
    output_tokens: int
    imbalance_kv_tokens: float | None
    idle_fraction: float | None
    mean_kv_tokens: float | None
    prefill_balance: float | None


_COLUMNS = (
    *("start_s", "duration_s", "kv_max", "kv_mean", "kv_min", "work_max", "work_mean"),
    *("prefill_balance", "tokens"),
)


class BarrierRecord:
    """The load extremes of every step so far."""

    def __init__(self) -> None:
        self._columns = {name: array("d") for name in _COLUMNS}

    def add(self, start_s: float, step: Step, output_tokens: int) -> None:
        """Record a step; raises InvalidInputError beyond STEPS_MAX of them."""
        if len(self._columns["start_s"]) >= STEPS_MAX:
            msg = f"more than {STEPS_MAX} steps; reset the statistics"
            raise InvalidInputError(msg)
        kv_tokens, work = step.kv_tokens, step.work
        loads = highest, mean, _ = float(kv_tokens.max()), float(kv_tokens.mean()), float(kv_tokens.min())
        # Mostly one and the same array.
        works = (highest, mean) if work is kv_tokens else (float(work.max()), float(work.mean()))
        prefill_balance = _balance(step.prefill_tokens)
        values = (start_s, step.duration_s, *loads, *works, prefill_balance, float(output_tokens))
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def stats(self, from_s: float, to_s: float) -> BarrierStats:
        """Return the statistics of the steps with ``from_s <= start < to_s``."""
        columns = {name: np.array(column) for name, column in self._columns.items()}
        inside = (columns["start_s"] >= from_s) & (columns["start_s"] < to_s)
        duration_s, highest, mean, lowest, work_max, work_mean, balance, tokens = (
            columns[name][inside] for name in _COLUMNS[1:]
        )
        balance = balance[balance > 0]
        busy_s = float(duration_s.sum())
        envelope = float((work_max * duration_s).sum())
        return BarrierStats(
            steps=int(inside.sum()),
            busy_s=busy_s,
            output_tokens=int(tokens.sum()),
            imbalance_kv_tokens=float(((highest - lowest) * duration_s).sum()) / busy_s if busy_s else None,
            idle_fraction=1 - float((work_mean * duration_s).sum()) / envelope if envelope else None,
            mean_kv_tokens=float((mean * duration_s).sum()) / busy_s if busy_s else None,
            prefill_balance=float(balance.mean()) if len(balance) else None,
        )


def _balance(prefill_tokens: IntArray) -> float:
    """Return mean / max, 0 where nothing is prefilled."""
    most = int(prefill_tokens.max())
    return float(prefill_tokens.mean()) / most if most else 0.0
