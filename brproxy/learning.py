"""What a group learns from requests that end: its predictor's lessons, and how good it was. Pure."""

from __future__ import annotations

from brproxy.happenings import Observer
from brproxy.lifecycle import Entry, Event
from brproxy.prediction.predictor import AnyPredictor
from brproxy.prediction.quality import QualityMonitor

# As plain names: looking a member of an enumeration up costs more than comparing it.
_FINISH = Event.FINISH


class Learner(Observer):
    """Teaches ``predictor`` the lengths of outputs that ended by themselves, and ``quality`` the truth.

    A request of several sequences teaches their mean, one that generates nothing teaches nothing.
    """

    def __init__(self, predictor: AnyPredictor, quality: QualityMonitor) -> None:
        self.predictor = predictor
        self.quality = quality

    def ended(self, entry: Entry, event: Event, waited_s: float | None) -> None:
        """See Observer.ended."""
        output_tokens = entry.output_tokens
        if event is not _FINISH or not output_tokens or not entry.sequences:
            self.quality.dropped(entry.id)
            return
        if entry.sequences > 1:
            output_tokens = max(1, output_tokens // entry.sequences)
        try:
            self.predictor.observe(entry.request, output_tokens)
        finally:
            self.quality.finished(entry.id, output_tokens)
