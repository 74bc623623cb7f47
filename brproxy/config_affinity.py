"""The section of the configuration about sessions."""

from __future__ import annotations

from pydantic import Field

from brproxy.config_sections import Seconds
from brproxy.validation import Section


class Affinity(Section):
    """Sessions, and what workers have cached of them: a request is less load where its beginning is."""

    enabled: bool = Field(
        default=False,
        description="Remember who served a session (session_id, X-Session-ID, previous_response_id), for the "
        "policies br-0, br-h and least-kv.",
    )
    by_messages: bool = Field(
        default=False,
        description="Know conversations that nobody names by their messages, all of which are hashed.",
    )
    sessions_max: int = Field(
        default=65_536, ge=1, le=1 << 24, description="Sessions remembered for each group (sessions)."
    )
    kept_s: Seconds = Field(
        default=600.0, description="Since a session's last request, that its cache counts (seconds)."
    )
    block_tokens: int = Field(
        default=16,
        ge=1,
        le=65_536,
        description="Block of the prefix cache: whole ones are found (tokens).",
    )
    discount: float = Field(
        default=1.0,
        gt=0,
        le=16,
        strict=False,
        description="Load that a cached token outweighs: by so much a session's worker may be above the "
        "least loaded one (KV tokens).",
    )
