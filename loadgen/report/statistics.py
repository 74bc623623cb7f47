"""From outcomes to figures. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from loadgen.client import Outcome
from loadgen.report.schema import Percentiles

LATE_S_MAX = 0.5
"""A client that sends a request later than this is itself overloaded."""

LATE_SHARE_MAX = 0.25
"""Where steps end later than this, by how long they take, what is decided after one may miss the next."""

# Two-sided 95 % quantiles of Student's t for 1 to 10 degrees of freedom; beyond, the normal's will do.
_T_95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True, slots=True)
class Slo:
    """Service level objectives in milliseconds; None: any will do."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a run, in seconds since its start."""

    from_s: float
    to_s: float


@dataclass(frozen=True, slots=True)
class LatencySummary:
    """Latencies of the requests that finished; None where there were none."""

    ttft_ms: Percentiles | None
    tpot_ms: Percentiles | None
    itl_ms: Percentiles | None
    e2e_ms: Percentiles | None


def steady_window(outcomes: Sequence[Outcome]) -> Window:
    """Return the steady part of a run: from 25 % to 95 % of the arrivals."""
    due = [outcome.due_s for outcome in outcomes]
    return Window(due[len(due) * 25 // 100], due[len(due) * 95 // 100])


def within(outcomes: Iterable[Outcome], window: Window) -> list[Outcome]:
    """Return the requests that were due inside ``window``."""
    return [outcome for outcome in outcomes if window.from_s <= outcome.due_s < window.to_s]


def percentiles(values_s: Sequence[float]) -> Percentiles | None:
    """Return mean and percentiles in ms of values in seconds, None without any."""
    if not len(values_s):
        return None
    values_ms = np.asarray(values_s, dtype=np.float64) * 1000
    p50, p95, p99 = np.percentile(values_ms, (50, 95, 99)).tolist()
    return Percentiles(mean=float(values_ms.mean()), p50=p50, p95=p95, p99=p99)


def half_width_95(values: Sequence[float]) -> float:
    """Return the half-width of the mean's 95 % confidence interval, of two or more values."""
    t = _T_95[len(values) - 2] if len(values) - 2 < len(_T_95) else 1.96
    return float(t * np.std(values, ddof=1) / np.sqrt(len(values)))


def tpot_s(outcome: Outcome) -> float | None:
    """Return the time per output token after the first, None for fewer than two tokens."""
    if outcome.first_token_s is None or outcome.last_token_s is None or outcome.output_tokens < 2:
        return None
    return (outcome.last_token_s - outcome.first_token_s) / (outcome.output_tokens - 1)


def latencies(outcomes: Iterable[Outcome]) -> LatencySummary:
    """Summarise the requests that finished."""
    finished = [outcome for outcome in outcomes if outcome.failure is None]
    gaps = [outcome.gaps_s for outcome in finished if len(outcome.gaps_s)]
    return LatencySummary(
        ttft_ms=percentiles([o.first_token_s - o.due_s for o in finished if o.first_token_s is not None]),
        tpot_ms=percentiles([tpot for o in finished if (tpot := tpot_s(o)) is not None]),
        itl_ms=percentiles(np.concatenate(gaps).tolist()) if gaps else None,
        e2e_ms=percentiles([o.finished_s - o.due_s for o in finished if o.finished_s is not None]),
    )


def failures(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """Count the lost requests by kind."""
    kinds = Counter(outcome.failure.value for outcome in outcomes if outcome.failure is not None)
    return dict(sorted(kinds.items()))


def run_length_s(outcomes: Sequence[Outcome]) -> float:
    """Return the seconds from the first arrival to the last answer."""
    ends = [outcome.finished_s for outcome in outcomes if outcome.finished_s is not None]
    return max(ends, default=0.0) - outcomes[0].due_s


def goodput_requests_per_s(outcomes: Sequence[Outcome], slo: Slo) -> float | None:
    """Return the requests a second that met every objective, None without any objective."""
    if slo == Slo():
        return None
    length_s = run_length_s(outcomes)
    return sum(_meets(outcome, slo) for outcome in outcomes) / length_s if length_s else 0.0


def _meets(outcome: Outcome, slo: Slo) -> bool:
    if outcome.failure is not None or outcome.first_token_s is None or outcome.finished_s is None:
        return False
    tpot = tpot_s(outcome) or 0.0
    measured = (outcome.first_token_s - outcome.due_s, tpot, outcome.finished_s - outcome.due_s)
    limits = (slo.ttft_ms, slo.tpot_ms, slo.e2e_ms)
    return all(limit is None or value * 1000 <= limit for value, limit in zip(measured, limits, strict=True))


def client_warnings(outcomes: Iterable[Outcome], speed: float) -> list[str]:
    """Return what makes the client's own figures doubtful."""
    late_s = max((outcome.sent_s - outcome.due_s) / speed for outcome in outcomes)
    if late_s <= LATE_S_MAX:
        return []
    return [f"the client sent requests up to {late_s:.1f} s late: this machine is too slow for this load"]


def emulator_warnings(lag_s: float, late_share: float) -> list[str]:
    """Return what makes the emulator's figures doubtful; see ``emulator.deployment.Deployment``."""
    if lag_s > 0:
        return [f"the emulator fell {lag_s:.1f} s behind: lower --speed on this machine"]
    if late_share > LATE_SHARE_MAX:
        return [f"steps ended late by {late_share:.0%} of a step: lower --speed on this machine"]
    return []
