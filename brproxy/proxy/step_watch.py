"""Has each group's model of the step look at it when a step has just ended.

The end of a request's stream is the end of a step, to the time that the network takes: no timer of the proxy
could know that. The tokens of the other requests come at about the same time, so they are waited for a little
before the ledger is read. Where no request ends nothing is looked at, and the window is a longer one.
"""

from __future__ import annotations

import asyncio

from brproxy.clock import Clock
from brproxy.happenings import Observer
from brproxy.lifecycle import Entry, Event
from brproxy.proxy.service import GroupService
from brproxy.step_model import StepModel

_WAIT_STEPS = 0.25
"""Share of a step that its tokens are waited for."""

_WAIT_S, _WAIT_S_MAX = 0.003, 0.05
"""The wait before a step's length is known, and the longest one (seconds)."""

# As a plain name: looking a member of an enumeration up costs more than comparing it.
_FINISH = Event.FINISH


class _GroupSteps(Observer):
    """Looks at the steps of one group by ``model``."""

    def __init__(self, service: GroupService, model: StepModel, clock: Clock) -> None:
        self._service = service
        self._model = model
        self._clock = clock
        self._is_wanted = False
        self._timer: asyncio.TimerHandle | None = None

    def want(self) -> None:
        """Have the next step that is seen to end be looked at, if it is time."""
        self._is_wanted = self._timer is None and self._model.is_due(self._clock.now_s())

    def ended(self, entry: Entry, event: Event, waited_s: float | None) -> None:
        """See Observer.ended."""
        if self._is_wanted and event is _FINISH and entry.first_token_s is not None:
            self._is_wanted = False
            step_s = self._model.step_s
            wait_s = _WAIT_S if step_s is None else min(_WAIT_STEPS * step_s, _WAIT_S_MAX)
            now_s = self._clock.now_s()
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._look, now_s)

    def close(self) -> None:
        """Look no more."""
        self._is_wanted = False
        if self._timer is not None:
            self._timer.cancel()

    def _look(self, at_s: float) -> None:
        self._timer = None
        self._service.driver.catch_up()
        try:
            self._model.look(at_s, self._clock.now_s())
        except Exception as error:  # noqa: BLE001 - who looks on takes nothing with it
            self._service.group.dispatcher.faults.note("observer", error)


class StepWatch:
    """Follows the groups, looks at those with a model of their steps: ``look`` is called now and then."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._groups: dict[GroupService, _GroupSteps] = {}

    def group_came(self, service: GroupService) -> None:
        """See groups.Follower."""
        model = service.group.steps
        if model is not None:
            steps = self._groups[service] = _GroupSteps(service, model, self._clock)
            service.group.dispatcher.happenings.tell(steps)

    def group_gone(self, service: GroupService) -> None:
        """See groups.Follower."""
        steps = self._groups.pop(service, None)
        if steps is not None:
            steps.close()

    def look(self, _now_s: float) -> None:
        """Have those looked at for which it is time."""
        for steps in self._groups.values():
            steps.want()
