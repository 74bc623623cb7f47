"""State machines as tables. Pure.

A request, a worker connection, a member of a group: each is a few states and the events that lead from one to
another. The table is the whole rule, and whatever it does not list is a bug in the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Generic, TypeVar

from brproxy.types import BrproxyError

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)


class TransitionTable(Generic[S, E]):
    """Where each event leads from each state of ``what`` ("a request"): ``after(state, event)``.

    It raises ``error`` where ``rows`` do not list the event.
    """

    def __init__(self, what: str, rows: Mapping[S, Mapping[E, S]], error: type[BrproxyError]) -> None:
        def after(state: S, event: E) -> S:
            try:
                return rows[state][event]
            except KeyError:
                msg = f"{what} in state {state.name} cannot {event.name}"
                raise error(msg) from None

        # No method: this is called some times for each request, and needs nothing of the table but the rows.
        self.after: Callable[[S, E], S] = after
