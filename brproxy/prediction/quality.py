"""How good the predictions are, measured on live traffic. Pure.

Now and then one running request is sampled with what the predictor says of it: p_fin, the probability that it
ends within H steps, and μ_rem, the steps it has left if it does. When it finishes, the truth is known.
Source: the offline measures of arXiv 2605.06113 (AUC of p_fin, MAE of μ_rem), and calibration.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from brproxy.types import RequestId

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_WATCHED_MAX = 4096
_RESULTS_MAX = 2000
_BINS = 10


class _Sample(NamedTuple):
    age: int
    p_fin: float
    mu_rem: float
    horizon_steps: int


class _Result(NamedTuple):
    p_fin: float
    ended: bool
    error_steps: float


@dataclass(frozen=True, slots=True)
class PredictionQuality:
    """Over the last samples whose request has finished; None where they cannot tell.

    ``auc``: probability that of two requests the one that ended within the horizon had the larger p_fin.
    ``mae_steps``: mean error of μ_rem over those that ended. ``calibration_error``: mean distance of p_fin
    from the share that ended, over ten bins of p_fin.
    """

    samples: int
    auc: float | None
    mae_steps: float | None
    calibration_error: float | None


class QualityMonitor:
    """Samples that wait for their request's end, and the results of those that have ended."""

    def __init__(self) -> None:
        self._watched: dict[RequestId, _Sample] = {}
        self._results: deque[_Result] = deque(maxlen=_RESULTS_MAX)

    def watch(self, request_id: RequestId, age: int, survival: FloatArray) -> None:
        """Note what is predicted of a request ``age`` tokens old: float64[H+1], P(runs after h steps)."""
        if len(self._watched) >= _WATCHED_MAX or request_id in self._watched:
            return
        p_fin = float(1.0 - survival[-1])
        # E[remaining | it ends within H] = Σ_h P(h < remaining <= H) / P(remaining <= H).
        mu_rem = float((survival[:-1] - survival[-1]).sum()) / p_fin if p_fin > 0 else 0.0
        self._watched[request_id] = _Sample(age, p_fin, mu_rem, len(survival) - 1)

    def finished(self, request_id: RequestId, output_tokens: int) -> None:
        """Compare with the truth: the request ended by itself after ``output_tokens``."""
        sample = self._watched.pop(request_id, None)
        if sample is None:
            return
        remaining = output_tokens - sample.age
        ended = remaining <= sample.horizon_steps
        self._results.append(_Result(sample.p_fin, ended, abs(sample.mu_rem - remaining)))

    def dropped(self, request_id: RequestId) -> None:
        """Forget a request that did not end by itself: it says nothing about lengths."""
        self._watched.pop(request_id, None)

    def report(self) -> PredictionQuality:
        """Return the quality so far."""
        p_fin = np.array([result.p_fin for result in self._results])
        ended = np.array([result.ended for result in self._results], dtype=bool)
        errors = np.array([result.error_steps for result in self._results])[ended]
        return PredictionQuality(
            samples=len(p_fin),
            auc=_auc(p_fin, ended),
            mae_steps=float(errors.mean()) if len(errors) else None,
            calibration_error=_calibration_error(p_fin, ended),
        )


def _auc(scores: FloatArray, positive: BoolArray) -> float | None:
    """Return the area under the ROC curve by ranks (Mann-Whitney), equal scores counting half."""
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return None
    ordered = np.sort(scores)
    rank = (np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right") + 1) / 2
    return float((rank[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _calibration_error(p_fin: FloatArray, ended: BoolArray) -> float | None:
    if not len(p_fin):
        return None
    bins = np.minimum((p_fin * _BINS).astype(np.int64), _BINS - 1)
    count = np.bincount(bins, minlength=_BINS)
    gap = np.abs(np.bincount(bins, p_fin, minlength=_BINS) - np.bincount(bins, ended, minlength=_BINS))
    return float(gap.sum() / count.sum())
