"""What the file says of workers beside what their engines say: filled in, and told in words. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from brproxy.config_workers import Heard, Worker
from brproxy.engines.identity import Identity


@dataclass(frozen=True, slots=True)
class Finding:
    """What asking one URL gave: who is there, or in one line why nobody knows."""

    url: str
    identity: Identity | None = None
    failure: str = ""


def by_rank(worker: Worker) -> bool:
    """Tell whether the worker's table names the ranks behind its URL: then its numbers are one rank's."""
    return bool(worker.ranks)


FILLED_IN = ("slots", "kv_capacity_tokens")
"""Keys of a worker that its engine fills in, in the order of ``Identity.limits``."""

NOT_ASKED: Mapping[str, Finding] = {}
"""Where nobody was asked."""


def completed(
    workers: Iterable[Worker], findings: Mapping[str, Finding], running: Iterable[Worker] = ()
) -> list[Worker]:
    """Return ``workers`` with what the file leaves out filled in from ``findings``, by URL.

    Of one that is among those ``running``, by name and URL, what is known stays known where its engine does
    not say it now, and what it last said where nobody has asked it. What the file itself gave is still told
    by each worker's ``model_fields_set``.
    """
    before = {_place(worker): worker for worker in running}
    return [_completed(worker, findings.get(worker.url), before.get(_place(worker))) for worker in workers]


def _place(worker: Worker) -> tuple[str, str, str, bool]:
    """Return what makes a worker the same one; numbers of a rank are not those of a whole server."""
    return worker.barrier_group, worker.label, worker.url, by_rank(worker)


def _completed(worker: Worker, finding: Finding | None, before: Worker | None) -> Worker:
    now = None if finding is None else finding.identity
    is_silent = finding is not None and now is None
    last = None if before is None else before.heard.said
    if now is not None and last is not None and now.engine != last.engine:
        # Another engine at the same place: nothing is known of it but what it says.
        before = None
    # Who was not asked would say what it said last.
    says = last if finding is None else now
    said = (None, None) if says is None else says.limits(by_rank=by_rank(worker))
    values: dict[str, int | None] = {}
    found = set()
    for key, value in zip(FILLED_IN, said, strict=True):
        if key in worker.model_fields_set:
            continue
        known = before is not None and key in before.heard.found
        if value is not None and not (known and finding is None):
            values[key] = value
            found.add(key)
        elif before is not None and (is_silent or known):
            values[key] = getattr(before, key)
            found |= {key} & before.heard.found
        else:
            values[key] = Worker.model_fields[key].default
    return worker.holding(Heard(now or last, frozenset(found), is_silent), **values)


def told(worker: Worker, identity: Identity) -> str:
    """Return in one line who ``worker`` is and what it holds, filled in or as the file has it."""
    slots, kv_tokens = identity.limits(by_rank=by_rank(worker))
    parts = [identity.engine_words]
    if "slots" in worker.model_fields_set:
        parts.append(f"slots: {worker.slots:,}")
    elif slots is not None:
        parts.append(f"slots: {slots:,} (it says)")
    else:
        whence = "as it said before" if "slots" in worker.heard.found else "the default; it does not say"
        parts.append(f"slots: {worker.slots:,} ({whence})")
    if "kv_capacity_tokens" in worker.model_fields_set:
        parts.append(f"KV capacity: {worker.kv_capacity_tokens:,} tokens")
    elif kv_tokens is not None:
        parts.append(f"KV capacity: {kv_tokens:,} tokens (it says)")
    elif worker.kv_capacity_tokens is not None:
        parts.append(f"KV capacity: {worker.kv_capacity_tokens:,} tokens (as it said before)")
    else:
        parts.append("KV capacity: unknown")
    parts += rank_words(identity)
    parts.append(f"models: {', '.join(identity.names) or 'none reported'}")
    return "; ".join(parts)


def rank_words(identity: Identity) -> list[str]:
    """Return what is worth telling of an engine's ranks and of its role."""
    words = []
    if identity.ranks is not None and identity.ranks > 1:
        words.append(f"DP ranks: {identity.ranks}")
    if identity.role in {"prefill", "decode"}:
        words.append(f"role: {identity.role}")
    return words


def contradictions(worker: Worker, identity: Identity) -> Iterator[str]:
    """Yield, a line each, where the engine does not say what the file says."""
    slots, kv_tokens = identity.limits(by_rank=by_rank(worker))
    given = worker.model_fields_set
    if "slots" in given and slots is not None and slots != worker.slots:
        yield f"slots = {worker.slots} in the file, but it runs {slots} at once"
    if "kv_capacity_tokens" in given and kv_tokens is not None and kv_tokens != worker.kv_capacity_tokens:
        yield f"kv_capacity_tokens = {worker.kv_capacity_tokens} in the file, but it has {kv_tokens}"
    if worker.engine != identity.engine and "openai" not in (worker.engine, identity.engine):
        origin = "in the file" if "engine" in given else "by default"
        yield f'engine = "{worker.engine}" {origin}, but it is {identity.engine_words}'
    missing = sorted(worker.models - set(identity.names)) if identity.models else []
    if missing:
        yield f"configured but not served: {', '.join(missing)}"
    known = len(worker.seats)
    if identity.ranks is not None and identity.ranks != known:
        yield f"{identity.ranks} DP ranks are behind this URL, and the file has {known}"


def changes(before: Identity, now: Identity) -> Iterator[str]:
    """Yield, a line each, what an engine says otherwise than ``before``, with both."""
    if now.engine != before.engine:
        yield f"it is {now.engine_words} now, and was {before.engine_words}"
    # Adapters come and go while an engine runs.
    if before.bases and now.bases and now.bases != before.bases:
        yield f"it serves {_listed(now.bases)} now, and served {_listed(before.bases)}"
    for word, old, new in (
        ("slots", before.slots, now.slots),
        ("KV tokens", before.kv_capacity_tokens, now.kv_capacity_tokens),
        ("DP ranks", before.ranks, now.ranks),
    ):
        if old is not None and new is not None and old != new:
            yield f"it has {new:,} {word} now, and had {old:,}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
