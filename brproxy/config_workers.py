"""The workers of the configuration file, each by itself and beside the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from brproxy.engines.dialect import DIALECTS
from brproxy.origins import read_origin
from brproxy.registry import Registry, UnknownNameError
from brproxy.types import InvalidInputError
from brproxy.validation import Disagreement, Section


def known_name(registry: Registry[Any]) -> AfterValidator:
    """Return a validator that takes the names of ``registry`` only."""

    def check(name: str) -> str:
        try:
            registry.get(name)
        except UnknownNameError as error:
            raise ValueError(str(error)) from error
        return name

    return AfterValidator(check)


def _origin(url: str) -> str:
    """Check a worker's URL and return it as it goes over the wire, without a trailing slash."""
    try:
        return read_origin(url).url
    except InvalidInputError as error:
        raise ValueError(str(error)) from error


class Worker(Section):
    """One DP rank behind a port of its own."""

    url: Annotated[str, AfterValidator(_origin)] = Field(
        description='Where the worker listens, as "http://host:port".'
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
        default=64, ge=1, le=1 << 20, description="Most requests that it runs at once (vLLM: --max-num-seqs)."
    )
    kv_capacity_tokens: int | None = Field(
        default=None,
        ge=1,
        description="KV cache size (tokens); left out: what the engine says, without it not watched.",
    )
    engine: Annotated[str, known_name(DIALECTS)] = Field(
        default="vllm", description="What the worker speaks."
    )

    @property
    def label(self) -> str:
        """The name, or host and port."""
        return self.name or urlsplit(self.url).netloc

    @property
    def models(self) -> frozenset[str]:
        """The models as a set; empty for any."""
        return frozenset([self.model] if isinstance(self.model, str) else self.model) - {""}


def disagreements(workers: Sequence[Worker]) -> Iterator[Disagreement]:
    """Yield what is wrong with workers beside others; each is compared with the first that is like it."""
    by_url: dict[str, int] = {}
    by_label: dict[str, int] = {}
    by_group: dict[str, int] = {}
    for i, worker in enumerate(workers):
        same_url = by_url.setdefault(worker.url, i)
        same_label = by_label.setdefault(worker.label, i)
        first = workers[by_group.setdefault(worker.group, i)]
        if same_url != i:
            text = f"{worker.url!r} is worker[{same_url}]'s already; each worker must have its own"
            yield Disagreement((i, "url"), text)
        # Without a name it is the URL's: then one of the two says it.
        if same_label != i and (worker.name or workers[same_label].url != worker.url):
            text = f"{worker.label!r} is worker[{same_label}]'s already; each worker must have its own"
            yield Disagreement((i, "name"), text)
        if worker.models != first.models or worker.engine != first.engine:
            text = (
                f"group {worker.group!r} has workers with different models or engines; "
                "the workers of a group must agree, others belong in a group of their own"
            )
            yield Disagreement((i,), text)
