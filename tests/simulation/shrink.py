"""A script that breaks a promise, made as short and as plain as it can be while it still does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import TypeVar

from tests.simulation.actions import Action, Answer, Ask, Scenario, Trouble, Visit

T = TypeVar("T", Answer, Ask, Visit)
Breaks = Callable[[Scenario], bool]


def shrink(scenario: Scenario, breaks: Breaks, tries_max: int = 600) -> Scenario:
    """Return a scenario that ``breaks`` as ``scenario`` does; at most ``tries_max`` others are tried."""
    return _Shrinker(breaks, tries_max).run(scenario)


class _Shrinker:
    def __init__(self, breaks: Breaks, tries_max: int) -> None:
        self._breaks = breaks
        self._left = tries_max

    def run(self, scenario: Scenario) -> Scenario:
        scenario = self._without(scenario)
        changed = True
        while changed and self._left:
            changed = False
            for position in range(len(scenario.actions)):
                simpler = self._simpler(scenario, position)
                changed |= simpler is not scenario
                scenario = simpler
        return scenario

    def _holds(self, scenario: Scenario) -> bool:
        if not self._left:
            return False
        self._left -= 1
        return self._breaks(scenario)

    def _without(self, scenario: Scenario) -> Scenario:
        """Leave out as many actions as possible: halves, quarters, and at last one by one."""
        size = max(1, len(scenario.actions) // 2)
        while True:
            start = 0
            while start < len(scenario.actions):
                actions = scenario.actions
                fewer = replace(scenario, actions=actions[:start] + actions[start + size :])
                if self._holds(fewer):
                    scenario = fewer
                else:
                    start += size
            if size == 1 or not self._left:
                return scenario
            size //= 2

    def _simpler(self, scenario: Scenario, position: int) -> Scenario:
        """Make one action plainer, step by step."""
        tried_all = False
        while not tried_all and self._left:
            tried_all = True
            for action in _plainer(scenario.actions[position]):
                actions = (*scenario.actions[:position], action, *scenario.actions[position + 1 :])
                if self._holds(changed := replace(scenario, actions=actions)):
                    scenario, tried_all = changed, False
                    break
        return scenario


def _plainer(action: Action) -> Iterator[Action]:
    """Yield actions that differ from ``action`` in one respect, in which they are more ordinary."""
    if isinstance(action, Trouble):
        return
    for position in range(len(action.asks)):
        rest = action.asks[:position] + action.asks[position + 1 :]
        if rest:
            yield replace(action, asks=rest)
    yield from _with_defaults(action)
    for position, ask in enumerate(action.asks):
        for plainer in _plainer_asks(ask):
            yield replace(action, asks=(*action.asks[:position], plainer, *action.asks[position + 1 :]))


def _plainer_asks(ask: Ask) -> Iterator[Ask]:
    if len(ask.answers) > 1:
        yield replace(ask, answers=ask.answers[:1])
        yield replace(ask, answers=ask.answers[1:])
    yield from _with_defaults(ask)
    for position, answer in enumerate(ask.answers):
        for plainer in _with_defaults(answer):
            yield replace(ask, answers=(*ask.answers[:position], plainer, *ask.answers[position + 1 :]))


def _with_defaults(value: T) -> Iterator[T]:
    """Yield ``value`` with each of its fields in turn as it usually is."""
    for one in fields(value):
        if (
            one.name not in {"id", "at_s", "asks", "answers", "model"}
            and getattr(value, one.name) != one.default
        ):
            yield replace(value, **{one.name: one.default})
