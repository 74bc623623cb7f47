"""Who is behind a URL, put together from the pages that engines have about themselves. Pure, never raises.

What an engine does not tell is None: vLLM never tells how many requests it runs at once. Names and numbers
are bounded here, where they enter, and a name that could not be shown in one line is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from brproxy.engines.body import read_json
from brproxy.engines.counts import first_count
from brproxy.engines.exposition import samples
from brproxy.types import TOKENS_MAX

VERSION, MODELS, METRICS = "/version", "/v1/models", "/metrics"
SERVER_INFO, OLD_SERVER_INFO, LOADS = "/server_info", "/get_server_info", "/v1/loads"

MODELS_MAX = 1024
"""Models of one list that are read (models)."""

RANKS_MAX = 1024
"""Most DP ranks behind one URL (ranks)."""

_RANK_MAX = 65_535
"""The largest number of a rank."""

SLOTS_MAX = 1 << 20
"""Most requests that a worker runs at once (requests), as in the configuration."""

_NAME_CHARS_MAX = 256
_VERSION_CHARS_MAX = 64
_CACHE_CONFIG = "vllm:cache_config_info"
_WORDS = {"vllm": "vLLM", "sglang": "SGLang", "openai": "an OpenAI-compatible server"}
_ROLES = {"null": "both", "prefill": "prefill", "decode": "decode"}

_PORT_MAX = 65535

Pages = Mapping[str, bytes | None]
"""The body of each page that was asked for, by its path; None where there is no such page."""


class Model(NamedTuple):
    """A model that is served. ``parent``: of an adapter, the model that it belongs to, else ""."""

    name: str
    parent: str = ""
    length_tokens_max: int | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """What an engine says of itself. ``engine`` is the name of its dialect.

    ``slots`` and ``kv_capacity_tokens`` are each DP rank's, of the smallest where they differ. ``ranks`` is
    how many are behind the URL, numbered from ``first_rank`` in the deployment. ``role``: "prefill", "decode"
    or "both". ``bootstrap_port``: where one that prefills meets those that decode.
    """

    engine: str
    version: str = ""
    models: tuple[Model, ...] = ()
    slots: int | None = None
    kv_capacity_tokens: int | None = None
    ranks: int | None = None
    role: str | None = None
    first_rank: int = 0
    bootstrap_port: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all models, adapters included."""
        return tuple(model.name for model in self.models)

    @property
    def bases(self) -> frozenset[str]:
        """The models that are no adapters."""
        return frozenset(model.name for model in self.models if not model.parent)

    @property
    def engine_words(self) -> str:
        """The engine as people call it, with its version where it is known."""
        return f"{_WORDS.get(self.engine, self.engine)} {self.version}".rstrip()

    def limits(self, *, by_rank: bool) -> tuple[int | None, int | None]:
        """Return slots and KV capacity of one rank, or of all behind the URL taken together."""
        times = 1 if by_rank else self.ranks or 1
        slots = None if self.slots is None else min(self.slots * times, SLOTS_MAX)
        kv_tokens = self.kv_capacity_tokens
        return slots, None if kv_tokens is None else min(kv_tokens * times, TOKENS_MAX)


def questions(pages: Pages) -> tuple[str, ...]:
    """Return the paths to ask for after those of ``pages``; none when nothing more is to be learnt.

    An engine logs what it does not have, so nobody is asked for another engine's pages once it is known.
    """
    if MODELS not in pages:
        return VERSION, MODELS
    owners = _owners(pages)
    wanted = [SERVER_INFO] if "vllm" not in owners else []
    if "sglang" not in owners:
        wanted.append(METRICS)
    elif SERVER_INFO in pages and pages[SERVER_INFO] is None:
        wanted.append(OLD_SERVER_INFO)
    if "sglang" in owners or _is_sglang(_server_info(pages)):
        wanted.append(LOADS)
    return tuple(path for path in wanted if path not in pages)


def identify(pages: Pages) -> Identity | None:
    """Return who has these pages; None where it is nothing that serves models."""
    models, owners, info = _models(pages.get(MODELS)), _owners(pages), _server_info(pages)
    if "sglang" in owners or _is_sglang(info):
        return _sglang(models, info, _rows(_document(pages.get(LOADS)).get("loads")))
    ranks = [sample.labels for sample in samples(pages.get(METRICS) or b"", (_CACHE_CONFIG,))]
    if "vllm" in owners or ranks:
        return _vllm(models, _version(_document(pages.get(VERSION))), ranks)
    return None if models is None else Identity("openai", models=models)


def _vllm(models: tuple[Model, ...] | None, version: str, ranks: list[dict[str, str]]) -> Identity:
    count = min(len({labels.get("engine", "") for labels in ranks}), RANKS_MAX)
    kv_tokens = _least(_number(labels.get("kv_cache_size_tokens", "")) for labels in ranks)
    if kv_tokens is None:
        # Of older versions; there the blocks are those of all ranks, told by each.
        blocks = _least(
            _number(labels.get("num_gpu_blocks", "")) * _number(labels.get("block_size", ""))
            for labels in ranks
        )
        kv_tokens = None if blocks is None else min(blocks // count, TOKENS_MAX) or None
    first = _first_rank({labels.get("engine", "") for labels in ranks})
    return Identity("vllm", version, models or (), None, kv_tokens, count or None, first_rank=first)


def _first_rank(labels: set[str]) -> int:
    """Return the least of the numbers where they are one row, as behind an API server of one node; else 0."""
    numbers = {_number(label) for label in labels}
    first = min(numbers, default=0)
    is_row = len(numbers) == len(labels) and max(numbers, default=0) == first + len(numbers) - 1
    return first if is_row and first + len(numbers) - 1 <= _RANK_MAX else 0


def _sglang(models: tuple[Model, ...] | None, info: dict[str, Any], loads: list[dict[str, Any]]) -> Identity:
    states = _rows(info.get("internal_states"))
    memory = [state["memory_usage"] for state in states if isinstance(state.get("memory_usage"), dict)]
    slots = (
        _least(_count(load, "max_running_requests") for load in loads)
        or _least(_count(state, "effective_max_running_requests_per_dp") for state in states)
        or _slots_asked_for(info)
    )
    kv_tokens = (
        _least(_count(load, "max_total_num_tokens") for load in loads)
        or _least(_count(usage, "token_capacity") for usage in memory)
        or _count(info, "max_total_num_tokens")
        or None
    )
    ranks = _count(info, "dp_size") or len({_count(load, "dp_rank") for load in loads})
    if models is None:
        name = _name(info.get("served_model_name"))
        models = (Model(name),) if name else ()
    role = info.get("disaggregation_mode")
    port = _count(info, "disaggregation_bootstrap_port")
    return Identity(
        "sglang",
        _version(info),
        models,
        None if slots is None else min(slots, SLOTS_MAX),
        kv_tokens,
        min(ranks, RANKS_MAX) or None,
        _ROLES.get(role) if isinstance(role, str) else None,
        bootstrap_port=port if 0 < port <= _PORT_MAX else None,
    )


def _slots_asked_for(info: dict[str, Any]) -> int | None:
    """Return a rank's slots as the command line gave them: with DP attention the ranks share them."""
    slots = _count(info, "max_running_requests")
    ranks = _count(info, "dp_size") if info.get("enable_dp_attention") is True else 1
    return slots // max(ranks, 1) or None


def _models(body: bytes | None) -> tuple[Model, ...] | None:
    """Return the models of a list, each once; None where it is no list."""
    entries = _document(body).get("data")
    if not isinstance(entries, list):
        return None
    found: dict[str, Model] = {}
    for entry in islice(_rows(entries), MODELS_MAX):
        name = _name(entry.get("id"))
        if name:
            length = _count(entry, "max_model_len") or None
            found.setdefault(name, Model(name, _name(entry.get("parent")), length))
    return tuple(found.values())


def _owners(pages: Pages) -> set[str]:
    """Return who owns the models: engines write their own names there."""
    owners = (entry.get("owned_by") for entry in _rows(_document(pages.get(MODELS)).get("data")))
    return {owner for owner in owners if owner in ("vllm", "sglang")}


def _server_info(pages: Pages) -> dict[str, Any]:
    return _document(pages.get(SERVER_INFO)) or _document(pages.get(OLD_SERVER_INFO))


def _is_sglang(info: dict[str, Any]) -> bool:
    return "max_total_num_tokens" in info or "disaggregation_mode" in info


def _document(body: bytes | None) -> dict[str, Any]:
    return read_json(body).document if body else {}


def _rows(value: object) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _count(holder: dict[str, Any], key: str) -> int:
    """Return the count under ``key``, 0 where there is none: no limit is that."""
    return first_count(holder, (key,)) or 0


def _number(text: str) -> int:
    """Return a count that stands in a label, 0 where none does ("None", mostly)."""
    return min(int(text), TOKENS_MAX) if text.isascii() and text.isdecimal() and len(text) < 20 else 0


def _least(counts: Iterable[int]) -> int | None:
    """Return the least that is one; None without any."""
    return min((count for count in counts if count), default=None)


def _name(value: object) -> str:
    return _shown(value, _NAME_CHARS_MAX)


def _version(document: dict[str, Any]) -> str:
    return _shown(document.get("version"), _VERSION_CHARS_MAX)


def _shown(value: object, chars_max: int) -> str:
    """Return a text that can be shown in one line as it is, else ""."""
    return value if isinstance(value, str) and len(value) <= chars_max and value.isprintable() else ""
