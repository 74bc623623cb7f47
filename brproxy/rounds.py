"""When a group's decision rounds run, and what a round does to those that wait. Pure: time comes in.

A round that nobody remembers to run is the worst that can happen to a group: its requests wait for ever,
while everything else looks well. So it is decided here, in one place, whether one is due, and anybody may ask
whether requests wait for one in vain. Whatever a round raises, the next one comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from brproxy.dispatcher import Dispatcher
from brproxy.lifecycle import Entry, Event
from brproxy.types import RequestId

_LATE_TICKS = 10
_LATE_S_MIN = 1.0


class Rounds:
    """Runs the rounds of ``dispatcher``, one every ``tick_s`` seconds while requests wait.

    ``due_s`` is when the next one is due, None while none is needed. ``now_s`` tells the time when a round is
    over (seconds).
    """

    def __init__(self, dispatcher: Dispatcher, tick_s: float, now_s: Callable[[], float]) -> None:
        self._dispatcher = dispatcher
        self.tick_every(tick_s)
        self._now_s = now_s
        self.due_s: float | None = None

    def tick_every(self, tick_s: float) -> None:
        """Run rounds ``tick_s`` (seconds) apart from the next one on."""
        self._tick_s = tick_s
        # A loop that is busy runs its timers late: that is no reason to call the group stuck.
        self._late_s = max(_LATE_S_MIN, _LATE_TICKS * tick_s)

    @property
    def is_open(self) -> bool:
        """Whether one more may be decided at once: nobody waits for the next round but who has just come."""
        return self.due_s is None or self._dispatcher.waiting.count == 1

    def run(self, now_s: float) -> list[Entry]:
        """Run one round; return the requests that no longer wait: bound, impossible to decide, or late.

        Never raises; what does is noted as a fault, and what the round did until then is told.
        """
        dispatcher = self._dispatcher
        try:
            admitted = dispatcher.decide(now_s, dispatcher.roster.routable())
            if admitted:
                dispatcher.happenings.decided(self._now_s() - now_s, len(admitted))
        except Exception as error:  # noqa: BLE001 - a round that fails must not be the last
            dispatcher.faults.note("round", error)
        settled = dispatcher.admitted.copy()
        try:
            if dispatcher.undecidable:
                self._end(dispatcher.undecidable.copy(), Event.FAIL, now_s, settled)
            if dispatcher.waiting.count:
                self._end(dispatcher.expired(now_s), Event.EXPIRE, now_s, settled)
        except Exception as error:  # noqa: BLE001 - as above
            dispatcher.faults.note("round", error)
        return settled

    def next_after(self, now_s: float) -> float | None:
        """Return the seconds to the next round, which is due then; None while nobody waits."""
        if not self._dispatcher.waiting.count:
            self.due_s = None
            return None
        self.due_s = now_s + self._tick_s
        return self._tick_s

    def stopped(self) -> None:
        """Note that what was due will not be run."""
        self.due_s = None

    def is_stuck(self, now_s: float) -> bool:
        """Tell whether a request has waited for a while and no round is coming."""
        since_s = self._dispatcher.waiting.since_s
        if since_s is None:
            return False
        should_have_been_s = since_s if self.due_s is None else self.due_s
        return now_s - should_have_been_s > self._late_s

    def _end(
        self, request_ids: Iterable[RequestId], event: Event, now_s: float, settled: list[Entry]
    ) -> None:
        settled.extend(self._dispatcher.end(request_id, event, now_s) for request_id in request_ids)
