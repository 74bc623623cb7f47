"""The interface of a predictor: it learns from what finishes and forecasts each worker's load.

Predictors know nothing of routing, and routing nothing of them: they meet in an array ``forecast[G, H+1]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from brproxy.registry import Registry, make_configurable

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


class PredictorParams(BaseModel):
    """The TOML table of a predictor; every predictor's parameters extend it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


P = TypeVar("P", bound=PredictorParams)


@dataclass(frozen=True, slots=True)
class ActiveRequests:
    """The N requests bound to the workers of one group, as parallel int64[N] arrays in no particular order.

    ``worker``: index of each request's worker. ``kv_tokens``: its load now (prompt and streamed tokens).
    ``output_tokens``: tokens streamed so far.
    """

    worker: IntArray
    kv_tokens: IntArray
    output_tokens: IntArray


class Predictor(ABC, Generic[P]):
    """Forecasts load from the lengths of the outputs it has seen finish."""

    Params: ClassVar[type[PredictorParams]] = PredictorParams

    def __init__(self, params: P) -> None:
        self.params = params

    @abstractmethod
    def observe(self, output_tokens: int) -> None:
        """Learn that a request finished by itself after ``output_tokens`` (>= 0) tokens."""

    @abstractmethod
    def forecast(self, active: ActiveRequests, workers: int, horizon_steps: int) -> FloatArray:
        """Return float64[G, H+1]: the expected load of each worker 0, 1, …, H decode steps ahead.

        ``Σ_i P(i still runs after h steps) * (kv_tokens_i + h)`` over each worker's requests; column 0 is
        exactly the load now.
        """


AnyPredictor = Predictor[PredictorParams]
PREDICTORS: Registry[type[AnyPredictor]] = Registry("predictor", "brproxy.prediction.predictors")


def register_predictor(name: str) -> Callable[[type[Predictor[P]]], type[Predictor[P]]]:
    """Return a class decorator that files a predictor under ``name``."""

    def add(predictor: type[Predictor[P]]) -> type[Predictor[P]]:
        # The registry hands a predictor only parameters of its own Params class (see make_predictor).
        PREDICTORS.register(name)(predictor)  # type: ignore[arg-type]
        return predictor

    return add


def make_predictor(name: str, params: PredictorParams | None = None) -> AnyPredictor:
    """Build the predictor called ``name`` with ``params`` or its defaults; raises UnknownNameError."""
    return make_configurable(PREDICTORS, name, params)
