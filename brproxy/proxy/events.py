"""The events of one stream on their way to the client: read for the account, held until all is clear. Pure.

An engine may refuse a request with status 200 and say so in the first event, so nothing goes out before
that; an event goes out when it is whole; and what only the proxy's question for usage has brought into the
stream does not go out.
"""

from __future__ import annotations

from brproxy.engines.dialect import PLAIN_TOKENS, EventFacts
from brproxy.engines.unasked import UsageRemover
from brproxy.proxy.accounting import NO_DATA, Account
from brproxy.proxy.sse import SseSplitter, event_data

HELD_BYTES_MAX = 1 << 20
"""What is held of a response while nobody knows what it is."""


class EventReader:
    """Reads a stream for ``account``; ``take`` hands out what the client gets of it.

    ``is_taken``: the worker has taken the request, or more has come than is held to see whether it has.
    """

    __slots__ = ("_account", "_held", "_remover", "_rest", "_splitter", "is_taken")

    def __init__(self, account: Account, event_bytes_max: int) -> None:
        account.expect_stream()
        self._account = account
        self._splitter = SseSplitter(event_bytes_max)
        self._remover = (
            UsageRemover(takes_fingerprint=account.dialect.USAGE_TAKES_FINGERPRINT)
            if account.usage_was_added
            else None
        )
        self._held = b""
        self._rest: list[bytes] = []
        self.is_taken = False

    @property
    def is_between(self) -> bool:
        """Whether the last event that has come is whole, and known to be worth passing on."""
        is_holding = self._remover is not None and self._remover.held
        return self.is_taken and not self._splitter.tail and not is_holding

    @property
    def has_held(self) -> bool:
        """Whether something whole is held back."""
        return bool(self._held)

    def read(self, payload: bytes, events: list[bytes] | None = None) -> EventFacts | None:
        """Take in bytes of the stream; ``events`` are what they are already known to be.

        Returns what the first event says if that turns the request down, and then waits: ``go_on`` has it and
        all that follows pass after all.
        """
        account, remover = self._account, self._remover
        if events is None:
            events = self._splitter.feed(payload)
        plain_events = 0
        for position, event in enumerate(events):
            if account.plain is not None and account.plain.matches(event):
                plain_events += 1
                if remover is None or not remover.held:
                    self._held += event
                else:
                    self._held += remover.pass_on(event, PLAIN_TOKENS)
                continue
            # Before a report of all tokens so far, which the next event may be.
            if plain_events:
                account.count(plain_events)
                plain_events = 0
            facts = account.look(event)
            if (facts.refused or facts.died) and not self.is_taken:
                self._rest = events[position:]
                return facts
            self._held += event if remover is None else remover.pass_on(event, facts)
            # Comments may come before the first data, which alone tells if it was taken.
            if facts is not NO_DATA or len(self._held) > HELD_BYTES_MAX:
                self.is_taken = True
        if plain_events:
            account.count(plain_events)
        return None

    def go_on(self) -> None:
        """Take the event that turned the request down for the answer."""
        self.is_taken = True
        events, self._rest = self._rest, []
        self.read(b"", events)

    def take(self) -> bytes:
        """Return what goes on to the client, b"" for nothing yet."""
        held, self._held = self._held, b""
        return held

    def ends_properly(self, path: str) -> bool:
        """Tell whether a stream of ``path`` that only the connection's end frames is whole now."""
        if self._account.done:
            return True
        # [DONE] alone shows it. What breaks off is not booked: an event that is not whole must not keep the
        # request from another worker.
        dialect = self._account.dialect
        last = event_data(self._splitter.tail) or b""
        return not dialect.ends_with_done(path) or dialect.read_event(last).done

    def end(self) -> EventFacts | None:
        """Take what is left for an event, for there is no more; returns what ``read`` does."""
        tail, self._splitter.tail = self._splitter.tail, b""
        facts = self.read(tail, [tail]) if tail else None
        if facts is None:
            self._held += self.rest()
        return facts

    def rest(self) -> bytes:
        """Return the event that is held, whole, for the report of usage that does not come, b"" for none."""
        return b"" if self._remover is None else self._remover.rest()
