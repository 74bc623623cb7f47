"""What the file says of workers beside what their engines say: filled in, and told in words. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from brproxy.config import Config
from brproxy.config_workers import Worker
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


def completed(config: Config, findings: Mapping[str, Finding]) -> Config:
    """Return ``config`` with what it leaves out filled in from ``findings``, by URL.

    What the file itself gave is still told by each worker's ``model_fields_set``.
    """
    workers = [_completed(worker, findings[worker.url].identity) for worker in config.worker]
    return config.model_copy(update={"worker": workers})


def _completed(worker: Worker, identity: Identity | None) -> Worker:
    if identity is None:
        return worker
    slots, kv_tokens = identity.limits(by_rank=by_rank(worker))
    found = {"slots": slots, "kv_capacity_tokens": kv_tokens}
    filled = {
        key: value for key, value in found.items() if value is not None and key not in worker.model_fields_set
    }
    # Not model_copy, which would count them as the file's.
    return Worker.model_construct(worker.model_fields_set, **(dict(worker) | filled))


def told(worker: Worker, identity: Identity) -> str:
    """Return in one line who a worker is and what it holds; ``worker`` is as the file has it."""
    slots, kv_tokens = identity.limits(by_rank=by_rank(worker))
    parts = [identity.engine_words]
    if "slots" in worker.model_fields_set:
        parts.append(f"slots: {worker.slots:,}")
    elif slots is not None:
        parts.append(f"slots: {slots:,} (it says)")
    else:
        parts.append(f"slots: {worker.slots:,} (the default; it does not say)")
    if "kv_capacity_tokens" in worker.model_fields_set:
        parts.append(f"KV capacity: {worker.kv_capacity_tokens:,} tokens")
    elif kv_tokens is not None:
        parts.append(f"KV capacity: {kv_tokens:,} tokens (it says)")
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
