"""State machines as tables. Pure.

A request, a worker connection, a member of a group: each is a few states and the events that lead from one to
another. The table is the whole rule, and whatever it does not list is a bug in the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar

from brproxy.types import BrproxyError

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)


class TransitionTable(Generic[S, E]):
    """Where each event leads from each state of ``what`` ("a request"); else ``error`` is raised."""

    def __init__(self, what: str, rows: Mapping[S, Mapping[E, S]], error: type[BrproxyError]) -> None:
        self.rows = rows
        self._what = what
        self._error = error

    def after(self, state: S, event: E) -> S:
        """Return the state that ``event`` leads to; raises the table's error where ``state`` forbids it."""
        try:
            return self.rows[state][event]
        except KeyError:
            msg = f"{self._what} in state {state.name} cannot {event.name}"
            raise self._error(msg) from None
