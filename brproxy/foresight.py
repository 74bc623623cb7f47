"""What a round foresees: how far it looks ahead, and the load that a predictor expects until then. Pure.

A predictor that raises or answers nonsense costs the forecast and nothing else: the load as it is stands in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from brproxy.faults import Faults
from brproxy.ledger import Ledger
from brproxy.prediction.predictor import ActiveRequests, AnyPredictor, truncate
from brproxy.prediction.quality import QualityMonitor
from brproxy.routing.fscore import discounts_for
from brproxy.routing.policy import AnyPolicy
from brproxy.routing.view import FloatArray, Outlook, RoundState, RoutingError
from brproxy.step_costs import StepCosts
from brproxy.turnover import Turnover
from brproxy.types import RequestId

ROUNDS_PER_SAMPLE = 16
"""One in so many rounds with a forecast samples a prediction: measuring must cost less than deciding."""

_NO_LOOKAHEAD = discounts_for(0, 1.0)


class Foresight:
    """Forecasts the load of one group's workers by ``predictor``, as far ahead as ``policy`` wants to see.

    Now and then it notes with ``quality`` what is predicted of one request.
    """

    def __init__(
        self,
        ledger: Ledger,
        policy: AnyPolicy,
        predictor: AnyPredictor,
        quality: QualityMonitor,
        faults: Faults,
        rng: np.random.Generator,
    ) -> None:
        self._ledger = ledger
        self._roster = ledger.roster
        self._policy = policy
        self._predictor = predictor
        self._quality = quality
        self._faults = faults
        self._rng = rng
        self._rounds = 0
        self._turnover = Turnover(ledger)
        self._discounts_for: tuple[float, int, int] | None = None
        self._discounts_now = _NO_LOOKAHEAD
        # What a KV token weighs in a discounted load, kept: each request that comes alone needs it.
        self.discount_sum = 1.0
        self._turnover_steps = 1.0

    def look_by(self, policy: AnyPolicy) -> None:
        """Look as far ahead as another policy wants to see, from now on."""
        self._policy = policy
        self._discounts_for = None

    def discounts(self) -> tuple[FloatArray, float]:
        """Return the policy's discounts for the traffic as it is, and the turnover in steps."""
        part = "predictor"
        turnover, roster = self._turnover, self._roster
        try:
            turnover.look()
            mean_output_tokens = self._predictor.mean_output_tokens
            # Also when a member comes or goes: slots and G decide how fast slots turn over.
            found = (mean_output_tokens, roster.version, turnover.version)
            if found != self._discounts_for:
                turnover.settle()
                turnover_steps = turnover.steps(mean_output_tokens)
                part = "policy"
                discounts = self._policy.discounts(turnover_steps, self._predictor.LOOKAHEAD_TURNOVERS)
                discount_sum = float(discounts.sum())
                if discounts.ndim != 1 or not len(discounts) or not math.isfinite(discount_sum):
                    msg = f"discounts are no finite vector: {discounts}"
                    raise RoutingError(msg)  # noqa: TRY301 - as if the policy had raised it
                self._discounts_now, self._turnover_steps = discounts, turnover_steps
                self.discount_sum = discount_sum
                self._discounts_for = (*found[:2], turnover.version)
        except Exception as error:  # noqa: BLE001 - the last ones will do
            self._faults.note(part, error)
        return self._discounts_now, self._turnover_steps

    def discounted_load(self, state: RoundState, discounts: FloatArray) -> list[float]:
        """Return each worker's load over ``discounts`` (more than one); as it is if there is no forecast."""
        # Not copied: policies take integers for numbers.
        now: list[float] = state.kv_tokens  # type: ignore[assignment]
        workers = len(now)
        try:
            active = self._active(len(discounts) - 1)
            load: list[float] = self._predictor.discounted_load(active, workers, discounts).tolist()
            # An endless or missing number makes the sum one.
            if len(load) == workers and math.isfinite(sum(load)):
                if not self._ledger.has_offset:
                    return load
                offset = self._ledger.offset_by_place()
                # Nobody knows when it goes: it stays as it is for as long as anybody looks ahead.
                weight = float(discounts.sum())
                return [max(kv + weight * more, 0.0) for kv, more in zip(load, offset, strict=True)]
            self._faults.note("predictor", RoutingError(f"discounted_load of {workers} workers is {load}"))
        except Exception as error:  # noqa: BLE001 - whatever a predictor raises, the round goes on
            self._faults.note("predictor", error)
        return now

    def outlook(
        self,
        state: RoundState,
        costs: StepCosts | None,
        waited: Sequence[float] | None,
        held_s: float,
        wait_s_max: float,
    ) -> Outlook:
        """Return what a round over ``state`` may know, the forecast as far ahead as the policy looks."""
        discounts, turnover_steps = self.discounts()
        forecast = self.forecast(state, len(discounts) - 1)
        predictor = self._predictor
        foreseen = predictor.LOOKAHEAD_TURNOVERS, predictor.GROWTH_FORESEEN
        return Outlook(forecast, turnover_steps, *foreseen, costs, waited, held_s, wait_s_max)

    def forecast(self, state: RoundState, horizon_steps: int) -> FloatArray | None:
        """Return float64[G, H+1], the load as it is where there is no forecast; None without a horizon."""
        if not horizon_steps:
            return None
        shape = (len(state.kv_tokens), horizon_steps + 1)
        try:
            forecast = self._predictor.forecast(self._active(horizon_steps), *shape[:1], horizon_steps)
            if forecast.shape == shape and math.isfinite(forecast.sum()):
                if not self._ledger.has_offset:
                    return forecast
                offset = np.array(self._ledger.offset_by_place(), dtype=np.float64)
                return np.maximum(forecast + offset[:, None], 0.0)
            self._faults.note("predictor", RoutingError(f"no finite forecast of shape {shape}: {forecast}"))
        except Exception as error:  # noqa: BLE001 - whatever a predictor raises, the round goes on
            self._faults.note("predictor", error)
        return np.repeat(np.array(state.kv_tokens, dtype=np.float64)[:, None], shape[1], axis=1)

    def _active(self, horizon_steps: int) -> ActiveRequests:
        """Return the bound requests, and now and then note what is predicted of one."""
        active = self._ledger.active()
        self._rounds += 1
        if self._rounds % ROUNDS_PER_SAMPLE == 0 and self._ledger.bound:
            self._sample(active, horizon_steps)
        return active

    def _sample(self, active: ActiveRequests, horizon_steps: int) -> None:
        """Note what the predictor says of one running request, to be compared with the truth later."""
        row = int(self._rng.integers(self._ledger.bound))
        one = active.only(slice(row, row + 1))
        if not one.certain[0] and self._ledger.row_sequences(row):
            survival = self._predictor.survival(one, horizon_steps)
            truncate(survival, one)
            request_id = RequestId(int(self._ledger.row_ids()[row]))
            self._quality.watch(request_id, int(one.output_tokens[0]), survival[0])
