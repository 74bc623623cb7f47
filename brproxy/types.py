"""The shared vocabulary: names that more than one package needs, and nothing that does anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

RequestId = NewType("RequestId", int)
"""Number of a request in one process; never reused."""

WorkerIndex = NewType("WorkerIndex", int)
"""Position of a worker within its barrier group, ``0 <= index < G``."""


class BrproxyError(Exception):
    """Base of every error that brproxy raises for its users; its text is one line."""


class InvalidInputError(BrproxyError):
    """Something a user handed over (a file, an argument, a request) is not what it should be."""


@dataclass(frozen=True, slots=True)
class PendingRequest:
    """What the router knows about a request when it arrives.

    ``prompt_tokens`` is exact for token-id prompts and an estimate otherwise. ``output_tokens_max`` is
    what the client allows (``max_tokens``); None when it sets no limit.
    """

    prompt_tokens: int
    model: str = ""
    output_tokens_max: int | None = None

    def __post_init__(self) -> None:
        """Refuse counts that would corrupt the ledger."""
        if self.prompt_tokens < 0:
            msg = f"prompt_tokens must be at least 0, got {self.prompt_tokens}"
            raise InvalidInputError(msg)


@dataclass(frozen=True, slots=True)
class Assignment:
    """One decision: ``request_id`` is bound to ``worker`` for the rest of its life."""

    request_id: RequestId
    worker: WorkerIndex
