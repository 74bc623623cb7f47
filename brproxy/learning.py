"""What a group learns from requests that end: its predictor's lessons, and how good it was. Pure."""

from __future__ import annotations

from brproxy.happenings import Observer
from brproxy.lifecycle import Entry, Event
from brproxy.prediction.predictor import AnyPredictor
from brproxy.prediction.quality import QualityMonitor

# As plain names: looking a member of an enumeration up costs more than comparing it.
_FINISH = Event.FINISH


class Learner(Observer):
    """Teaches ``predictor`` how long outputs became, and ``quality`` those that ended by themselves.

    An output whose client left, whose worker failed, or that got as long as its request allows was cut: it
    would have become longer. A request of several sequences teaches their mean, one that has generated
    nothing teaches nothing.
    """

    def __init__(self, predictor: AnyPredictor, quality: QualityMonitor) -> None:
        self.predictor = predictor
        self.quality = quality

    def ended(self, entry: Entry, event: Event, waited_s: float | None) -> None:
        """See Observer.ended."""
        output_tokens, request = entry.output_tokens, entry.request
        if not output_tokens or not entry.sequences:
            self.quality.dropped(entry.id)
            return
        if entry.sequences > 1:
            output_tokens = max(1, output_tokens // entry.sequences)
        limit, finished = request.output_tokens_max, event is _FINISH
        try:
            self.predictor.observe(
                request, output_tokens, ended=finished and (limit is None or output_tokens < limit)
            )
        finally:
            if finished:
                self.quality.finished(entry.id, output_tokens)
            else:
                self.quality.dropped(entry.id)
