"""The section of the configuration about closed batches."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from brproxy.config_sections import Seconds
from brproxy.relay.fields import is_field, is_read_or_dropped
from brproxy.validation import Section


def _own_field(name: str) -> str:
    """Refuse a field that has a meaning already: it would not reach the worker any more."""
    if name and not is_field(name.encode(), b"1"):
        msg = 'must be the name of a header field, such as "X-Batch-ID", or empty'
        raise ValueError(msg)
    if is_read_or_dropped(name.lower().encode()):
        msg = f'"{name}" means something else already; choose a name of its own, such as "X-Batch-ID"'
        raise ValueError(msg)
    return name


class Batches(Section):
    """Closed batches, such as rollouts: requests that name the same one go longest first among themselves."""

    header: Annotated[str, AfterValidator(_own_field)] = Field(
        default="X-Batch-ID",
        description="Header field that names a request's batch; workers do not get it. Empty: none does.",
    )
    id_bytes_max: int = Field(default=128, ge=1, le=4096, description="Such a name; beyond: 400 (bytes).")
    batches_max: int = Field(
        default=64,
        ge=1,
        le=65_536,
        description="Batches of each group at once; requests of others are served as they come (batches).",
    )
    prompts_max: int = Field(
        default=65_536,
        ge=1,
        le=1 << 24,
        description="Prompts of a group's batches whose lengths are remembered, beside what the predictor "
        "learns (prompts).",
    )
    kept_s: Seconds = Field(
        default=600.0, description="Since a batch's last request came, that its lengths count (seconds)."
    )
