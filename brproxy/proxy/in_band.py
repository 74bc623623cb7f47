"""Load in band: vLLM is asked for it with requests, and tells it with responses; no client sees that."""

from __future__ import annotations

from brproxy.clock import Clock
from brproxy.engines.load_field import FORMAT_FIELD, LOAD_FIELD, read_load_field
from brproxy.relay.fields import lines_named
from brproxy.relay.response import ResponseHead
from brproxy.roster import Member
from brproxy.signals import GroupSignals

_ASKS = FORMAT_FIELD + b": JSON\r\n"
_ASKED = lines_named([FORMAT_FIELD])
_TOLD = lines_named([LOAD_FIELD])


class InBand:
    """Asks the workers of one group for their load with each request; ``signals`` take in what they say."""

    def __init__(self, signals: GroupSignals, clock: Clock) -> None:
        self._signals = signals
        self._clock = clock

    def asking(self, lines: bytes) -> bytes:
        """Return the header lines of a request that asks; where they do already, they stay as they are."""
        return lines if _ASKED.search(lines) else lines + _ASKS

    def taker(self, lines: bytes) -> LoadTaker:
        """Return what takes the answer to the request whose client sent ``lines``."""
        return LoadTaker(self, is_passed=_ASKED.search(lines) is not None)

    def told(self, member: Member, value: bytes) -> None:
        """Take in the field's ``value`` in a response of ``member``."""
        self._signals.told_in_band(member, read_load_field(value), self._clock.now_s())


class LoadTaker:
    """Takes what one response says of its worker's load; it ``is_passed`` on to a client that asked."""

    __slots__ = ("_in_band", "_is_passed")

    def __init__(self, in_band: InBand, *, is_passed: bool) -> None:
        self._in_band = in_band
        self._is_passed = is_passed

    def take(self, head: ResponseHead, member: Member) -> ResponseHead:
        """Return the head as it goes on."""
        line = _TOLD.search(head.lines)
        if line is None:
            return head
        self._in_band.told(member, line[0].partition(b":")[2].strip())
        return head if self._is_passed else head._replace(lines=_TOLD.sub(b"", head.lines))
