"""The interface of a dialect: what the proxy must understand of an engine's requests and answers.

A dialect only reads. It never raises on what clients or engines send: what it cannot read it reports as
unknown, the bytes pass unchanged, and the engine has the last word on them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple, TypeVar

from brproxy.engines.load import LoadReading
from brproxy.engines.sessions import NO_SESSION, SessionAsk, SessionFacts
from brproxy.engines.text import bytes_of
from brproxy.registry import Registry
from brproxy.types import NO_TEXT, TextCounts


class RequestFacts(NamedTuple):
    """What a request says about the load that it will be.

    ``prompt_tokens`` is exact for token-id prompts and None otherwise; ``prompt_text`` is what its text is
    made of. ``sequences`` are decoded side by side; 0: it generates nothing. ``output_tokens_max`` is for
    each of them. ``runs_to_max``: the engine is told to ignore the end of the text. ``prompt_hash`` and
    ``prefix_hash`` are there when they were asked for. ``usage_can_be_asked`` tells that a stream could
    report usage if the proxy asked, and that the client has not said anything about it.

    ``prompt_is_exact``: ``prompt_tokens`` were counted, and are of one prompt, which a worker must hold at
    once; nothing else may refuse a request as too long. ``teaches``: the text is all that the engine counts,
    so that its report says how many tokens its bytes are. ``malformed`` says in one line what is wrong with a
    body that the path's API cannot read, "" if nothing is. ``session`` is there when it was asked for.
    """

    model: str = ""
    stream: bool = False
    prompt_tokens: int | None = None
    prompt_text: TextCounts = NO_TEXT
    sequences: int = 1
    output_tokens_max: int | None = None
    runs_to_max: bool = False
    prompt_hash: int | None = None
    prefix_hash: int | None = None
    user: str = ""
    usage_can_be_asked: bool = False
    prompt_is_exact: bool = False
    teaches: bool = True
    malformed: str = ""
    session: SessionFacts = NO_SESSION

    @property
    def prompt_bytes(self) -> int:
        """The UTF-8 length of the prompt's text."""
        return bytes_of(self.prompt_text)


class Usage(NamedTuple):
    """Token counts as the engine reports them, at most TOKENS_MAX each; None where it does not.

    ``cached_tokens`` of the prompt were in its cache.
    """

    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None = None


class EventFacts(NamedTuple):
    """What one server-sent event of a generation says.

    ``has_tokens``: it carries output. ``usage_only``: it carries nothing but usage. ``refused``: the engine
    says that it did not take the request. ``error``: it reports an error of any kind. ``died``: the engine
    behind the API server is dead. ``done``: the last. ``finishes``: it says why a sequence ended,
    ``aborts``: that it did so before its time. ``sequence``: the one that its usage is of, None if that is of
    the whole response. ``answer_id``: what a later request may go on from, "" unless it is said.
    """

    has_tokens: bool = False
    usage: Usage | None = None
    usage_only: bool = False
    error: bool = False
    refused: bool = False
    done: bool = False
    died: bool = False
    finishes: bool = False
    aborts: bool = False
    sequence: int | None = None
    answer_id: str = ""


PLAIN_TOKENS = EventFacts(has_tokens=True)
"""The ordinary event: output and nothing else."""


class Dialect(ABC):
    """What one engine speaks."""

    HEALTH_PATH: ClassVar[str]
    MODELS_PATH: ClassVar[str] = "/v1/models"
    LOAD_PATH: ClassVar[str] = ""
    """Where the engine tells its load, to be asked with GET; empty: nowhere."""
    LOAD_IN_BAND: ClassVar[bool] = False
    """Whether it tells its load with responses, asked by a header field (see ``load_field.py``)."""
    TELLS_FAULTS: ClassVar[bool] = False
    """Whether it can say that a rank has failed, and be told to go on (``fault_pages.py``)."""
    TOKENIZE_PATH: ClassVar[str] = ""
    """Where the engine counts a prompt, to be asked with POST; empty: nowhere."""
    USAGE_TAKES_FINGERPRINT: ClassVar[bool] = False
    """Whether asking for usage moves ``system_fingerprint`` from a sequence's last event to usage's own."""

    @abstractmethod
    def read_request(
        self,
        path: str,
        method: str,
        content_type: str,
        body: bytes,
        *,
        hashes: bool = False,
        session: SessionAsk | None = None,
    ) -> RequestFacts:
        """Return what a request says; never raises. ``content_type`` comes without its parameters.

        ``hashes``: identify the prompt and its beginning too; ``session``: say which one it belongs to. The
        work is bounded by the body's length, and does not depend on what is in it (see ``body.py``).
        """

    @abstractmethod
    def ask_usage(self, body: bytes) -> bytes:
        """Return ``body`` with usage asked for; only for requests whose ``usage_can_be_asked``."""

    @abstractmethod
    def ends_with_done(self, path: str) -> bool:
        """Tell whether a complete stream of ``path`` ends with a ``[DONE]`` event."""

    @abstractmethod
    def read_event(self, data: bytes) -> EventFacts:
        """Return what the data of one event says; never raises, and is cheap for the ordinary event."""

    @abstractmethod
    def read_reply(self, body: bytes) -> Usage | None:
        """Return the usage in a complete JSON reply, None without one; never raises."""

    def read_answer_id(self, body: bytes) -> str:
        """Return what a later request may go on from, of a complete JSON reply; "" if it does not say."""
        return ""

    def may_tell_death(self, status: int) -> bool:
        """Tell whether the body of a response with ``status``, an error, may say that the engine is dead."""
        return False

    def is_death(self, status: int, body: bytes) -> bool:
        """Tell whether an error's body says that the engine behind the server is dead."""
        return False

    def read_load(self, body: bytes) -> LoadReading:
        """Return what the page at LOAD_PATH says of each rank; never raises."""
        return LoadReading()

    def tokenize_body(self, path: str, body: bytes) -> bytes | None:
        """Return what TOKENIZE_PATH is asked about a request; None where that would be another prompt."""
        return None

    def read_tokenized(self, body: bytes) -> int | None:
        """Return the count that TOKENIZE_PATH answers (tokens), None without one; never raises."""
        return None

    @abstractmethod
    def is_refusal(self, status: int) -> bool:
        """Tell whether a response with ``status``, an error, means that the engine took no request."""


DIALECTS: Registry[type[Dialect]] = Registry("engine", "brproxy.engines.dialects")

D = TypeVar("D", bound=Dialect)


def register_dialect(name: str) -> Callable[[type[D]], type[D]]:
    """Return a class decorator that files a dialect under ``name``."""

    def add(dialect: type[D]) -> type[D]:
        DIALECTS.register(name)(dialect)
        return dialect

    return add


def make_dialect(name: str) -> Dialect:
    """Build the dialect called ``name``; raises UnknownNameError."""
    return DIALECTS.get(name)()
