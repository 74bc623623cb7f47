"""The events of a mock worker's streams: each says which one it is and when it was sent. Pure.

The bytes are vLLM's (``loadgen.emulator.wire``); a token's text is " w00000012 0000001234567890": its number
in the stream, counted from 0, and the microsecond of the machine's monotonic clock at which it was written.
All events of a stream but the last differ in these two numbers only, so that neither end has to build or to
parse JSON for each.
"""

from __future__ import annotations

import re

from loadgen.emulator.wire import Answer, GenerationRequest

NUMBER_DIGITS = 8
STAMP_DIGITS = 16
TOKEN = re.compile(rb'"content":" w(\d{8}) (\d{16})"')
"""A token's number and its time in an event."""

LAST_CHUNK = b"0\r\n\r\n"
_TEXT_BYTES = len(" w") + NUMBER_DIGITS + len(" ") + STAMP_DIGITS


def chunk(payload: bytes) -> bytes:
    """Return a chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def number(index: int) -> bytes:
    """Return how a token's number is written, with the space after it."""
    return b"%08d " % index


def stamp(now_s: float) -> bytes:
    """Return how the time is written at which a token is sent."""
    return b"%016d" % int(now_s * 1e6)


def stamped_s(digits: bytes) -> float:
    """Return the time that ``stamp`` wrote."""
    return int(digits) / 1e6


class TokenStream:
    """Builds the body of one streamed answer.

    The chunk of token i is ``head + number(i) + stamp + TAIL``, of the last one ``last`` builds it.
    """

    __slots__ = ("_answer", "_last", "_tokens", "head")

    TAIL = b'"},"logprobs":null,"finish_reason":null}]}\n\n\r\n'
    """The same in all streams: it is put together with the time once for many of them."""

    def __init__(self, request: GenerationRequest, request_id: str, created_s: int) -> None:
        self._answer = Answer(request, request_id, created_s)
        self._tokens = request.output_tokens
        self.head, tail = self._around(last=False)
        if tail != self.TAIL:
            raise AssertionError("the emulator's wire format has changed: so must TAIL")
        self._last = self._around(last=True)

    def _around(self, *, last: bool) -> tuple[bytes, bytes]:
        """Return what comes before a token's number and after its time, chunk framing included."""
        head, tail = self._answer.template(last=last)
        size = len(head) + _TEXT_BYTES + len(tail)
        return b"%x\r\n%b w" % (size, head), tail + b"\r\n"

    def opening(self) -> bytes:
        """Return the chunk that names the role."""
        return chunk(self._answer.opening())

    def last(self, time: bytes) -> bytes:
        """Return the last token's chunk and all that comes after it: usage, [DONE], the end of the body."""
        head, tail = self._last
        events = self._answer.closing(self._tokens).split(b"\n\n")[:-1]
        closing = b"".join(chunk(event + b"\n\n") for event in events)
        return head + number(self._tokens - 1) + time + tail + closing + LAST_CHUNK
