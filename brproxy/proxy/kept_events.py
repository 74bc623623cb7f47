"""The events of a stream that may go on at another worker: each is read, and what it says kept. Pure."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from brproxy.engines.continuing import Completion
from brproxy.engines.dialect import EventFacts
from brproxy.engines.unasked import UsageRemover
from brproxy.proxy.accounting import NO_DATA, Account
from brproxy.proxy.events import HELD_BYTES_MAX, EventReader
from brproxy.proxy.sse import Unread, event_data
from brproxy.roster import Member


def _never(_data: bytes) -> bool:
    return False


class Aborts:
    """When a client last asked engines to end what runs (the clock's seconds)."""

    __slots__ = ("asked_s",)

    def __init__(self) -> None:
        self.asked_s = -inf


class Keeper:
    """What is kept of a request that several workers may answer, one after the other.

    ``completion`` is what it has had so far; None: that cannot be gone on from. ``asks_again`` tells whether
    a worker gives it up, ``was_aborted`` whether a client has asked for an end of what runs. It may go on
    ``failovers_left`` times after a worker that has died, and ``recomputed_left`` times after one that gave
    it up. Of the part that runs: ``is_given_up``, ``is_cut`` tell how it ended, ``member`` at which worker.
    """

    def __init__(
        self,
        read: Callable[[], Completion | None],
        asks_again: Callable[[bytes], bool] | None,
        was_aborted: Callable[[], bool],
        *,
        failovers_max: int,
        recomputed_max: int,
    ) -> None:
        self._read = read
        self.completion = read()
        self.is_watched = asks_again is not None
        self.asks_again = asks_again or _never
        self.was_aborted = was_aborted
        self.failovers_left = failovers_max
        self.recomputed_left = recomputed_max
        self.is_given_up = self.is_cut = False
        # Whether the client has had some of any part.
        self.has_passed = False
        self.member: Member | None = None

    @property
    def can_go_on(self) -> bool:
        """Whether what the client has had can be gone on from, exactly."""
        return self.completion is not None and self.completion.can_go_on

    @property
    def may_fail_over(self) -> bool:
        """Whether another worker may go on, should this one die now."""
        return self.failovers_left > 0 and self.can_go_on and not self.is_given_up

    def go_on(self) -> None:
        """Begin the next part."""
        self.recomputed_left -= self.is_given_up
        self.failovers_left -= self.is_cut
        self.is_given_up = self.is_cut = False
        if self.completion is not None and self.can_go_on:
            self.completion.go_on()

    def start_over(self) -> None:
        """Forget what was generated, of which the client has had nothing."""
        self.completion = self._read()


class KeptEvents(EventReader):
    """Reads a stream for ``account`` and ``keeper``.

    Where a worker gives the request up, or its engine dies, nothing behind that goes to the client.
    """

    __slots__ = ("_keeper",)

    def __init__(self, account: Account, event_bytes_max: int, keeper: Keeper) -> None:
        super().__init__(account, event_bytes_max)
        self._keeper = keeper
        if keeper.completion is not None and not keeper.completion.wants_usage:
            self._remover = UsageRemover(takes_fingerprint=account.dialect.USAGE_TAKES_FINGERPRINT)

    @property
    def is_between(self) -> bool:
        """Never: what looks ordinary is looked into all the same."""
        return False

    def read(self, payload: bytes, events: list[bytes] | None = None) -> EventFacts | None:
        """See EventReader.read."""
        keeper = self._keeper
        if events is None:
            events = self._splitter.feed(payload)
        for position, event in enumerate(events):
            facts = self._account.look(event)
            if keeper.is_given_up:
                self._take(event)
                continue
            if (facts.refused or facts.died) and not self.is_taken:
                self._rest = events[position:]
                return facts
            if keeper.may_fail_over and self._is_death(event, facts):
                keeper.is_cut = True
                return None
            passed = self._passed(event, facts)
            self._held += passed
            is_news = passed or not self._is_given_up()
            if (is_news and facts is not NO_DATA) or len(self._held) > HELD_BYTES_MAX:
                self.is_taken = True
        return None

    def _is_given_up(self) -> bool:
        # By a call: a type checker does not know who else sets it.
        return self._keeper.is_given_up

    def _is_death(self, event: bytes, facts: EventFacts) -> bool:
        """Tell whether an event says that the engine is dead, or that it ends the stream as it stops."""
        if facts.aborts:
            return not self._keeper.was_aborted()
        # Accounts may take other errors for one as well.
        return facts.died and self._account.dialect.read_event(event_data(event) or b"").died

    def _passed(self, event: bytes, facts: EventFacts) -> bytes:
        """Return what the client gets of an event."""
        event, remover = self._take(event), self._remover
        if remover is None or not event:
            return event
        if self._keeper.completion is not None and not facts.usage_only:
            # What it had of usage is out of it already.
            facts = facts._replace(usage=None)
        return remover.pass_on(event, facts)

    def _take(self, event: bytes) -> bytes:
        """Keep what an event says; return it as the client gets it, b"" for nothing."""
        keeper, data = self._keeper, event_data(event)
        completion = keeper.completion
        if data is None:
            if isinstance(event, Unread) and completion is not None:
                completion.lose()
            return event
        is_given_up = not keeper.is_given_up and keeper.asks_again(data)
        keeper.is_given_up = keeper.is_given_up or is_given_up
        if completion is None:
            return b"" if is_given_up else event
        taken = completion.take(data, given_up=is_given_up)
        if taken is None or taken is data:
            return b"" if taken is None else event
        return b"".join(b"data: %b\n" % line for line in taken.split(b"\n")) + b"\n"
