"""Checking what came through a proxy, byte by byte and cheaply. Pure: bytes and times in, verdicts out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from dataclasses import dataclass, field

import orjson

from loadgen.client import EVENT_BYTES_MAX, Failure, status_failure
from loadgen.dataplane.message import Message, MessageError
from loadgen.dataplane.tokens import NUMBER_DIGITS, STAMP_DIGITS, TOKEN, chunk, number, stamped_s
from loadgen.emulator.wire import DONE

DETAIL_BYTES_MAX = 200


class WrongAnswerError(Exception):
    """An answer is not what the worker sent."""

    def __init__(self, failure: Failure, detail: str) -> None:
        super().__init__(detail)
        self.failure = failure
        self.detail = detail


def _seconds() -> array[float]:
    return array("d")


@dataclass(slots=True)
class Tally:
    """What all answers of a load have shown so far, in seconds and in order of arrival.

    ``delays_s``: from a token's writing in the worker to its arrival; its length is the number of tokens.
    ``gaps_s``: between two tokens of a stream. ``first_s``: from a request to its first token.
    ``whole_s``: from a request to the end of its answer.
    """

    delays_s: array[float] = field(default_factory=_seconds)
    gaps_s: array[float] = field(default_factory=_seconds)
    first_s: array[float] = field(default_factory=_seconds)
    whole_s: array[float] = field(default_factory=_seconds)


class AnswerCheck(ABC):
    """Checks one answer; ``message`` is its framing."""

    def __init__(self, tokens: int, tally: Tally, started_s: float) -> None:
        self.message = Message(until_close=True)
        self._tokens = tokens
        self._tally = tally
        self._started_s = started_s

    def feed(self, data: bytes, now_s: float) -> bool:
        """Take what has arrived; return whether the answer is over. Raises WrongAnswerError."""
        try:
            self._body(self.message.feed(data), now_s)
        except MessageError as error:
            raise WrongAnswerError(Failure.INCOMPLETE, str(error)) from None
        if self.message.complete:
            self._finish(now_s)
        return self.message.complete

    def closed(self, now_s: float) -> None:
        """Take the end of the connection. Raises WrongAnswerError unless the answer may end with it."""
        try:
            self.message.end()
        except MessageError as error:
            raise WrongAnswerError(Failure.INCOMPLETE, str(error)) from None
        self._finish(now_s)

    @abstractmethod
    def _body(self, payload: bytes, now_s: float) -> None:
        """Check a part of the body."""

    def _finish(self, now_s: float) -> None:
        """Check that nothing is missing."""
        self._tally.whole_s.append(now_s - self._started_s)

    def _refuse_errors(self, body: bytes) -> None:
        """Raise WrongAnswerError unless the status is 200."""
        if self.message.head is None:
            return
        _, _, status = self.message.head.start_line.partition(b" ")
        if not status.startswith(b"200"):
            code = int(status[:3]) if status[:3].isdigit() else 500
            detail = body[:DETAIL_BYTES_MAX].decode(errors="replace")
            raise WrongAnswerError(status_failure(code), f"status {code}: {detail}")


class PlainCheck(AnswerCheck):
    """An answer that does not stream: a JSON document whose usage says ``tokens``."""

    def __init__(self, tokens: int, tally: Tally, started_s: float) -> None:
        super().__init__(tokens, tally, started_s)
        self._content = b""

    def _body(self, payload: bytes, now_s: float) -> None:
        self._content += payload
        self._refuse_errors(self._content)
        if len(self._content) > EVENT_BYTES_MAX:
            raise WrongAnswerError(Failure.INCOMPLETE, f"a document of more than {EVENT_BYTES_MAX} bytes")

    def _finish(self, now_s: float) -> None:
        try:
            tokens = orjson.loads(self._content)["usage"]["completion_tokens"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            tokens = None
        if tokens != self._tokens:
            raise WrongAnswerError(Failure.INCOMPLETE, f"not the answer: {self._content[:80]!r}")
        super()._finish(now_s)


class StreamCheck(AnswerCheck):
    """A streamed answer: tokens 0 to ``tokens`` - 1 in order, [DONE], and a clean end of the body."""

    def __init__(self, tokens: int, tally: Tally, started_s: float) -> None:
        super().__init__(tokens, tally, started_s)
        self._next = 0
        self._last_s = started_s
        self._done = False
        self._event_rest = b""
        # What comes before and after a token in a chunk of its own, as the worker sends it.
        self._before = self._after = b""
        self._may_skim = False

    def feed(self, data: bytes, now_s: float) -> bool:
        """Take what has arrived; return whether the answer is over. Raises WrongAnswerError."""
        if self._may_skim:
            at = self._skim(data, now_s)
            if at == len(data):
                return False
            data = data[at:]
        over = super().feed(data, now_s)
        self._may_skim = bool(self._before) and not self._event_rest and self.message.at_boundary
        return over

    def _skim(self, data: bytes, now_s: float) -> int:
        """Take the tokens at the beginning of ``data`` that look as expected; return where they end.

        They differ in number and time only. Whatever else differs, by a byte, is left to the parser: it costs
        three times as much.
        """
        before, after = self._before, self._after
        stamp_at = len(before) + NUMBER_DIGITS + 1
        stamp_end = stamp_at + STAMP_DIGITS
        at = 0
        while at < len(data):
            expected = data.startswith(before + number(self._next), at)
            stamp = data[at + stamp_at : at + stamp_end]
            if not (expected and stamp.isdigit() and data.startswith(after, at + stamp_end)):
                break
            self._token(stamp, now_s)
            at += stamp_end + len(after)
        return at

    def _token(self, stamp: bytes, now_s: float) -> None:
        tally = self._tally
        tally.delays_s.append(now_s - stamped_s(stamp))
        if self._next:
            tally.gaps_s.append(now_s - self._last_s)
        else:
            tally.first_s.append(now_s - self._started_s)
        self._last_s = now_s
        self._next += 1

    def _body(self, payload: bytes, now_s: float) -> None:
        self._refuse_errors(payload)
        *events, self._event_rest = (self._event_rest + payload).split(b"\n\n")
        if len(self._event_rest) > EVENT_BYTES_MAX:
            raise WrongAnswerError(Failure.INCOMPLETE, f"an event of more than {EVENT_BYTES_MAX} bytes")
        for event in events:
            self._event(event, now_s)

    def _event(self, event: bytes, now_s: float) -> None:
        if event.startswith(b":"):
            return
        if self._done or not event.startswith(b"data: "):
            raise WrongAnswerError(Failure.OUT_OF_ORDER, f"no event is due, got {event[:80]!r}")
        if event == DONE.rstrip():
            self._done = True
        elif match := TOKEN.search(event):
            if int(match[1]) != self._next:
                raise WrongAnswerError(
                    Failure.OUT_OF_ORDER, f"token {int(match[1])} where {self._next} was due"
                )
            self._token(match[2], now_s)
            if not self._before:
                alone = chunk(event + b"\n\n")
                self._before, _, self._after = alone.partition(match[1] + b" " + match[2])
        elif event.startswith(b'data: {"error"'):
            raise WrongAnswerError(Failure.ERROR_EVENT, event[:DETAIL_BYTES_MAX].decode(errors="replace"))

    def _finish(self, now_s: float) -> None:
        if self._next != self._tokens or not self._done or self._event_rest:
            done = "with" if self._done else "without"
            raise WrongAnswerError(
                Failure.INCOMPLETE, f"{self._next} of {self._tokens} tokens, {done} [DONE]"
            )
        super()._finish(now_s)
