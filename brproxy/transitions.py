"""State machines as tables. Pure.

A request, a worker connection, a member of a group: each is a few states and the events that lead from one to
another. The table is the whole rule, and whatever it does not list is a bug in the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import NoReturn, TypeVar

from brproxy.types import BrproxyError

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)


class _Row(dict[E, S]):
    """Where each event leads from one state."""

    def __init__(self, what: str, state: S, steps: Mapping[E, S], error: type[BrproxyError]) -> None:
        super().__init__(steps)
        self._what = f"{what} in state {state.name}"
        self._error = error

    def __missing__(self, event: E) -> NoReturn:
        msg = f"{self._what} cannot {event.name}"
        raise self._error(msg)


class TransitionTable(dict[S, Mapping[E, S]]):
    """Where each event leads from each state of ``what`` ("a request"): ``table[state][event]``.

    It raises ``error`` where ``rows`` do not list the event. A dictionary and no method, as this is asked for
    some times for each request: a look-up makes no frame.
    """

    def __init__(self, what: str, rows: Mapping[S, Mapping[E, S]], error: type[BrproxyError]) -> None:
        super().__init__({state: _Row(what, state, steps, error) for state, steps in rows.items()})
