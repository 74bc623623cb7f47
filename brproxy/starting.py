"""Starting from URLs alone: a configuration from what the engines there say, in memory or as a file."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from brproxy.config import Config, parse_config
from brproxy.config_workers import Worker
from brproxy.discovery import find_out
from brproxy.findings import FILLED_IN, Finding, completed, rank_words
from brproxy.first_file import entries, file_text
from brproxy.types import InvalidInputError

log = logging.getLogger(__name__)

_SOURCE = "command line"


class NoEngineError(InvalidInputError):
    """No engine answers at any of the URLs."""


def of_urls(urls: Iterable[str]) -> Config:
    """Return a configuration that knows of workers only where they are; raises ConfigError."""
    return parse_config({"worker": [{"url": url} for url in urls]}, _SOURCE)


async def found_at(asked: Config) -> Config:
    """Return a configuration of the engines that answer at the URLs of ``asked``; logs a line for each.

    Raises NoEngineError where none does. What they hold is what they say, as with a file that leaves it out.
    """
    found = await find_out(asked)
    findings = list(found.values())
    for finding in findings:
        if finding.identity is None:
            log.warning("left out: %s", finding_line(finding))
        else:
            log.info("%s", finding_line(finding))
    _refuse_if_none(findings)
    tables = [
        {key: value for key, value in entry.keys.items() if key not in FILLED_IN}
        for entry in entries(findings)
    ]
    config = parse_config({"worker": tables}, _SOURCE)
    return config.model_copy(update={"worker": completed(config.worker, found)})


def finding_line(finding: Finding) -> str:
    """Return what is known of a URL, in one line."""
    identity = finding.identity
    if identity is None:
        return f"{finding.url}: FAILED: {finding.failure}"
    slots = f"not told, {Worker.model_fields['slots'].default} assumed"
    if identity.engine == "vllm":
        slots += " (its --max-num-seqs)"
    kv_tokens = identity.kv_capacity_tokens
    parts = [
        identity.engine_words,
        f"slots: {slots if identity.slots is None else f'{identity.slots:,}'}",
        f"KV capacity: {'not told' if kv_tokens is None else f'{kv_tokens:,} tokens'}",
        *rank_words(identity),
        f"models: {', '.join(identity.names) or 'none reported'}",
    ]
    return f"{finding.url}: {'; '.join(parts)}"


def refuse_to_overwrite(path: Path, *, force: bool) -> None:
    """Raise InvalidInputError where ``path`` is there and may not be overwritten."""
    if path.exists() and not force:
        msg = f"{path}: is there already; --force overwrites it, --out writes another file"
        raise InvalidInputError(msg)


def write_first_file(path: Path, findings: Sequence[Finding], *, force: bool) -> None:
    """Write the configuration; raises NoEngineError, or InvalidInputError where it cannot be written."""
    _refuse_if_none(findings)
    text = file_text(findings)
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        msg = f"{path}: cannot be written: {error.strerror}"
        raise InvalidInputError(msg) from error


def _refuse_if_none(findings: Sequence[Finding]) -> None:
    if all(finding.identity is None for finding in findings):
        msg = "no engine answers at any of the URLs; give those that vLLM or SGLang listens on"
        raise NoEngineError(msg)
