"""The shared vocabulary: names that more than one package needs, and nothing that does anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

RequestId = NewType("RequestId", int)
"""Number of a request in one process; never reused."""

WorkerIndex = NewType("WorkerIndex", int)
"""Position of a worker within its barrier group, ``0 <= index < G``."""

TOKENS_MAX = 1 << 32
"""Most tokens that one number may stand for, whoever states it: far above any context, and a million requests
of that size add up without leaving 64 bits. A larger number from outside counts as this."""

SEQUENCES_MAX = 1024
"""Most sequences that one request counts as, whatever its ``n`` says (sequences)."""


TextCounts = tuple[int, int, int, int, int, int, int, int]
"""What a prompt's text is made of: bytes of ASCII letters, of blanks, of digits, of the rest of ASCII, of
characters of two or four bytes, and of three; then its messages, and 1 if there are any."""

NO_TEXT: TextCounts = (0, 0, 0, 0, 0, 0, 0, 0)


class BrproxyError(Exception):
    """Base of every error that brproxy raises for its users; its text is a line for each mistake."""


class InvalidInputError(BrproxyError):
    """Something a user handed over (a file, an argument, a request) is not what it should be."""


# Not frozen, though nobody changes one: freezing makes each request pay four times as much for it.
@dataclass(slots=True)
class PendingRequest:
    """What the router knows about a request when it arrives.

    ``prompt_tokens`` is exact for token-id prompts and an estimate otherwise. ``output_tokens_max`` is what
    the client allows (``max_tokens``); None when it sets no limit. ``runs_to_max``: it also told the engine
    to ignore the end of the text, so that the output is exactly that long. ``prompt_hash`` and
    ``prefix_hash`` identify the whole prompt and its beginning, ``user`` who asks; None and "" where unknown.
    ``output_tokens_true`` is how long the output turns out to be: only a simulator knows.
    ``sequences`` are decoded side by side and take a slot each; 0 generates nothing, takes no slot and is not
    kept waiting for one.
    ``prompt_is_exact``: ``prompt_tokens`` was counted, not guessed; only a count may be refused as too long.
    ``session_keys`` are what its session may be remembered under, the best first: it will be under that one.
    ``goes_on``: what its session had so far is in front of its prompt, and not in ``prompt_tokens``.
    ``batch``: the closed batch that it is of, "" if of none.
    ``count_number``: by which its prompt's exact size will be told; 0: it is not counted, or known by now.
    """

    prompt_tokens: int
    model: str = ""
    output_tokens_max: int | None = None
    runs_to_max: bool = False
    prompt_hash: int | None = None
    prefix_hash: int | None = None
    user: str = ""
    output_tokens_true: int | None = None
    prompt_is_exact: bool = False
    sequences: int = 1
    session_keys: tuple[int, ...] = ()
    goes_on: bool = False
    count_number: int = 0
    batch: str = ""
