"""What a response means for the ledger: tokens booked as they stream, estimates corrected by usage."""

from __future__ import annotations

from brproxy.engines.dialect import PLAIN_TOKENS, Dialect, EventFacts, RequestFacts, Usage
from brproxy.engines.plain import PlainEvent
from brproxy.engines.sessions import answer_key
from brproxy.estimate import StreamCounter, TokenEstimator
from brproxy.proxy.driver import Lease
from brproxy.proxy.sse import event_data

NO_DATA = EventFacts()
"""Said of an event that has none, or that is too long to look into."""


class Account:
    """Reads one worker's response to one request and keeps its lease up to date; never changes a byte.

    ``usage_was_added``: the proxy asked for usage and the client did not. ``reports_error``: an event was an
    error. ``plain`` is what the ordinary event of this stream looks like, once one has been seen. What has
    come since the last booking is booked together, before anybody looks at the load.
    """

    __slots__ = (
        "_chunks_reported",
        "_counter",
        "_estimator",
        "_facts",
        "_has_begun",
        "_lease",
        "_output_tokens",
        "_outputs",
        "_plain_differs",
        "_unbooked_events",
        "_usage",
        "dialect",
        "done",
        "plain",
        "reports_error",
        "usage_was_added",
    )

    def __init__(
        self,
        lease: Lease,
        dialect: Dialect,
        facts: RequestFacts,
        estimator: TokenEstimator,
        *,
        usage_was_added: bool,
    ) -> None:
        self.dialect = dialect
        self._lease = lease
        self._facts = facts
        self._estimator = estimator
        self.usage_was_added = usage_was_added
        self._counter: StreamCounter
        self._usage: Usage | None = None
        self._outputs: dict[int, int] = {}
        self._output_tokens = 0
        self._chunks_reported = 0
        self._unbooked_events = 0
        self._has_begun = False
        self._plain_differs = False
        self.done = False
        self.reports_error = False
        self.plain: PlainEvent | None = None

    def expect_stream(self) -> None:
        """Get ready to ``look`` at events and to ``count`` them."""
        self._counter = StreamCounter(self._estimator.tokens_per_chunk(self._facts.model))

    def look(self, event: bytes) -> EventFacts:
        """Book what one event says and return it."""
        data = event_data(event)
        if data is None:
            return NO_DATA
        facts = self.dialect.read_event(data)
        if facts.has_tokens:
            if not self._has_begun:
                self._has_begun = True
                self._lease.first_token()
            self.count(1)
        if facts is PLAIN_TOKENS:
            # One that differs is mostly the last, which names the reason; a second one shows a change.
            if self.plain is None or self._plain_differs:
                self.plain = PlainEvent.learn(event) or self.plain
                self._plain_differs = False
            else:
                self._plain_differs = True
        elif facts.usage is not None:
            self._settle(self._of_all(facts.usage, facts.sequence))
        elif facts.done:
            self.done = True
        elif facts.error:
            self.reports_error = True
        elif facts.answer_id and self._facts.session.is_named_by_answer:
            self._lease.remember_as(answer_key(self._facts.model, facts.answer_id))
        return facts

    def count(self, events: int) -> None:
        """Note ``events`` more with tokens."""
        if not self._unbooked_events:
            self._lease.book_later(self._book)
        self._unbooked_events += events

    def reply(self, body: bytes) -> None:
        """Book what a complete JSON reply reports; its request ends with it, so its prompt stays as it is."""
        self._usage = usage = self.dialect.read_reply(body)
        if usage is not None and usage.completion_tokens is not None:
            self._lease.tokens(usage.completion_tokens)
        if self._facts.session.is_named_by_answer:
            answer_id = self.dialect.read_answer_id(body)
            if answer_id:
                self._lease.remember_as(answer_key(self._facts.model, answer_id))

    def refused(self) -> None:
        """Note that the worker turned the request down, and that this is what the client gets."""
        self._lease.fail()

    def learn(self) -> None:
        """Learn of prompts and of chunks from what the complete response reported."""
        if self._usage is None:
            return
        facts, usage = self._facts, self._usage
        model = facts.model
        if usage.prompt_tokens is not None and facts.teaches:
            # What it was taken for when it came, so that nothing is worked out again for what was right.
            estimate = self._lease.entry.request.prompt_tokens
            self._estimator.learn_prompt(model, facts.user, facts.prompt_text, usage.prompt_tokens, estimate)
        if usage.completion_tokens is not None and self._chunks_reported:
            self._estimator.learn_chunks(model, self._chunks_reported, usage.completion_tokens)

    def _book(self) -> None:
        events, self._unbooked_events = self._unbooked_events, 0
        if events:
            self._lease.tokens(self._counter.count(events))

    def _of_all(self, usage: Usage, sequence: int | None) -> Usage:
        """Return what a report says of the whole response, where it is of one sequence of several."""
        if sequence is None or self._facts.sequences == 1 or usage.completion_tokens is None:
            return usage
        before = self._outputs.get(sequence, 0)
        self._outputs[sequence] = usage.completion_tokens
        self._output_tokens += usage.completion_tokens - before
        # Whether the others have the same prompt is not said.
        return Usage(None, self._output_tokens)

    def _settle(self, usage: Usage) -> None:
        before, self._usage = self._usage, usage
        if before is not None:
            # Some APIs report the prompt in their first event and the output in the last.
            self._usage = Usage(
                before.prompt_tokens if usage.prompt_tokens is None else usage.prompt_tokens,
                before.completion_tokens if usage.completion_tokens is None else usage.completion_tokens,
            )
        if usage.prompt_tokens is not None:
            self._lease.correct_prompt(usage.prompt_tokens)
        if usage.cached_tokens is not None:
            self._lease.correct_cached(usage.cached_tokens)
        if usage.completion_tokens is not None:
            # Booked together with what the report corrects.
            events, self._unbooked_events = self._unbooked_events, 0
            tokens = self._counter.count(events)
            # What streams after the last report is no part of it.
            self._chunks_reported = self._counter.chunks
            self._lease.tokens(tokens + self._counter.settle(usage.completion_tokens))
