"""The interface of a transfer: how engines that prefill hand the KV of a prompt to engines that decode.

A request goes to both as two *legs*: the prefill leg makes an engine run the prompt and keep its KV, the
decode leg is what the client asked for, with what the decode worker needs to fetch that KV. A transfer makes
both bodies from the client's, and reads what engines say in between. It changes the members that are its own;
all other bytes stay as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from enum import Enum
from typing import ClassVar, Final, NamedTuple, TypeVar

from brproxy.engines.body import parsed
from brproxy.engines.edits import JsonObject, elements, read_object
from brproxy.engines.rewrite import MEMBERS_MAX
from brproxy.registry import Registry
from brproxy.types import SEQUENCES_MAX, InvalidInputError

PARAMS: Final = "kv_transfer_params"
"""The member by which vLLM and what is built on it hand over."""

PARAMS_BYTES_MAX: Final = 1 << 21
"""Longest JSON of an engine's own parameters: block ids of a million tokens take a quarter."""

_NESTED: Final = "sampling_params"
_SALT: Final = "cache_salt"
_GENERATES: Final = ("completions", "messages", "responses", "generate")
_LIMITS: Final = {
    "completions": "max_tokens",
    "messages": "max_tokens",
    "responses": "max_output_tokens",
}
# A response in the background would be answered before its prefill has begun.
_OF_NO_PREFILL: Final = ("stream_options", "background")
_LIMIT_OF_CHATS: Final = "max_completion_tokens"
_OFF: Final = (None, b"false", b"null")
# What chats have none of: then nothing has to be looked up.
_OF_SEQUENCES: Final = frozenset({b"n", b"use_beam_search", _NESTED.encode()})
_OF_PROMPT: Final = frozenset({b"prompt_logprobs", b"echo", _NESTED.encode()})
_PROMPTS: Final = frozenset({b"prompt", b"text", b"input_ids", b"prompt_embeds"})
_MINIMA: Final = ("min_tokens", "min_completion_tokens", "min_new_tokens")


class TransferError(InvalidInputError):
    """A body that cannot be made into two legs; the text says what it would have to be.

    Decode workers that can serve alone may get such a request as ``Transfer.alone_body``.
    """


class Order(Enum):
    """Which leg is sent first.

    PREFILL_FIRST: the decode leg needs what the prefill leg's reply says. TOGETHER: both at once.
    DECODE_FIRST: the prefill leg needs what the decode worker posts.
    """

    PREFILL_FIRST = "prefill first"
    TOGETHER = "together"
    DECODE_FIRST = "decode first"


class Handoff(NamedTuple):
    """What the two legs of one request share; a transfer uses what it needs of it.

    ``transfer_id``: printable ASCII, unique for each try. ``room``: a random number in ``[0, 2**62)``.
    ``prefill_host``: of the prefill worker, without a port, IPv6 without brackets. ``prefill_rank``: what is
    sent to it as ``X-data-parallel-rank``, None for a server that is one worker; ``prefill_ranks``: how many
    it has. ``engine_id``: from read_bootstrap. ``params``: JSON of ``kv_transfer_params``, from read_reply or
    read_post. ``metaserver``: the URL that decode workers post to.
    """

    transfer_id: str
    room: int
    prefill_host: str = ""
    bootstrap_port: int | None = None
    prefill_rank: int | None = None
    prefill_ranks: int = 1
    engine_id: str = ""
    params: bytes = b""
    metaserver: str = ""


Body = bytes | JsonObject
"""A client's body, or what ``Transfer.read`` has made of it."""


class Transfer(ABC):
    """How one kind of engine hands KV over."""

    ORDER: ClassVar[Order]
    LEASE_S: ClassVar[float | None] = None
    """How long a prefill worker keeps the KV after its reply, less a margin; None: unknown, or no matter."""
    DECODES_ALONE: ClassVar[bool] = True
    """Whether decode workers serve a request that has had no prefill leg."""
    BOOTSTRAP_PATH: ClassVar[str] = ""
    """The page on the bootstrap port that tells engine ids, to be asked with GET; empty: none is needed."""
    ASKS_AGAIN: ClassVar[bool] = False
    """Whether decode workers may give a request up, which ``asks_again`` tells."""
    NESTED_LIMIT: ClassVar[str] = "max_tokens"
    """How ``sampling_params`` call the limit of tokens."""

    def read(self, path: str, body: Body) -> JsonObject:
        """Return the body that both legs are made of; raises TransferError for one that is not handed over.

        What has been read is returned as it is, so that it is read and judged once for both.
        """
        return body if isinstance(body, JsonObject) else one_prompt(path, body)

    @abstractmethod
    def prefill_body(self, path: str, body: Body, handoff: Handoff) -> bytes:
        """Return what the prefill worker gets; raises TransferError for a body that cannot be rewritten."""

    @abstractmethod
    def decode_body(self, path: str, body: Body, handoff: Handoff) -> bytes:
        """Return what the decode worker gets; raises TransferError for a body that cannot be rewritten."""

    def free_body(self, path: str, body: Body, handoff: Handoff) -> bytes:
        """Return a decode leg that only fetches and frees; raises TransferError.

        It asks for one token and no stream. Who freed the KV already may keep that of others where it was:
        with a salt of its own (vLLM's ``cache_salt``), what is fetched then is not cached as this prompt's.
        """
        return one_token(
            path,
            json_object(self.decode_body(path, body, handoff)),
            {_SALT: b'"%x"' % handoff.room},
            nested_limit=self.NESTED_LIMIT,
        )

    def frees_by_decode(self) -> bool:
        """Tell whether KV that nobody will fetch is freed by sending ``free_body`` to a decode worker.

        It may be cancelled as soon as it is answered, or refused.
        """
        return False

    def alone_body(self, body: bytes) -> bytes:
        """Return what a decode worker gets that runs the prompt itself; raises TransferError.

        It has nothing of a transfer: a client's own parameters would name KV of others.
        """
        return json_object(body).edited({}, (PARAMS,))

    def read_reply(self, body: bytes) -> bytes | None:
        """Return the parameters for the decode leg in a prefill worker's reply, None without any.

        Never raises.
        """
        return None

    def read_bootstrap(self, body: bytes, rank: int | None) -> str | None:
        """Return the engine id of ``rank`` on the page at BOOTSTRAP_PATH, None without one; never raises."""
        return None

    def read_post(self, body: bytes) -> tuple[str, bytes] | None:
        """Return the ``X-Request-Id`` of a decode leg, and the parameters for its prefill leg.

        ``body`` is what the decode worker posts; None where it is not that. Never raises.
        """
        return None

    def tells_of_prompt(self, path: str, body: bytes) -> bool:
        """Tell whether a request asks what only the prefill worker can tell; never raises."""
        return False

    def asks_again(self, data: bytes) -> bool:
        """Tell whether a decode worker's event or reply says that it needs a new prefill; never raises."""
        return False


TRANSFERS: Registry[type[Transfer]] = Registry("transfer", "brproxy.engines.transfers")

T = TypeVar("T", bound=Transfer)


def register_transfer(name: str) -> Callable[[type[T]], type[T]]:
    """Return a class decorator that files a transfer under ``name``."""

    def add(transfer: type[T]) -> type[T]:
        TRANSFERS.register(name)(transfer)
        return transfer

    return add


def make_transfer(name: str) -> Transfer:
    """Build the transfer called ``name``; raises UnknownNameError."""
    return TRANSFERS.get(name)()


def json_object(body: bytes) -> JsonObject:
    """Return the object that ``body`` is; raises TransferError where it is none that can be edited."""
    document = read_object(body)
    if document is None:
        msg = f"the request body must be one JSON object in UTF-8 of fewer than {MEMBERS_MAX} members"
        raise TransferError(msg)
    return document


def one_sequence(path: str, body: bytes, kinds: Collection[str] = _GENERATES) -> JsonObject:
    """Return the object that ``body`` is, of a request that generates one sequence for each prompt.

    ``kinds``: last segments of the paths that are handed over, by default all that generate. Raises
    TransferError for anything else. Sequences of one prompt would fetch the KV several times, and the first
    that has it lets the prefill worker free it: no engine hands over for them (vllm#38900).
    """
    if path[path.rfind("/") + 1 :] not in kinds:
        msg = f"{path} is not handed over: it must end in one of {', '.join(kinds)}"
        raise TransferError(msg)
    document = json_object(body)
    if document.has_none_of(_OF_SEQUENCES):
        return document
    if {document.value("n"), _nested(document, "n")} - {None, b"1", b"null"} or document.value(
        "use_beam_search"
    ) not in _OFF:
        msg = "a request that is handed over must ask for one sequence: n = 1 and no beams"
        raise TransferError(msg)
    return document


def _nested(document: JsonObject, name: str) -> bytes | None:
    value = document.value(_NESTED)
    sampling = None if value is None else read_object(value)
    return None if sampling is None else sampling.value(name)


def one_prompt(path: str, body: bytes) -> JsonObject:
    """Return the object that ``body`` is, with one prompt and one sequence; else raises TransferError.

    Who decodes has not run the prompt, and cannot tell the probabilities of its tokens.
    """
    document = one_sequence(path, body)
    if not document.has_none_of(_OF_PROMPT):
        of_prompt = {document.value("prompt_logprobs"), _nested(document, "prompt_logprobs")}
        is_echoed = document.value("echo") not in _OFF and document.value("logprobs") not in _OFF
        if of_prompt - {None, b"null"} or is_echoed:
            msg = "a request that is handed over must not ask for the prompt's logprobs"
            raise TransferError(msg)
    if (prompts_of(document) or 1) > 1:
        msg = "a request that is handed over must have one prompt: send each of a list by itself"
        raise TransferError(msg)
    return document


def one_token(
    path: str,
    document: JsonObject,
    values: Mapping[str, bytes] | None = None,
    *,
    min_tokens: bytes | None = None,
    nested_limit: str = "max_tokens",
) -> bytes:
    """Return a body that asks for one token in one piece, with ``values`` set besides.

    ``min_tokens``: what that is set to, None to take it out. ``nested_limit``: the limit's name where it is
    in ``sampling_params``. Raises TransferError where those are no object.
    """
    kind = path[path.rfind("/") + 1 :]
    limits = {_LIMITS.get(kind, nested_limit): b"1"}
    if min_tokens is not None:
        limits["min_tokens"] = min_tokens
    changes = {"stream": b"false", **(values or {})}
    if kind in _LIMITS:
        if _LIMIT_OF_CHATS in document:
            limits[_LIMIT_OF_CHATS] = b"1"
        return document.edited(changes | limits, {*_OF_NO_PREFILL, *_MINIMA})
    value = document.value(_NESTED) or b"null"
    sampling = read_object(b"{}" if value == b"null" else value)
    if sampling is None:
        msg = f"{_NESTED} must be one JSON object of fewer than {MEMBERS_MAX} members"
        raise TransferError(msg)
    changes[_NESTED] = sampling.edited(limits, _MINIMA)
    return document.edited(changes, _OF_NO_PREFILL)


def params_in(body: bytes) -> bytes | None:
    """Return ``kv_transfer_params`` of a reply, an object that is not empty; None without. Never raises."""
    document = read_object(body)
    value = None if document is None else document.value(PARAMS)
    if value is None or len(value) > PARAMS_BYTES_MAX:
        return None
    return value if is_filled_object(value) else None


def is_filled_object(value: bytes) -> bool:
    """Tell whether ``value``, of bounded length, is JSON of an object with members."""
    document = parsed(value)
    return type(document) is dict and bool(document)


def prompts_of(document: JsonObject) -> int | None:
    """Return how many prompts a body has, None where it is one that stands alone, in no list.

    Counts to SEQUENCES_MAX + 1 at most.
    """
    if document.has_none_of(_PROMPTS):
        return None
    values = (document.value(name) for name in ("prompt", "text", "input_ids", "prompt_embeds"))
    counts = [elements(value, SEQUENCES_MAX + 1) for value in values if value is not None]
    return max((count for count in counts if count is not None), default=None)
