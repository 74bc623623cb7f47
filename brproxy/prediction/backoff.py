"""Predictors that know more than one distribution: a request's own first, wider ones where that is thin.

A request has a key at each level, the narrowest first; the widest level is all traffic (Survival). At each
level the wider one counts as ``prior_samples`` observations, so that a key seen once leans on its parent and
a key seen often does not::

    P_l(h | t) = (alive_l[t + h] + κ·S_{l+1}(t)·P_{l+1}(h | t)) / (alive_l[t] + κ·S_{l+1}(t))
    S_l(t)     = (alive_l[t] + κ·S_{l+1}(t)) / (n_l + κ)

with n_l lengths at level l, alive_l[t] of them above t (smoothed, see curve_table.py). The weight of a level
is conditioned on the tokens already streamed: a request that has outlived all its siblings falls back to
its parent's curve.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from typing import Any

import numpy as np
from pydantic import Field

from brproxy.prediction.curve_table import CurveTable
from brproxy.prediction.predictor import (
    ActiveRequests,
    BoolArray,
    Expectation,
    FloatArray,
    IntArray,
    Predictor,
)
from brproxy.prediction.predictors.survival import SurvivalParams, SurvivalPredictor
from brproxy.types import PendingRequest

_SLOT_BITS = 20


class BackoffParams(SurvivalParams):
    """Parameters of predictors that back off."""

    keys_max: int = Field(
        default=4096, ge=1, lt=1 << _SLOT_BITS, description="Keys remembered at each level (keys)."
    )
    key_window: int = Field(
        default=64,
        ge=1,
        le=10_000,
        description="Requests that have ended and are remembered for each key (requests).",
    )
    prior_samples: float = Field(
        default=0.5,
        gt=0,
        description="κ: what the next wider level counts for beside a key's own requests (requests).",
    )


class BackoffPredictor(SurvivalPredictor):
    """Backs off over ``levels``; a curve's number packs the slots of its keys."""

    # It names the steps at which requests end: what is further than that only blurs the margins near by.
    LOOKAHEAD_TURNOVERS = 1.5
    USES_KEYS = True

    Params = BackoffParams
    params: BackoffParams

    def __init__(self, params: BackoffParams) -> None:
        super().__init__(params)
        no_keys = self.keys(PendingRequest(0))
        self._tables = [CurveTable(self._grid, params.keys_max, params.key_window) for _ in no_keys]

    @staticmethod
    @abstractmethod
    def keys(request: PendingRequest) -> tuple[Hashable | None, ...]:
        """Return the request's key at each level, the narrowest first; None where it has none."""

    def observe(self, request: PendingRequest, output_tokens: int, *, ended: bool = True) -> None:
        """See Predictor.observe."""
        super().observe(request, output_tokens, ended=ended)
        for table, key in zip(self._tables, self.keys(request), strict=True):
            table.add(key, output_tokens, ended=ended)

    def survival(self, active: ActiveRequests, horizon_steps: int) -> FloatArray:
        """See Predictor.survival."""
        return self._narrowed(active, np.arange(horizon_steps + 1), super().survival(active, horizon_steps))

    def survival_at(self, active: ActiveRequests, steps: IntArray) -> FloatArray:
        """See Predictor.survival_at."""
        return self._narrowed(active, steps, super().survival_at(active, steps))

    def discounted_load(self, active: ActiveRequests, workers: int, discounts: FloatArray) -> FloatArray:
        """See Predictor.discounted_load. Only who has a key that is known needs a curve of its own."""
        known = active.curve != 0
        if not known.any():
            return super().discounted_load(active, workers, discounts)
        load = Predictor.discounted_load(self, active.only(known), workers, discounts)
        return load + super().discounted_load(active.only(~known), workers, discounts)

    def _narrowed(self, active: ActiveRequests, steps: IntArray, survival: FloatArray) -> FloatArray:
        """Return ``survival`` (float64[N, K], of all traffic) as the levels know it better."""
        position = self._grid.positions(active.output_tokens)
        later = self._grid.positions(active.output_tokens[:, None] + steps)
        reached = (self._alive[position] + 1.0) / (self._remembered + 1.0)
        for level in reversed(range(len(self._tables))):
            table = self._tables[level]
            slot = (active.curve >> (_SLOT_BITS * level)) & ((1 << _SLOT_BITS) - 1)
            prior = self.params.prior_samples * reached
            alive = table.alive[slot, position]
            survival = (table.alive[slot[:, None], later] + prior[:, None] * survival) / (alive + prior)[
                :, None
            ]
            reached = (alive + prior) / (table.samples[slot] + self.params.prior_samples)
        return survival

    def state(self) -> dict[str, Any]:
        """See Predictor.state."""
        levels = [[[key, lengths] for key, lengths in table.items()] for table in self._tables]
        return super().state() | {"levels": levels}

    def restore(self, state: dict[str, Any]) -> None:
        """See Predictor.restore."""
        super().restore(state)
        for table, items in zip(self._tables, state["levels"], strict=True):
            table.restore(
                (tuple(key) if isinstance(key, list) else key, map(int, lengths)) for key, lengths in items
            )

    def _curve(self, request: PendingRequest) -> int:
        curve = 0
        for level, (table, key) in enumerate(zip(self._tables, self.keys(request), strict=True)):
            curve |= table.find(key) << (_SLOT_BITS * level)
        return curve

    def _expectation(self, curve: int) -> Expectation:
        """See Predictor. Only the narrowest key tells requests of the same batch apart."""
        samples = float(self._tables[0].samples[curve & ((1 << _SLOT_BITS) - 1)])
        if not samples:
            return super()._expectation(curve)
        points, nothing = self._grid.points, np.zeros(1, dtype=np.int64)
        one = ActiveRequests(nothing, nothing, nothing, np.array([curve]), nothing, nothing.astype(bool))
        alive = self.survival_at(one, points)[0]
        return Expectation(float(alive[:-1] @ np.diff(points)), samples)

    def _told_by_age(self, active: ActiveRequests, horizon_steps: int) -> BoolArray:
        told: BoolArray = super()._told_by_age(active, horizon_steps) & (active.curve == 0)
        return told
