"""What the barrier costs: statistics over the steps of a deployment, for any window of time. Pure."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from brproxy.types import InvalidInputError
from loadgen.cluster import Step

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


_ROWS_AT_ONCE = 1024
"""Steps that are summed up together: a call for each of them would cost as much as simulating it."""

_COLUMNS = (
    *("start_s", "duration_s", "kv_max", "kv_mean", "kv_min", "work_max", "work_mean"),
    *("prefill_balance", "tokens"),
)


class BarrierRecord:
    """The load extremes of every step so far."""

    def __init__(self) -> None:
        self._columns = {name: array("d") for name in _COLUMNS}
        self._steps = 0
        self._last: list[tuple[float, Step, int]] = []

    def add(self, start_s: float, step: Step, output_tokens: int) -> None:
        """Record a step; raises InvalidInputError beyond STEPS_MAX of them."""
        if self._steps >= STEPS_MAX:
            msg = f"more than {STEPS_MAX} steps; reset the statistics"
            raise InvalidInputError(msg)
        self._steps += 1
        self._last.append((start_s, step, output_tokens))
        if len(self._last) >= _ROWS_AT_ONCE:
            self._sum_up()

    def stats(self, from_s: float, to_s: float) -> BarrierStats:
        """Return the statistics of the steps with ``from_s <= start < to_s``."""
        self._sum_up()
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

    def _sum_up(self) -> None:
        """Take the last steps into the columns."""
        if not self._last:
            return
        starts_s, steps, tokens = zip(*self._last, strict=True)
        kv_tokens = np.array([step.kv_tokens for step in steps], dtype=np.float64)
        work = np.array([step.work for step in steps], dtype=np.float64)
        prefill_tokens = np.array([step.prefill_tokens for step in steps], dtype=np.float64)
        most = prefill_tokens.max(axis=1)
        columns = (
            np.array(starts_s),
            np.array([step.duration_s for step in steps]),
            *(kv_tokens.max(axis=1), kv_tokens.mean(axis=1), kv_tokens.min(axis=1)),
            *(work.max(axis=1), work.mean(axis=1)),
            # 0 where nothing is prefilled.
            prefill_tokens.mean(axis=1) / np.where(most > 0, most, 1.0),
            np.array(tokens, dtype=np.float64),
        )
        for column, values in zip(self._columns.values(), columns, strict=True):
            column.frombytes(values.tobytes())
        self._last.clear()
