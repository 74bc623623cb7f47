"""exact-match: a distribution of output lengths for each prompt, backing off to all traffic."""

from __future__ import annotations

from collections.abc import Hashable

from brproxy.prediction.backoff import BackoffPredictor
from brproxy.prediction.predictor import register_predictor
from brproxy.types import PendingRequest


@register_predictor("exact-match")
class ExactMatchPredictor(BackoffPredictor):
    """What the same prompt was answered with before. Source: arXiv 2605.06113, ExactMatch."""

    @staticmethod
    def keys(request: PendingRequest) -> tuple[Hashable | None, ...]:
        """See BackoffPredictor.keys."""
        return (request.prompt_hash,)
