"""The interface of a predictor: it learns from what finishes and forecasts each worker's load.

Predictors know nothing of routing, and routing nothing of them: they meet in an array ``forecast[G, H+1]``.
What a predictor says of a request is a *prospect*, made once when the request is bound: which of its curves
describes the output, how long the output can get, and whether it gets exactly that long.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from brproxy.prediction.projection import project_certain, project_curves
from brproxy.registry import Registry, make_configurable
from brproxy.types import TOKENS_MAX, PendingRequest

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

LENGTH_UNLIMITED = 1 << 40
"""Stands for "no limit on the output"."""


class PredictorParams(BaseModel):
    """The TOML table of a predictor; every predictor's parameters extend it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


P = TypeVar("P", bound=PredictorParams)


class Prospect(NamedTuple):
    """What a predictor says of one request.

    ``curve``: its number for the distribution that the output length is drawn from. ``length_max``: most
    output tokens. ``certain``: the output has exactly ``length_max`` tokens.
    """

    curve: int = 0
    length_max: int = LENGTH_UNLIMITED
    certain: bool = False


NO_PROSPECT = Prospect()

# Most requests state one of few limits, and to find one takes a third of what it takes to make it.
_prospect = lru_cache(maxsize=256)(Prospect)


class Expectation(NamedTuple):
    """How long a request's output is expected to get, ``tokens``.

    ``outputs``: how many outputs of such requests it is known from; 0: of none, but of all traffic.
    """

    tokens: float = 0.0
    outputs: float = 0.0


NOTHING_KNOWN = Expectation()

CERTAIN_OUTPUTS = 1e9
"""``outputs`` of an expectation that is exact."""


@dataclass(frozen=True, slots=True)
class ActiveRequests:
    """The N requests bound to the workers of one group, as parallel arrays [N] in no particular order.

    ``worker``: index of each request's worker. ``kv_tokens``: its load now (prompt and streamed tokens).
    ``output_tokens``: tokens streamed so far, of each of its sequences. ``curve``, ``length_max``,
    ``certain``: its prospect. ``sequences``: how many tokens it grows by in a step; None: each by one.
    """

    worker: IntArray
    kv_tokens: IntArray
    output_tokens: IntArray
    curve: IntArray
    length_max: IntArray
    certain: BoolArray
    sequences: IntArray | None = None

    def only(self, rows: BoolArray | slice) -> ActiveRequests:
        """Return the requests that ``rows`` (bool[N] or a slice) picks."""
        return ActiveRequests(
            self.worker[rows],
            self.kv_tokens[rows],
            self.output_tokens[rows],
            self.curve[rows],
            self.length_max[rows],
            self.certain[rows],
            None if self.sequences is None else self.sequences[rows],
        )


def _many() -> int:
    return TOKENS_MAX


class Predictor(ABC, Generic[P]):
    """Forecasts load from the lengths of the outputs it has seen end, or run for as long as they did."""

    Params: ClassVar[type[PredictorParams]] = PredictorParams
    USES_KEYS: ClassVar[bool] = False
    """Whether it reads prompt and prefix hashes, which somebody has to compute."""
    LOOKAHEAD_TURNOVERS: ClassVar[float] = 2.0
    """How far ahead its forecasts are worth weighing (turnovers of a worker's slots), found by simulation."""
    GROWTH_FORESEEN: ClassVar[float] = 0.0
    """How much of a worker's growth until the next departure its forecasts have (share), by simulation."""

    def __init__(self, params: P) -> None:
        self.params = params
        self._running: Callable[[], ActiveRequests] | None = None
        self._how_many: Callable[[], int] = _many

    def watch(self, running: Callable[[], ActiveRequests], how_many: Callable[[], int] = _many) -> None:
        """Learn from now on also from what ``running`` returns: requests that have not ended yet.

        ``how_many`` of them there are it tells sooner; where they are few nobody asks who they are.
        """
        self._running, self._how_many = running, how_many

    @property
    @abstractmethod
    def mean_output_tokens(self) -> float:
        """Mean output length of the traffic; a prior's before anything has finished. At least 1.

        Of what leaves a worker, however it ends: it tells how fast slots turn over.
        """

    @abstractmethod
    def observe(self, request: PendingRequest, output_tokens: int, *, ended: bool = True) -> None:
        """Learn that ``request`` left its worker after ``output_tokens`` (>= 0) tokens.

        ``ended``: its output ended by itself; else it was cut there and would have become longer.
        """

    @abstractmethod
    def survival(self, active: ActiveRequests, horizon_steps: int) -> FloatArray:
        """Return float64[N, H+1]: P(a request still runs after h more steps), from its curve alone."""

    @abstractmethod
    def survival_at(self, active: ActiveRequests, steps: IntArray) -> FloatArray:
        """Return float64[N, K]: as ``survival``, after each of ``steps`` (int64[K]), however far ahead."""

    def prospect(self, request: PendingRequest) -> Prospect:
        """Return what is known of a request that is about to be bound."""
        curve, limit = self._curve(request) if self.USES_KEYS else 0, request.output_tokens_max
        if limit is None:
            return Prospect(curve) if curve else NO_PROSPECT
        return _prospect(curve, limit, request.runs_to_max)

    def expectation(self, request: PendingRequest) -> Expectation:
        """Return how long the output of a request that has not begun is expected to get."""
        prospect = self.prospect(request)
        if prospect.certain:
            return Expectation(prospect.length_max, CERTAIN_OUTPUTS)
        expectation = self._expectation(prospect.curve)
        return expectation._replace(tokens=min(expectation.tokens, prospect.length_max))

    def forecast(self, active: ActiveRequests, workers: int, horizon_steps: int) -> FloatArray:
        """Return float64[G, H+1]: the expected load of each worker 0, 1, …, H decode steps ahead.

        ``Σ_i P(i still runs after h steps) * (kv_tokens_i + sequences_i * h)`` over each worker's requests;
        column 0 is exactly the load now.
        """
        certain = active.certain
        if not certain.any():
            return self._project(active, workers, horizon_steps)
        known = active.only(certain)
        remaining = known.length_max - known.output_tokens
        forecast = project_certain(
            known.worker, known.kv_tokens, remaining, workers, horizon_steps, known.sequences
        )
        if not certain.all():
            forecast += self._project(active.only(~certain), workers, horizon_steps)
        return forecast

    def discounted_load(self, active: ActiveRequests, workers: int, discounts: FloatArray) -> FloatArray:
        """Return float64[G]: each worker's forecast weighed with ``discounts`` (float64[H+1]) and summed.

        ``Σ_h d_h forecast[g, h]``: all that a request which waits alone needs to know.
        """
        return self.forecast(active, workers, len(discounts) - 1) @ discounts

    def load_at(self, active: ActiveRequests, workers: int, steps: IntArray) -> FloatArray:
        """Return float64[G, K]: as ``forecast``, ``steps`` (int64[K], >= 0) decode steps ahead each."""
        survival = self.survival_at(active, steps)
        survival[active.certain] = 1.0
        remaining = np.maximum(active.length_max - active.output_tokens, 1)
        survival *= steps < remaining[:, None]
        return project_curves(active.worker, active.kv_tokens, survival, workers, active.sequences, steps)

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what has been learnt, in JSON's types."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Learn what ``state`` returned once; raises KeyError, TypeError or ValueError for anything else."""

    def _curve(self, request: PendingRequest) -> int:
        """Return the number of the curve that describes ``request``."""
        return 0

    def _expectation(self, curve: int) -> Expectation:
        """Return what is expected of outputs that ``curve`` describes."""
        return Expectation(self.mean_output_tokens)

    def _project(self, active: ActiveRequests, workers: int, horizon_steps: int) -> FloatArray:
        """Project requests of uncertain length; one by one, unless a predictor knows better."""
        return self.project_each(active, workers, horizon_steps)

    def project_each(self, active: ActiveRequests, workers: int, horizon_steps: int) -> FloatArray:
        """Project requests by a survival curve each; as ``forecast``, for requests of uncertain length."""
        survival = self.survival(active, horizon_steps)
        truncate(survival, active)
        return project_curves(active.worker, active.kv_tokens, survival, workers, active.sequences)


def truncate(survival: FloatArray, active: ActiveRequests) -> None:
    """Set ``survival`` (float64[N, H+1]) to 0 where a request will have reached its ``length_max``.

    A request that has passed its limit already (by an estimate of tokens that was too high) is about to
    end; column 0 stays 1, because it still runs.
    """
    remaining = np.maximum(active.length_max - active.output_tokens, 1)
    steps = survival.shape[1]
    rows = np.flatnonzero(remaining < steps)
    if len(rows):
        survival[rows] *= np.arange(steps) < remaining[rows, None]


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
