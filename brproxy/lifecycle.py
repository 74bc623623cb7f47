"""The life of a request: its states as one transition table, and what is kept of it. Pure.

A request ARRIVES and is PENDING in its group's pool. BIND gives it a worker: it is in PREFILL until its first
token, then in DECODE. A worker that fails before the first byte sends it back to PENDING (RETRY). It ends in
exactly one of the terminal states, from whichever state it is in; nothing leads out of those. RETRY is absent
from DECODE: once the client has seen a token, nothing is sent twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from operator import index
from typing import Final

from brproxy.transitions import TransitionTable
from brproxy.types import (
    SEQUENCES_MAX,
    TOKENS_MAX,
    BrproxyError,
    InvalidInputError,
    PendingRequest,
    RequestId,
    WorkerIndex,
)

NO_WORKER = WorkerIndex(-1)
NO_ROW = -1
NO_PLACE = -1
NOBODY: Final[frozenset[WorkerIndex]] = frozenset()


class State(Enum):
    """Where a request is in its life."""

    # There is one object for each member: no need to hash its name on every look-up of a transition.
    __hash__ = object.__hash__

    PENDING = auto()
    PREFILL = auto()
    DECODE = auto()
    FINISHED = auto()
    FAILED = auto()
    CANCELLED = auto()
    EXPIRED = auto()


class Event(Enum):
    """What can happen to a request."""

    __hash__ = object.__hash__

    BIND = auto()
    FIRST_TOKEN = auto()
    RETRY = auto()
    FINISH = auto()
    FAIL = auto()
    CANCEL = auto()
    EXPIRE = auto()


class LifecycleError(BrproxyError):
    """An event that the request's state does not allow: a bug in the caller, never in the input."""


TERMINAL: Final = frozenset({State.FINISHED, State.FAILED, State.CANCELLED, State.EXPIRED})
"""States that end a request; its load is returned on entering any of them."""

TRANSITIONS: Final[dict[State, dict[Event, State]]] = {
    State.PENDING: {
        Event.BIND: State.PREFILL,
        Event.FAIL: State.FAILED,
        Event.CANCEL: State.CANCELLED,
        Event.EXPIRE: State.EXPIRED,
    },
    State.PREFILL: {
        Event.FIRST_TOKEN: State.DECODE,
        Event.RETRY: State.PENDING,
        Event.FINISH: State.FINISHED,
        Event.FAIL: State.FAILED,
        Event.CANCEL: State.CANCELLED,
    },
    State.DECODE: {
        Event.FINISH: State.FINISHED,
        Event.FAIL: State.FAILED,
        Event.CANCEL: State.CANCELLED,
    },
    State.FINISHED: {},
    State.FAILED: {},
    State.CANCELLED: {},
    State.EXPIRED: {},
}

AFTER = TransitionTable("a request", TRANSITIONS, LifecycleError)


@dataclass(slots=True)
class Entry:
    """What is kept of one request until it ends. Times are the caller's clock in seconds; None: not yet.

    ``waiting_since_s`` is when it last began to wait: on arrival, or when a worker failed it. ``place`` is
    its place among those that wait, the waiting room's. While it is bound, ``output_tokens`` is kept by the
    ledger. ``home`` is the worker that probably has ``cached_tokens`` of its prompt, as of its arrival; or
    its worker, once that has said so. ``prefill_tokens``: what is booked of its prompt as yet to be
    prefilled, until its first token.
    """

    id: RequestId
    request: PendingRequest
    arrived_s: float
    waiting_since_s: float
    state: State = State.PENDING
    worker: WorkerIndex = NO_WORKER
    row: int = NO_ROW
    prompt_tokens: int = 0
    output_tokens: int = 0
    sequences: int = 1
    passed_over: int = 0
    place: int = NO_PLACE
    bound_s: float | None = None
    first_token_s: float | None = None
    avoid: frozenset[WorkerIndex] = NOBODY
    home: WorkerIndex = NO_WORKER
    cached_tokens: int = 0
    prefill_tokens: int = 0

    @property
    def uncached_tokens(self) -> int:
        """Tokens of its prompt that its worker prefills, as far as is known."""
        if self.home != self.worker:
            return self.prompt_tokens
        return max(self.prompt_tokens - self.cached_tokens, 0)

    def others(self, workers: Sequence[bool]) -> Sequence[bool]:
        """Return ``workers`` (by index) without those that failed the request."""
        return [ok and g not in self.avoid for g, ok in enumerate(workers)] if self.avoid else workers


def bounded(value: int, highest: int) -> int:
    """Return ``value`` brought within ``0 <= n <= highest``; raises TypeError for what is no integer."""
    number = index(value)
    if 0 <= number <= highest:
        return number
    return 0 if number < 0 else highest


def entry_of(request_id: RequestId, request: PendingRequest, now_s: float, prompt_tokens_max: int) -> Entry:
    """Return the entry of a request that arrives, with every number that it states within its bounds.

    Its prompt counts as ``prompt_tokens_max`` at most; raises InvalidInputError for less than no prompt.
    """
    prompt_tokens = index(request.prompt_tokens)
    if prompt_tokens < 0:
        msg = f"prompt_tokens must be at least 0, got {prompt_tokens}"
        raise InvalidInputError(msg)
    if prompt_tokens > prompt_tokens_max or prompt_tokens > TOKENS_MAX:
        prompt_tokens = min(prompt_tokens_max, TOKENS_MAX)
    entry = Entry(request_id, request, now_s, now_s, prompt_tokens=prompt_tokens)
    if request.sequences != 1:
        entry.sequences = bounded(request.sequences, SEQUENCES_MAX)
    return entry
