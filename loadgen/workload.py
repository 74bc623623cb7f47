"""A workload: the requests that a trace or a synthetic law describes, in order of arrival."""

from __future__ import annotations

from dataclasses import dataclass

from brproxy.types import InvalidInputError


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a workload.

    ``arrival_s`` counts from the workload's start. Requests with the same ``prompt_key`` send the same
    prompt text; None means a text of its own. Prompts with the same ``prefix_key`` begin alike. Its client
    leaves once ``aborted_after_tokens`` of the output are decoded; None: it stays. ``user``: who asks, ""
    if nobody knows. ``batch``: the closed batch that it says to be of, "" for none. Raises
    InvalidInputError on counts that no engine could serve.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prompt_key: int | None = None
    prefix_key: int | None = None
    aborted_after_tokens: int | None = None
    user: str = ""
    batch: str = ""

    def __post_init__(self) -> None:
        """Check ranges here, so that every trace format reports them alike."""
        if not self.arrival_s >= 0:
            msg = f"arrival_s must be at least 0, got {self.arrival_s}"
            raise InvalidInputError(msg)
        if self.prompt_tokens < 1:
            msg = f"prompt_tokens must be at least 1, got {self.prompt_tokens}"
            raise InvalidInputError(msg)
        if self.output_tokens < 1:
            msg = f"output_tokens must be at least 1, got {self.output_tokens}"
            raise InvalidInputError(msg)
        aborted = self.aborted_after_tokens
        if aborted is not None and not 1 <= aborted <= self.output_tokens:
            msg = f"aborted_after_tokens must be 1 to {self.output_tokens}, the output, got {aborted}"
            raise InvalidInputError(msg)

    @property
    def decoded_tokens(self) -> int:
        """Return the output tokens that are decoded before its client leaves, or all of them."""
        return self.output_tokens if self.aborted_after_tokens is None else self.aborted_after_tokens


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests sorted by ``arrival_s``, and the name they are reported under. Never empty."""

    name: str
    requests: tuple[TraceRequest, ...]

    def __post_init__(self) -> None:
        """Refuse what no run could report on."""
        if not self.requests:
            msg = f"workload {self.name!r} has no requests; at least one is needed"
            raise InvalidInputError(msg)
