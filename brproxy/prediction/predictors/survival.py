"""survival: the empirical distribution of output lengths, conditioned on the tokens already streamed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import ceil
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from brproxy.prediction.lengths import LengthWindow, as_told, length_grid
from brproxy.prediction.predictor import (
    ActiveRequests,
    BoolArray,
    FloatArray,
    IntArray,
    Predictor,
    PredictorParams,
    register_predictor,
    truncate,
)
from brproxy.prediction.projection import project_certain
from brproxy.types import TOKENS_MAX, PendingRequest

_GENERATIONS = 4.0
"""Once so many times what runs has ended, and is forgotten, what ends is as long as what comes: most of what
came with the first has ended by then. Who goes on counting what runs takes outputs for longer than they are.
"""

_RUNNING_SHARE_MIN = 1 / 16
"""What runs is not looked at where it is less than this of what is remembered: it can tell little, and costs
as much as if it were more.
"""

_NOTHING_FAR: tuple[IntArray, NDArray[np.float32]] = (np.empty(0, np.int64), np.empty((0, 0), np.float32))

_REFRESH_SHARE = 64
"""Curves and mean are made anew when one in so many of the remembered lengths is new."""


class SurvivalParams(PredictorParams):
    """Parameters of ``survival``."""

    window: int = Field(
        default=2000,
        ge=1,
        le=1_000_000,
        description="Requests that have ended and are remembered (requests).",
    )
    output_tokens_max: int = Field(
        default=32768, ge=1, le=1 << 20, description="Longer outputs count as this long (tokens)."
    )
    prior_output_tokens: float = Field(
        default=512.0,
        ge=1,
        description="Mean output length assumed before anything has finished (tokens).",
    )
    projection: Literal["expected", "cut"] = Field(
        default="expected",
        description="Loads ahead: each request by the chance that it still runs, or, as in the paper, whole "
        "up to the steps that it is expected to run on and not at all beyond.",
    )


@register_predictor("survival")
class SurvivalPredictor(Predictor[SurvivalParams]):
    """``P(length > t + h | length > t)`` from a sliding window of lengths, ended and cut.

    Source: arXiv 2605.06113, the Survival predictor, projected as an expectation rather than a cut-off
    (a plain curve is too blunt to name the step at which a request ends). With ``alive[t]`` the number of
    remembered lengths above t, which is the Kaplan-Meier estimate where some were cut or still run::

        P(h | t) = (alive[t + h] + ρ^h) / (alive[t] + 1)

    The pseudo-observation is geometric, ρ = 1 - 1/mean: it carries the forecast before anything is known and
    beyond the longest length seen, and vanishes as the window fills. Lengths and ages are rounded down to a
    grid (two per cent), so that the curves of all ages are one cached matrix and a forecast is one product
    of [G, B] and [B, H+1] matrices, however many requests there are.

    What ends first, at the start of traffic, are the short ones. So what still runs counts as cut at its age:
    fully, until the first are forgotten, and less and less from then on, until what leaves is as long as what
    comes (``_GENERATIONS``).

    What is learnt takes effect now and then, curves and mean together: the mean decides how far ahead to
    look, and if it moved with each length, so would shape and weights of everything that is cached.
    """

    Params: ClassVar[type[PredictorParams]] = SurvivalParams

    def __init__(self, params: SurvivalParams) -> None:
        super().__init__(params)
        self._grid = length_grid(params.output_tokens_max)
        self._window = LengthWindow(self._grid, params.window)
        self._unseen = 0
        self._due = 1
        self._seen = 0
        self._mean = params.prior_output_tokens
        self._curve_of: Callable[[], FloatArray] = self._window.counts().alive
        self._alive_known: FloatArray | None = None
        self._remembered = 0.0
        # Single precision: a forecast of a million tokens is good to one, and takes half the time.
        self._table: NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)
        self._stale = True
        self._far = _NOTHING_FAR
        self._discounts: FloatArray = np.empty(0)
        self._discounted: tuple[FloatArray, FloatArray] = (np.empty(0), np.empty(0))
        self._until: tuple[FloatArray, FloatArray, FloatArray] = (self._discounts, *self._discounted)

    @property
    def mean_output_tokens(self) -> float:
        """See Predictor.mean_output_tokens."""
        return self._mean

    def observe(self, request: PendingRequest, output_tokens: int, *, ended: bool = True) -> None:
        """See Predictor.observe."""
        self._window.add(output_tokens, ended=ended)
        self._seen += 1
        self._unseen += 1
        if self._unseen >= self._due:
            self._refresh()

    def state(self) -> dict[str, Any]:
        """See Predictor.state."""
        return {"lengths": list(self._window.lengths)}

    def restore(self, state: dict[str, Any]) -> None:
        """See Predictor.restore."""
        for known in map(int, state["lengths"]):
            length, ended = as_told(known)
            self._window.add(length, ended=ended)
        self._seen = len(self._window)
        if len(self._window):
            self._refresh()

    def survival(self, active: ActiveRequests, horizon_steps: int) -> FloatArray:
        """See Predictor.survival."""
        return self._curves(horizon_steps)[self._grid.positions(active.output_tokens)].astype(np.float64)

    def survival_at(self, active: ActiveRequests, steps: IntArray) -> FloatArray:
        """See Predictor.survival_at."""
        alive = self._alive
        now = alive[self._grid.positions(active.output_tokens)]
        later = alive[self._grid.positions(active.output_tokens[:, None] + steps)]
        survival: FloatArray = (later + (1.0 - 1.0 / self._mean) ** steps) / (now[:, None] + 1.0)
        return survival

    def load_at(self, active: ActiveRequests, workers: int, steps: IntArray) -> FloatArray:
        """See Predictor.load_at. Most requests need no curve of their own, as in a forecast."""
        by_age = ~active.certain & self._told_by_age(active, int(steps.max()))
        load = self._by_age(active.only(by_age), workers, self._curves_at(steps), steps)
        return load if by_age.all() else load + super().load_at(active.only(~by_age), workers, steps)

    def discounted_load(self, active: ActiveRequests, workers: int, discounts: FloatArray) -> FloatArray:
        """See Predictor.discounted_load. Summing over the steps first leaves two numbers for each request."""
        if self.params.projection != "expected":
            return super().discounted_load(active, workers, discounts)
        position = self._grid.positions(active.output_tokens)
        remaining = active.length_max - active.output_tokens
        if remaining.min(initial=TOKENS_MAX) >= len(discounts) and not active.certain.any():
            of_kv, of_growth = self._discounted_curves(discounts)
            at = position
        else:
            of_kv, of_growth = self._discounted_until(discounts, int(position.max()))
            position[active.certain] = -1
            at = (position + 1) * len(discounts) + np.minimum(np.maximum(remaining, 1), len(discounts)) - 1
        growth = of_growth[at]
        if active.sequences is not None:
            growth *= active.sequences
        growth += of_kv[at] * active.kv_tokens
        return np.bincount(active.worker, growth, minlength=workers).astype(np.float64, copy=False)

    def _told_by_age(self, active: ActiveRequests, horizon_steps: int) -> BoolArray:
        """Return bool[N]: those of uncertain length of which the curve of their age says everything."""
        told: BoolArray = active.length_max - active.output_tokens > horizon_steps
        return told & (self.params.projection == "expected")

    def project_each(self, active: ActiveRequests, workers: int, horizon_steps: int) -> FloatArray:
        """See Predictor.project_each; cut off at E[min(remaining steps, H)] where the parameters say so."""
        if self.params.projection == "expected":
            return super().project_each(active, workers, horizon_steps)
        survival = self.survival(active, horizon_steps)
        truncate(survival, active)
        remaining = np.rint(survival[:, :horizon_steps].sum(axis=1)).astype(np.int64)
        # Who outlasts the horizon runs at its last step as well.
        remaining[remaining == horizon_steps] += 1
        return project_certain(
            active.worker, active.kv_tokens, remaining, workers, horizon_steps, active.sequences
        )

    def _project(self, active: ActiveRequests, workers: int, horizon_steps: int) -> FloatArray:
        """Sum requests by worker and age first: most of them need no curve of their own."""
        by_age, steps = self._told_by_age(active, horizon_steps), np.arange(horizon_steps + 1)
        if by_age.all():
            return self._by_age(active, workers, self._curves(horizon_steps), steps)
        others = self.project_each(active.only(~by_age), workers, horizon_steps)
        return others + self._by_age(active.only(by_age), workers, self._curves(horizon_steps), steps)

    def _by_age(
        self, active: ActiveRequests, workers: int, curves: NDArray[np.float32], steps: IntArray
    ) -> FloatArray:
        position = self._grid.positions(active.output_tokens)
        ages = int(position.max()) + 1 if len(position) else 1
        cell = active.worker * ages + position
        sums = np.empty((2, workers * ages), dtype=np.float32)
        sums[0] = np.bincount(cell, active.kv_tokens, minlength=workers * ages)
        sums[1] = np.bincount(cell, active.sequences, minlength=workers * ages)
        expected = (sums.reshape(2 * workers, ages) @ curves[:ages]).astype(np.float64)
        forecast: FloatArray = expected[:workers] + expected[workers:] * steps
        return forecast

    def _refresh(self) -> None:
        """Let what has been observed take effect."""
        window, prior = self._window, self.params.prior_output_tokens
        self._unseen = 0
        # So many that of all that are remembered by then one in _REFRESH_SHARE is new.
        growing, full = len(window) / (_REFRESH_SHARE - 1), self.params.window / _REFRESH_SHARE
        self._due = max(1, ceil(min(growing, full)))
        running = self._still_running()
        weight = self._weight(len(running))
        if not weight:
            running = running[:0]
        self._remembered = len(window) + weight * len(running)
        tokens = window.length_sum + weight * float(running.sum())
        ends = max(len(window) - window.cut, 1)
        self._curve_of = partial(window.counts().alive, running, weight, tokens / ends, prior)
        self._alive_known = None
        # Without any that run the lengths themselves tell, to the token.
        total = tokens
        if len(running):
            counts = window.counts(cut_is_end=True)
            staying = counts.alive(running, weight, tokens / max(len(window), 1), prior)
            total = self._grid.sum(staying)
            if not window.cut:
                self._alive_known = staying
        self._mean = max(1.0, total / self._remembered)
        self._stale = True
        self._far = _NOTHING_FAR

    @property
    def _alive(self) -> FloatArray:
        """The curve of outputs as it was when all was last made anew: not every lookahead needs it."""
        if self._alive_known is None:
            self._alive_known = self._curve_of()
        return self._alive_known

    def _weight(self, running: int) -> float:
        """Return what each of so many that run counts as beside one that has ended."""
        remembered = len(self._window)
        if running < _RUNNING_SHARE_MIN * remembered:
            return 0.0
        forgotten = self._seen - remembered
        return max(0.0, 1.0 - forgotten / (_GENERATIONS * max(running, 1)))

    def _still_running(self) -> IntArray:
        """Return how many tokens each request that runs has streamed, int64[R]."""
        if self._running is None or self._how_many() < _RUNNING_SHARE_MIN * len(self._window):
            return np.empty(0, dtype=np.int64)
        active = self._running()
        # What generates nothing, or no more, tells nothing.
        return (
            active.output_tokens if active.sequences is None else active.output_tokens[active.sequences > 0]
        )

    def _curves_at(self, steps: IntArray) -> NDArray[np.float32]:
        """Return float32[B, K]: P(h | age) for every age on the grid and ``steps``, kept while both stay."""
        if self._far[0] is not steps:
            ages = self._grid.points
            zeros = np.zeros_like(ages)
            every_age = ActiveRequests(zeros, zeros, ages, zeros, zeros, zeros.astype(bool))
            curves = SurvivalPredictor.survival_at(self, every_age, steps).astype(np.float32)
            self._far = (steps, curves)
        return self._far[1]

    def _curves(self, horizon_steps: int) -> NDArray[np.float32]:
        """Return float32[B, H+1]: P(h | age) for every age on the grid."""
        steps = horizon_steps + 1
        if self._stale or self._table.shape[1] != steps:
            alive = self._alive.astype(np.float32)
            decay = (1.0 - 1.0 / self._mean) ** np.arange(steps)
            self._table = self._grid.ahead(alive, steps)
            self._table += decay.astype(np.float32)
            self._table /= alive[:, None] + np.float32(1.0)
            self._stale = False
            self._discounts = np.empty(0)
            self._until = (self._discounts, *self._discounted)
        return self._table

    def _discounted_curves(self, discounts: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return ``Σ_h d_h P(h | age)`` and ``Σ_h d_h h P(h | age)`` for each age on the grid, float64[B]."""
        curves = self._curves(len(discounts) - 1)
        if self._discounts is not discounts:
            weights = np.stack([discounts, discounts * np.arange(len(discounts))], axis=1)
            of_kv, of_growth = (curves @ weights.astype(np.float32)).T.astype(np.float64)
            self._discounts, self._discounted = discounts, (of_kv, of_growth)
        return self._discounted

    def _discounted_until(self, discounts: FloatArray, position: int) -> tuple[FloatArray, FloatArray]:
        """Return the sums of ``_discounted_curves`` over the steps up to each one, for who has to end there.

        float64[(1 + B) * (H + 1)], row by row: the first is of those that run until then for certain, the
        others of each age, up to that at ``position`` at least.
        """
        _, of_kv, _ = self._until
        steps = len(discounts)
        if self._until[0] is not discounts or len(of_kv) < (position + 2) * steps:
            # Twice as far as asked for, because who runs gets older; most traffic never gets to the last age.
            curves = self._curves(steps - 1)[: 2 * position + 2]
            sums = np.empty((2, len(curves) + 1, steps))
            sums[:, 0] = discounts
            np.multiply(curves, discounts, out=sums[0, 1:])
            np.multiply(sums[0], np.arange(steps), out=sums[1])
            np.cumsum(sums, axis=2, out=sums)
            self._until = (discounts, sums[0].ravel(), sums[1].ravel())
        return self._until[1:]
