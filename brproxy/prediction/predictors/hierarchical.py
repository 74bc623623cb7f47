"""hierarchical: backs off from the prompt to its beginning, to who asks which model, to all traffic."""

from __future__ import annotations

from collections.abc import Hashable

from brproxy.prediction.backoff import BackoffPredictor
from brproxy.prediction.predictor import register_predictor
from brproxy.types import PendingRequest


@register_predictor("hierarchical")
class HierarchicalPredictor(BackoffPredictor):
    """Beyond the paper: a prompt never seen may still share its template, its model or its user."""

    @staticmethod
    def keys(request: PendingRequest) -> tuple[Hashable | None, ...]:
        """See BackoffPredictor.keys."""
        return (request.prompt_hash, request.prefix_hash, (request.model, request.user))
