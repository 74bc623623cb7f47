"""The answer of a worker that decodes, with what the one that prefills has told of the prompt.

Nothing of it goes to the client before that has come, which is as good as at once: who prefills answers when
the KV has been fetched. Until then the request may still go to two others.
"""

from __future__ import annotations

from http import HTTPStatus

from brproxy.engines.dialect import EventFacts
from brproxy.engines.input_logprobs import InputLogprobs
from brproxy.journey import Event
from brproxy.proxy.accounting import Account
from brproxy.proxy.errors import worker_silent
from brproxy.proxy.events import EventReader
from brproxy.proxy.exchange.deciding import Kind
from brproxy.proxy.exchange.handles import PairedAnswer
from brproxy.proxy.exchange.reply import Reply
from brproxy.proxy.exchange.stream import Stream
from brproxy.proxy.sse import event_data
from brproxy.relay.framing import Framing, choose_framing
from brproxy.relay.response import ResponseHead


class MergedAnswer(PairedAnswer):
    """See the module. ``of_prompt`` is None until ``prefilled``."""

    __slots__ = ("_held", "of_prompt")

    of_prompt: InputLogprobs | None
    _held: MergedReply | MergedStream | None

    def expect(self) -> None:
        """Begin without what is told of the prompt."""
        self.of_prompt = self._held = None

    def prefilled(self, answer: bytes) -> None:
        """Take what the worker that prefills answers."""
        if self.of_prompt is None:
            self.of_prompt = InputLogprobs(answer)
            held, self._held = self._held, None
            if held is not None:
                held.go_on(self.of_prompt)

    def timed_out(self) -> None:
        """See Watched.timed_out."""
        if self._is_over and self._held is not None:
            self._held = None
            self._attempt.settle(Event.SILENT, worker_silent(self.limit_s))
        else:
            super().timed_out()

    def close(self) -> None:
        """See WorkerAnswer.close."""
        self._held = None
        super().close()

    def hold(self, held: MergedReply | MergedStream) -> None:
        """Keep what has come until it can go on."""
        self._held = held
        if not self._is_over:
            self._connection.pause()

    def resume(self) -> None:
        """Have more come."""
        if not self._is_over:
            self._connection.resume()

    def too_long(self) -> None:
        """Give up on a reply that is longer than any that is looked into."""
        self._abandon()
        self.moves_on(Event.CUT, f"its answer has over {self.limits.response_parse_bytes_max} bytes")

    def _kind_of(self, head: ResponseHead) -> Kind:
        kind = super()._kind_of(head)
        if isinstance(kind, Stream):
            return MergedStream(self, head)
        is_json = head.media_type == b"application/json" and head.status < HTTPStatus.MULTIPLE_CHOICES
        return (
            MergedReply(self, head) if isinstance(kind, Reply) and is_json and not head.is_encoded else kind
        )


class MergedReply:
    """A reply that is collected, within a limit, and goes on as a whole."""

    __slots__ = ("_answer", "_bytes", "_head", "_pieces", "_trailers")

    def __init__(self, answer: MergedAnswer, head: ResponseHead) -> None:
        self._answer = answer
        self._head = head
        self._pieces: list[bytes] = []
        self._bytes = 0
        self._trailers = b""

    def receive(self, payload: bytes) -> None:
        """See Kind.receive."""
        answer = self._answer
        answer.progressed = True
        self._pieces.append(payload)
        self._bytes += len(payload)
        if self._bytes > answer.limits.response_parse_bytes_max:
            answer.too_long()

    def end(self, piece: bytes, trailers: bytes) -> None:
        """See Kind.end."""
        self._pieces.append(piece)
        self._trailers = trailers
        answer = self._answer
        if answer.of_prompt is None:
            answer.hold(self)
        else:
            self.go_on(answer.of_prompt)

    def go_on(self, of_prompt: InputLogprobs) -> None:
        """Pass all of it on."""
        answer, body = self._answer, of_prompt.into_reply(b"".join(self._pieces))
        answer.account.reply(body)
        head = self._head._replace(length=b"%d" % len(body), chunked=False)
        answer.become_reply(head).end(body, self._trailers)


class MergedStream(Stream):
    """A stream of which each event is looked into."""

    __slots__ = ("_ending", "_merged", "_waiting")

    def __init__(self, answer: MergedAnswer, head: ResponseHead) -> None:
        super().__init__(answer, head)
        self._merged = answer
        self._events = MergedEvents(answer.account, answer.limits.event_bytes_max, answer)
        self._waiting: list[bytes] = []
        self._ending: tuple[bytes, bytes] | None = None

    def receive(self, payload: bytes) -> None:
        """See Kind.receive."""
        if self._merged.of_prompt is not None:
            super().receive(payload)
            return
        self._merged.progressed = True
        self._waiting.append(payload)
        self._merged.hold(self)

    def end(self, piece: bytes, trailers: bytes) -> None:
        """See Kind.end."""
        if self._merged.of_prompt is None:
            self._ending = piece, trailers
            self._merged.hold(self)
        else:
            super().end(piece, trailers)

    def go_on(self, _of_prompt: InputLogprobs) -> None:
        """Have what has come so far pass, and what comes."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            super().receive(b"".join(waiting))
        if self._ending is None:
            self._merged.resume()
        elif not self._is_turned_down:
            super().end(*self._ending)

    def _framing(self) -> Framing:
        # What is put in is in no length.
        return choose_framing(self._head, http10=self._sink.client.is_http10, bodiless=False, rewritten=True)


class MergedEvents(EventReader):
    """Reads a stream, each event with what its answer knows of the prompt."""

    __slots__ = ("_answer",)

    def __init__(self, account: Account, event_bytes_max: int, answer: MergedAnswer) -> None:
        super().__init__(account, event_bytes_max)
        self._answer = answer

    @property
    def is_between(self) -> bool:
        """Never: what looks ordinary is looked into all the same."""
        return False

    def read(self, payload: bytes, events: list[bytes] | None = None) -> EventFacts | None:
        """See EventReader.read."""
        if events is None:
            events = [self._with_prompt(event) for event in self._splitter.feed(payload)]
        elif payload:
            # What is left at the end; others that are given have been through here.
            events = [self._with_prompt(event) for event in events]
        return super().read(payload, events)

    def _with_prompt(self, event: bytes) -> bytes:
        data, of_prompt = event_data(event), self._answer.of_prompt
        merged = data if data is None or of_prompt is None else of_prompt.into_event(data)
        return event if merged is data or merged is None else b"data: %b\n\n" % merged
