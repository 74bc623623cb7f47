"""survival: the empirical distribution of output lengths, conditioned on the tokens already streamed."""

from __future__ import annotations

from collections import deque
from typing import ClassVar

import numpy as np
from pydantic import Field

from brproxy.prediction.predictor import (
    ActiveRequests,
    FloatArray,
    IntArray,
    Predictor,
    PredictorParams,
    register_predictor,
)


class SurvivalParams(PredictorParams):
    """Parameters of ``survival``."""

    window: int = Field(
        default=2000, ge=1, le=1_000_000, description="Finished requests that are remembered (requests)."
    )
    output_tokens_max: int = Field(
        default=32768, ge=1, le=1 << 20, description="Longer outputs count as this long (tokens)."
    )
    prior_output_tokens: float = Field(
        default=512.0,
        ge=1,
        description="Mean output length assumed before anything has finished (tokens).",
    )


@register_predictor("survival")
class SurvivalPredictor(Predictor[SurvivalParams]):
    """``P(length > t + h | length > t)`` from a sliding window of finished lengths.

    Source: arXiv 2605.06113, the Survival predictor, projected as an expectation rather than a cut-off
    (a plain curve is too blunt to name the step at which a request ends). With ``alive[t]`` the number of
    remembered lengths above t::

        P(h | t) = (alive[t + h] + ρ^h) / (alive[t] + 1)

    The pseudo-observation is geometric, ρ = 1 - 1/mean: it carries the forecast before anything is known and
    beyond the longest length seen, and vanishes as the window fills. An observation costs two slice
    additions; a forecast one pass over the requests and two products of [G, U] with [U, H+1] matrices, where
    U is the number of distinct ages.
    """

    Params: ClassVar[type[PredictorParams]] = SurvivalParams

    def __init__(self, params: SurvivalParams) -> None:
        super().__init__(params)
        self._lengths: deque[int] = deque()
        self._length_sum = 0
        self._alive = np.zeros(params.output_tokens_max + 1, dtype=np.float64)

    def observe(self, output_tokens: int) -> None:
        """See Predictor.observe."""
        length = min(output_tokens, self.params.output_tokens_max)
        if len(self._lengths) == self.params.window:
            oldest = self._lengths.popleft()
            self._alive[:oldest] -= 1
            self._length_sum -= oldest
        self._lengths.append(length)
        self._alive[:length] += 1
        self._length_sum += length

    @property
    def mean_output_tokens(self) -> float:
        """Mean of the remembered lengths, the prior's before there are any."""
        if not self._lengths:
            return self.params.prior_output_tokens
        return max(1.0, self._length_sum / len(self._lengths))

    def forecast(self, active: ActiveRequests, workers: int, horizon_steps: int) -> FloatArray:
        """See Predictor.forecast."""
        ahead = np.arange(horizon_steps + 1)
        age = np.minimum(active.output_tokens, self.params.output_tokens_max)
        ages, position = np.unique(age, return_inverse=True)
        cell = active.worker * len(ages) + position
        shape = (workers, len(ages))
        kv_tokens = np.bincount(cell, weights=active.kv_tokens, minlength=workers * len(ages)).reshape(shape)
        requests = np.bincount(cell, minlength=workers * len(ages)).reshape(shape)
        survival = self._survival(ages, ahead)
        forecast: FloatArray = kv_tokens @ survival + (requests @ survival) * ahead
        return forecast

    def _survival(self, ages: IntArray, ahead: IntArray) -> FloatArray:
        """Return float64[U, H+1]: P(length > age + h | length > age)."""
        decay = (1.0 - 1.0 / self.mean_output_tokens) ** ahead
        later = np.minimum(ages[:, None] + ahead, self.params.output_tokens_max)
        survival: FloatArray = (self._alive[later] + decay) / (self._alive[ages][:, None] + 1.0)
        return survival
