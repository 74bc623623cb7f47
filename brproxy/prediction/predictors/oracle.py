"""oracle: knows how long each output will be, as only a simulator can; it bounds what prediction gives."""

from __future__ import annotations

from brproxy.prediction.predictor import LENGTH_UNLIMITED, Prospect, register_predictor
from brproxy.prediction.predictors.survival import SurvivalPredictor
from brproxy.types import PendingRequest


@register_predictor("oracle")
class OraclePredictor(SurvivalPredictor):
    """The true length where the request carries it; in the proxy, where none does, it is ``survival``.

    Source: arXiv 2605.06113, Oracle.
    """

    LOOKAHEAD_TURNOVERS = 3.0
    GROWTH_FORESEEN = 1.0

    def prospect(self, request: PendingRequest) -> Prospect:
        """See Predictor.prospect."""
        if request.output_tokens_true is None:
            return super().prospect(request)
        limit = LENGTH_UNLIMITED if request.output_tokens_max is None else request.output_tokens_max
        return Prospect(length_max=min(request.output_tokens_true, limit), certain=True)
