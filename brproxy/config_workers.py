"""The workers of the configuration file, each by itself and beside the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PrivateAttr

from brproxy.engines.dialect import DIALECTS
from brproxy.engines.identity import Identity
from brproxy.engines.transfer import TRANSFERS
from brproxy.origins import read_worker_url
from brproxy.ranks import RANK_MAX, RankGuess, rank_line, read_ranks
from brproxy.registry import Registry, UnknownNameError
from brproxy.relay.fields import NOT_TO_WORKERS, is_field
from brproxy.relay.tls import TlsFileError, TlsFiles, client_context
from brproxy.types import InvalidInputError
from brproxy.validation import Disagreement, Section


def known_name(registry: Registry[Any], *, or_none: bool = False) -> AfterValidator:
    """Return a validator that takes the names of ``registry`` only, with ``or_none`` the empty one too."""

    def check(name: str) -> str:
        if or_none and not name:
            return name
        try:
            registry.get(name)
        except UnknownNameError as error:
            raise ValueError(str(error)) from error
        return name

    return AfterValidator(check)


def prefill_group(group: str) -> str:
    """Return the name of the barrier group that prefills for ``group``."""
    return group + _PREFILL


def _url(url: str) -> str:
    """Check a worker's URL and return it as it goes over the wire, without a trailing slash."""
    try:
        return str(read_worker_url(url))
    except InvalidInputError as error:
        raise ValueError(str(error)) from error


def _ranks(text: str) -> str:
    """Check a list of ranks; the empty one is of a worker that is no server of several."""
    try:
        if text:
            read_ranks(text)
    except InvalidInputError as error:
        raise ValueError(str(error)) from error
    return text


_PREFILL = "/prefill"
"""What the name of a group of prefill workers ends with."""

HEADERS_MAX = 32
"""Header fields of a worker's own (fields)."""

HEADER_VALUE_MAX = 8192
"""The value of one of them (bytes)."""

MEMBERS_MAX = 4096
"""Members of a file: workers, and ranks of those that have several (members)."""


class Seat(NamedTuple):
    """One member that a worker's table stands for: its name, its rank (None: the URL is one), its lines."""

    key: str
    rank: int | None
    lines: bytes


class Heard(NamedTuple):
    """What asking a worker's engine gave by now.

    ``said`` is its last answer, None before the first; ``found`` are the keys whose values are the engine's.
    ``is_silent``: it was asked last and did not answer.
    """

    said: Identity | None = None
    found: frozenset[str] = frozenset()
    is_silent: bool = False


class Worker(Section):
    """One DP rank behind a port of its own, or a server with several ranks behind one."""

    url: Annotated[str, AfterValidator(_url)] = Field(
        description='Where the worker listens, as "http://host:port"; with a base path, as '
        '"http://host:port/base", all paths are below that.'
    )
    name: str = Field(
        default="",
        max_length=128,
        description="Name in logs and metrics; the URL's host and port when empty.",
    )
    group: str = Field(
        default="default",
        min_length=1,
        max_length=128,
        description="Barrier group: workers of the same name run in lockstep.",
    )
    model: str | list[str] = Field(
        default_factory=list,
        description="Model or list of models that the worker serves; empty: whatever a request names.",
    )
    slots: int = Field(
        default=64,
        ge=1,
        le=1 << 20,
        description="Most requests that it runs at once, of several ranks each one (vLLM: --max-num-seqs); "
        "left out: what the engine says.",
    )
    kv_capacity_tokens: int | None = Field(
        default=None,
        ge=1,
        description="KV cache size, of several ranks each one's (tokens); left out: what the engine says, "
        "else unknown and not watched.",
    )
    engine: Annotated[str, known_name(DIALECTS)] = Field(
        default="vllm", description="What the worker speaks."
    )
    addresses: Literal["any", "each"] = Field(
        default="any",
        description='Who the URL\'s host is: "any" address of it is the worker, or "each" is one '
        "(Kubernetes: a headless service), looked up every discovery.resolve_interval_s.",
    )
    ranks: Annotated[str, AfterValidator(_ranks)] = Field(
        default="",
        max_length=8192,
        description="The DP ranks behind the URL, numbered as in the whole deployment and its metrics, "
        'as "0-7" or "0,2,4-6": each is a worker, addressed by X-data-parallel-rank; '
        "empty: the URL is one.",
    )
    rank_mode: Literal["local", "global"] = Field(
        default="local",
        description='Which number addresses a rank: rank - rank_base ("local": vLLM, by default) or the '
        'rank itself ("global": SGLang, vLLM\'s Rust frontend). `brproxy check` tries it.',
    )
    rank_base: int = Field(
        default=0,
        ge=0,
        le=RANK_MAX,
        description='The rank that the server itself calls 0, with rank_mode "local" '
        "(vLLM: --data-parallel-start-rank).",
    )
    role: Literal["both", "prefill", "decode"] = Field(
        default="both",
        description='What the worker does of a request: "both", or one of the two where they are apart; '
        "then a request is prefilled by one worker and decoded by another of the same group.",
    )
    transfer: Annotated[str, known_name(TRANSFERS, or_none=True)] = Field(
        default="",
        description="How prefill workers of the group hand KV over to those that decode: "
        '"nixl", "mooncake", "ascend", "ascend-layerwise" or "sglang"; empty: "sglang" for that engine, '
        'else "nixl".',
    )
    bootstrap_port: int = Field(
        default=8998,
        ge=1,
        le=65535,
        description="Port on which a prefill worker meets those that decode "
        "(SGLang: --disaggregation-bootstrap-port; Mooncake: VLLM_MOONCAKE_BOOTSTRAP_PORT).",
    )
    headers: dict[str, str] = Field(
        default_factory=dict,
        max_length=HEADERS_MAX,
        description="Header fields that the worker gets with every request, in place of a client's of the "
        'same name, as { "Authorization" = "Bearer KEY" }.',
    )
    ca_file: str = Field(
        default="",
        description="Certificates (PEM) that an https worker's is checked with; empty: the system's.",
    )
    client_certificate_file: str = Field(
        default="", description="Certificate chain (PEM) that the proxy shows an https worker; empty: none."
    )
    client_key_file: str = Field(
        default="",
        description="Its private key (PEM), unencrypted; empty: the certificate's file has it too.",
    )

    _heard: Heard = PrivateAttr(default=Heard())

    @property
    def heard(self) -> Heard:
        """What asking its engine gave, beside what the file says."""
        return self._heard

    def holding(self, heard: Heard, **values: int | None) -> Worker:
        """Return the worker with ``values`` of keys that the file leaves out, and what was ``heard``."""
        # Not model_copy, which would count the values as the file's.
        worker = Worker.model_construct(self.model_fields_set, **(dict(self) | values))
        worker._heard = heard  # noqa: SLF001 - its own
        return worker

    @property
    def label(self) -> str:
        """The name, or host and port."""
        return self.name or urlsplit(self.url).netloc

    @property
    def barrier_group(self) -> str:
        """Who runs in lockstep with it: prefill workers are a group beside the one that they prefill for."""
        return prefill_group(self.group) if self.role == "prefill" else self.group

    @property
    def handover(self) -> str:
        """The name of the transfer between prefill and decode."""
        return self.transfer or ("sglang" if self.engine == "sglang" else "nixl")

    @property
    def models(self) -> frozenset[str]:
        """The models as a set; empty for any."""
        return frozenset([self.model] if isinstance(self.model, str) else self.model) - {""}

    @property
    def seats(self) -> list[Seat]:
        """The members that this table stands for: one for each rank, or the URL as one."""
        if not self.ranks:
            return [Seat(self.label, None, b"")]
        guess = self.rank_guess
        return [Seat(f"{self.label}/{rank}", rank, rank_line(guess.number(rank))) for rank in guess.ranks]

    @property
    def fields(self) -> tuple[tuple[bytes, bytes], ...]:
        """The header fields as bytes."""
        return tuple((name.encode(), value.encode()) for name, value in self.headers.items())

    @property
    def tls_files(self) -> TlsFiles:
        """The files that TLS needs."""
        return TlsFiles(self.ca_file, self.client_certificate_file, self.client_key_file)

    @property
    def rank_guess(self) -> RankGuess:
        """What the server is taken to understand; for workers with ranks."""
        return RankGuess(read_ranks(self.ranks), self.rank_mode, self.rank_base)


def disagreements(workers: Sequence[Worker]) -> Iterator[Disagreement]:
    """Yield what is wrong with workers; beside others each is compared with the first that is like it."""
    by_url: dict[str, int] = {}
    by_key: dict[str, int] = {}
    by_group: dict[str, int] = {}
    members = 0
    usable: dict[TlsFiles, TlsFileError | None] = {TlsFiles(): None}
    for i, worker in enumerate(workers):
        yield from (Disagreement((i, key), text) for key, text in _of_ranks(worker))
        yield from (Disagreement((i, "headers", name), text) for name, text in _of_headers(worker))
        if worker.addresses == "each" and worker.url.startswith("https:"):
            text = 'must be "any" with an https url: a certificate is of the name, not of its addresses'
            yield Disagreement((i, "addresses"), text)
        yield from (Disagreement((i, key), text) for key, text in _of_tls(worker, usable))
        if worker.group.endswith(_PREFILL):
            yield Disagreement(
                (i, "group"), f"must not end with {_PREFILL!r}, as groups of prefill workers do"
            )
        same_url = by_url.setdefault(worker.url, i)
        first = workers[by_group.setdefault(worker.group, i)]
        if same_url != i:
            text = f"{worker.url!r} is worker[{same_url}]'s already; each worker must have its own"
            yield Disagreement((i, "url"), text)
        seats = worker.seats
        members += len(seats)
        taken = next((seat.key for seat in seats if by_key.setdefault(seat.key, i) != i), None)
        # Without a name it is the URL's: then one of the two says it.
        if taken is not None and (worker.name or workers[by_key[taken]].url != worker.url):
            text = f"{taken!r} is worker[{by_key[taken]}]'s already; each worker must have its own"
            yield Disagreement((i, "name"), text)
        if common(worker) != common(first):
            text = (
                f"group {worker.group!r} has workers with different models, engines or transfers; "
                "the workers of a group must agree, others belong in a group of their own"
            )
            yield Disagreement((i,), text)
    yield from _of_roles(workers)
    if members > MEMBERS_MAX:
        yield Disagreement((), f"must be {MEMBERS_MAX} workers at most, each rank counted, got {members}")


def common(worker: Worker) -> tuple[object, ...]:
    """Return what the workers of a group must have in common."""
    return worker.models, worker.engine, worker.handover


def _of_roles(workers: Sequence[Worker]) -> Iterator[Disagreement]:
    """Yield workers with half a request to do, where nobody does the other half."""
    roles: dict[str, set[str]] = {}
    for worker in workers:
        roles.setdefault(worker.group, set()).add(worker.role)
    for i, worker in enumerate(workers):
        others = roles[worker.group]
        if worker.role == "prefill" and others == {"prefill"}:
            yield Disagreement(
                (i, "role"), f'group {worker.group!r} has no worker with role "decode" or "both"'
            )
        if worker.role == "decode" and "prefill" not in others:
            yield Disagreement((i, "role"), f'group {worker.group!r} has no worker with role "prefill"')


def _of_ranks(worker: Worker) -> Iterator[tuple[str, str]]:
    """Yield keys that do not fit a worker's ranks, and why."""
    if not worker.ranks:
        if worker.rank_mode != "local":
            yield "rank_mode", "needs ranks, which are not given"
        if worker.rank_base:
            yield "rank_base", "needs ranks, which are not given"
        return
    least = read_ranks(worker.ranks)[0]
    if worker.rank_mode == "global" and worker.rank_base:
        yield (
            "rank_base",
            f'must be 0 with rank_mode "global", which sends ranks as they are, got {worker.rank_base}',
        )
    if worker.rank_mode == "local" and worker.rank_base > least:
        yield "rank_base", f"must be at most the least of the ranks, {least}, got {worker.rank_base}"


def _of_headers(worker: Worker) -> Iterator[tuple[str, str]]:
    """Yield names of fields that cannot be a worker's own, and why; never a value, which may be secret."""
    names: set[bytes] = set()
    for (name, value), key in zip(worker.fields, worker.headers, strict=True):
        low = name.lower()
        if not is_field(name, value):
            yield (
                key,
                "must be a header field: a name of letters, digits and -, and a value in one line",
            )
        elif len(value) > HEADER_VALUE_MAX:
            yield key, f"must have {HEADER_VALUE_MAX} bytes at most, got {len(value)}"
        elif low in NOT_TO_WORKERS:
            yield key, "must not be given here: the proxy itself says that to workers"
        elif low in names:
            yield key, "is given twice, in other letters"
        names.add(low)


_TLS_KEYS = {"authorities": "ca_file", "certificate": "client_certificate_file"}


def _of_tls(worker: Worker, usable: dict[TlsFiles, TlsFileError | None]) -> Iterator[tuple[str, str]]:
    """Yield keys of TLS that do not fit, and why; ``usable`` keeps what was found out about files."""
    files = worker.tls_files
    if files.key and not files.certificate:
        yield "client_key_file", "needs client_certificate_file, which is not given"
        return
    if any(files) and not worker.url.startswith("https:"):
        yield "ca_file" if files.authorities else "client_certificate_file", 'needs a url like "https://host"'
        return
    if files not in usable:
        try:
            client_context(files)
            usable[files] = None
        except TlsFileError as error:
            usable[files] = error
    wrong = usable[files]
    if wrong is not None:
        yield _TLS_KEYS[wrong.name], str(wrong)
