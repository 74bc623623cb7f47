"""What happens to the requests of a group, told to whoever wants to know. Pure.

Metrics, the predictor's teacher, and later logs and shadows of decisions: none of them is called by name.
Nothing is told for each token or event; whoever needs those reads the ledger. An observer that raises is a
fault of its own: the others are told, and what happens goes on.
"""

from __future__ import annotations

from collections.abc import Callable

from brproxy.faults import Faults
from brproxy.lifecycle import Entry, Event
from brproxy.roster import Member


class Observer:
    """Looks on; a subclass says by overriding what it wants to be told. Nothing here may block."""

    def arrived(self, entry: Entry) -> None:
        """Look at a request that has begun to wait for the first time."""

    def bound(self, entry: Entry, waited_s: float) -> None:
        """Look at a request that was given a worker, ``waited_s`` seconds after it last began to wait."""

    def retried(self, entry: Entry, member: Member) -> None:
        """Look at a request that was taken back from ``member`` and waits again."""

    def ended(self, entry: Entry, event: Event, waited_s: float | None) -> None:
        """Look at a request that has ended; ``waited_s``: it had no worker, for so many seconds."""

    def decided(self, duration_s: float, admitted: int) -> None:
        """Look at a round that took ``duration_s`` seconds and admitted requests, at least one."""


class Happenings:
    """The observers of one group, told in the order in which they came.

    Each is told in a loop of its own: passing arguments through would cost as much as the call.
    """

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._arrived: list[Callable[[Entry], None]] = []
        self._bound: list[Callable[[Entry, float], None]] = []
        self._retried: list[Callable[[Entry, Member], None]] = []
        self._ended: list[Callable[[Entry, Event, float | None], None]] = []
        self._decided: list[Callable[[float, int], None]] = []

    def tell(self, observer: Observer) -> None:
        """Tell ``observer`` from now on what it overrides: what nobody wants to know costs nothing.

        Whom an observer adds while it is told of something is told of that, too.
        """
        kind = type(observer)
        if kind.arrived is not Observer.arrived:
            self._arrived.append(observer.arrived)
        if kind.bound is not Observer.bound:
            self._bound.append(observer.bound)
        if kind.retried is not Observer.retried:
            self._retried.append(observer.retried)
        if kind.ended is not Observer.ended:
            self._ended.append(observer.ended)
        if kind.decided is not Observer.decided:
            self._decided.append(observer.decided)

    def arrived(self, entry: Entry) -> None:
        """See Observer.arrived."""
        for observer in self._arrived:
            try:
                observer(entry)
            except Exception as error:  # noqa: BLE001 - who looks on takes nothing with it
                self._faults.note("observer", error)

    def bound(self, entry: Entry, waited_s: float) -> None:
        """See Observer.bound."""
        for observer in self._bound:
            try:
                observer(entry, waited_s)
            except Exception as error:  # noqa: BLE001 - as above
                self._faults.note("observer", error)

    def retried(self, entry: Entry, member: Member) -> None:
        """See Observer.retried."""
        for observer in self._retried:
            try:
                observer(entry, member)
            except Exception as error:  # noqa: BLE001 - as above
                self._faults.note("observer", error)

    def ended(self, entry: Entry, event: Event, waited_s: float | None) -> None:
        """See Observer.ended."""
        for observer in self._ended:
            try:
                observer(entry, event, waited_s)
            except Exception as error:  # noqa: BLE001 - as above
                self._faults.note("observer", error)

    def decided(self, duration_s: float, admitted: int) -> None:
        """See Observer.decided."""
        for observer in self._decided:
            try:
                observer(duration_s, admitted)
            except Exception as error:  # noqa: BLE001 - as above
                self._faults.note("observer", error)
