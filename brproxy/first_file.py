"""A configuration from what engines say of themselves: as a document, and as a commented file. Pure."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from brproxy.config_workers import Worker
from brproxy.engines.identity import Identity
from brproxy.findings import Finding, rank_words

_Kind = tuple[frozenset[str], str]
"""What makes a group: models that are no adapters, and the engine."""

_GROUP_CHARS_MAX = 100
_COMMENT_CHARS_MAX = 300

HEAD = """\
# Written by `brproxy init` from what the workers say. `brproxy check --config FILE` compares the two again,
# `brproxy serve --config FILE` starts; `brproxy reference` lists every key.

[listen]
host = "127.0.0.1"  # "0.0.0.0" to be reached from other machines
port = 8080

# Workers of one group run in lockstep, as DP ranks under expert parallelism do. Those of one model and engine
# are taken for that; give deployments that do not wait for each other groups of their own.
"""

_HOW_TO_FIND_SLOTS = (
    "vLLM does not tell how many requests it runs at once: it is --max-num-seqs on its command line; without",
    "that its own default, 256 or 1024 by version and GPU. Too low leaves it idle, too high has it queue.",
)
_SLOTS_UNKNOWN = ("This engine does not tell how many requests it runs at once.",)
_HALF = "It does one half of the work, and nobody in its group was found who does the other."


@dataclass(frozen=True, slots=True)
class Entry:
    """One ``[[worker]]`` table, and who it is. ``others``: its models that not all of its group have."""

    keys: dict[str, str | int | list[str]]
    identity: Identity
    others: tuple[str, ...]


def entries(findings: Iterable[Finding]) -> list[Entry]:
    """Return a table for each URL where an engine answers, put into groups.

    Who has the same models (adapters aside) and engine is one group. A group lists the models that all
    of it serve: with another one a request might go to a worker that does not have it.
    """
    found = [(finding.url, finding.identity) for finding in findings if finding.identity is not None]
    groups: dict[_Kind, list[Identity]] = {}
    for _, identity in found:
        groups.setdefault(_kind(identity), []).append(identity)
    names = _group_names(list(groups))
    common = {
        kind: set.intersection(*(set(identity.names) for identity in group)) for kind, group in groups.items()
    }
    roles = {kind: {identity.role for identity in group} for kind, group in groups.items()}
    return [
        _entry(url, identity, names[_kind(identity)], common[_kind(identity)], roles[_kind(identity)])
        for url, identity in found
    ]


def file_text(findings: Iterable[Finding]) -> str:
    """Return the file: a table for each engine, and a comment for each URL where none answered."""
    findings = list(findings)
    tables = [_table(entry) for entry in entries(findings)]
    tables += [_silent(finding) for finding in findings if finding.identity is None]
    return HEAD + "".join(f"\n{table}\n" for table in tables)


def _kind(identity: Identity) -> _Kind:
    return identity.bases, identity.engine


def _group_names(kinds: list[_Kind]) -> dict[_Kind, str]:
    """Return a name for each group, none for one that is alone: it has the default's."""
    if len(kinds) == 1:
        return {kinds[0]: ""}
    names: dict[_Kind, str] = {}
    for bases, engine in kinds:
        name = min(bases, default=engine)[:_GROUP_CHARS_MAX]
        ends = ("", f"-{engine}", *(f"-{n + 2}" for n in range(len(kinds))))
        taken = set(names.values())
        names[bases, engine] = next(name + end for end in ends if name + end not in taken)
    return names


def _entry(
    url: str, identity: Identity, group: str, common: set[str], roles: Collection[str | None]
) -> Entry:
    # Half of the work is no use without who does the other; one that does all of it can decode.
    is_split = "prefill" in roles and len(roles) > 1
    role = identity.role if is_split and identity.role != "both" else None
    models = sorted(common)
    slots, kv_tokens = identity.limits(by_rank=True)
    keys = {
        "url": url,
        **_rank_keys(identity),
        "group": group or None,
        "model": models[0] if len(models) == 1 else models or None,
        "engine": identity.engine,
        "role": role,
        "bootstrap_port": identity.bootstrap_port if role == "prefill" else None,
        "slots": slots,
        "kv_capacity_tokens": kv_tokens,
    }
    others = tuple(name for name in identity.names if name not in common)
    return Entry({key: value for key, value in keys.items() if value is not None}, identity, others)


def _rank_keys(identity: Identity) -> dict[str, str | int | None]:
    """Return how each rank is addressed: by SGLang's numbers, or as vLLM's API server counts its own."""
    if identity.ranks is None or identity.ranks == 1:
        return {}
    first, is_global = identity.first_rank, identity.engine == "sglang"
    return {
        "ranks": f"{first}-{first + identity.ranks - 1}",
        "rank_mode": "global" if is_global else None,
        "rank_base": None if is_global else first or None,
    }


def _table(entry: Entry) -> str:
    identity = entry.identity
    about = [", ".join((identity.engine_words, *rank_words(identity)))]
    about += [
        f"{model.name}: up to {model.length_tokens_max:,} tokens"
        for model in identity.models
        if model.length_tokens_max is not None and not model.parent
    ]
    if entry.others:
        about.append(f"Served here, but not by the whole group, and left out: {', '.join(entry.others)}")
    if identity.role in {"prefill", "decode"} and "role" not in entry.keys:
        about.append(_HALF)
    lines = [
        *_comments(about),
        "[[worker]]",
        *(f"{key} = {_toml(value)}" for key, value in entry.keys.items()),
    ]
    if "slots" not in entry.keys:
        how = _HOW_TO_FIND_SLOTS if identity.engine == "vllm" else _SLOTS_UNKNOWN
        lines += [*_comments(how), f"# slots = {Worker.model_fields['slots'].default}"]
    if "kv_capacity_tokens" not in entry.keys:
        lines += _comments(["The KV cache's size is not known, and not watched."])
        lines.append("# kv_capacity_tokens = 500000")
    return "\n".join(lines)


def _silent(finding: Finding) -> str:
    about = _comments([f"Left out, since nobody knows who is there: {finding.failure}"])
    return "\n".join((*about, "# [[worker]]", f"# url = {_toml(finding.url)}"))


def _comments(texts: Iterable[str]) -> list[str]:
    """Return comments of a line each, whatever is in the texts."""
    lines = []
    for text in texts:
        shown = "".join(char if char.isprintable() else "?" for char in text)
        lines.append(f"# {shown if len(shown) <= _COMMENT_CHARS_MAX else shown[:_COMMENT_CHARS_MAX] + '…'}")
    return lines


def _toml(value: object) -> str:
    # A string that is printable is the same in both languages.
    return json.dumps(value, ensure_ascii=False)
