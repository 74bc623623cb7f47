"""A stream for which only the proxy asked for usage, as the client would have got it without. Pure.

What asking changes, by the engines' sources (vLLM ``chat_completion/serving.py`` and
``completion/serving.py``, SGLang ``serving_chat.py`` and ``serving_completions.py``):

* An event without choices and with usage comes last. It is taken out, and with it what only it carries
  (``metrics``).
* vLLM writes ``system_fingerprint`` into that event alone. Without usage it is in each event that says why a
  sequence ended; so the one before is held until the next event has come, and gets it back.
* A vLLM that is told to report usage to everybody (``--enable-force-include-usage``) reports it in every
  event, which nobody asked for here. Then the client would have got the last one too. Where a server reports
  to everybody in the last event only, as older ones and SGLang can be told to, that cannot be seen.
"""

from __future__ import annotations

import re

from brproxy.engines.dialect import EventFacts

_FINGERPRINT = re.compile(rb'"system_fingerprint":\s*"(?:[^"\\]|\\.)*+"')
_FINGERPRINT_KEY = b'"system_fingerprint"'


class UsageRemover:
    """Takes the events of one stream, and returns what the client gets of them.

    ``takes_fingerprint``: see Dialect.USAGE_TAKES_FINGERPRINT. At most one event is held. An event without
    news for this passes as it came: plain ones may go by, as long as nothing is ``held``.
    """

    __slots__ = ("_is_for_all", "_takes_fingerprint", "held")

    def __init__(self, *, takes_fingerprint: bool) -> None:
        self._takes_fingerprint = takes_fingerprint
        self.held = b""
        self._is_for_all = False

    def pass_on(self, event: bytes, facts: EventFacts) -> bytes:
        """Return what goes to the client now that ``event`` has come, with its blank line."""
        held, self.held = self.held, b""
        if facts.usage_only and not self._is_for_all:
            # Blank lines before an event are the worker's own.
            return _with_fingerprint(held, event) + event[: -len(event.lstrip(b"\r\n"))]
        if facts.usage is not None and not facts.finishes:
            self._is_for_all = True
        if facts.finishes and self._takes_fingerprint and _FINGERPRINT_KEY not in event:
            self.held = event
            return held
        return held + event

    def rest(self) -> bytes:
        """Return what is still held, when no more comes."""
        held, self.held = self.held, b""
        return held


def _with_fingerprint(event: bytes, usage_event: bytes) -> bytes:
    """Return ``event`` with the fingerprint that ``usage_event`` has, where vLLM would have written it."""
    found = _FINGERPRINT.search(usage_event)
    end = event.rfind(b"}")
    if found is None or end < 0:
        return event
    return event[:end] + b"," + found[0] + event[end:]
