"""Builds what has prompts counted beside their requests, where the configuration asks for it."""

from __future__ import annotations

from pathlib import Path

from brproxy.clock import Clock
from brproxy.config import Config
from brproxy.estimate import TokenEstimator
from brproxy.prompt_counts import Gate, Pauses
from brproxy.proxy.counting import Counting, EngineSource, FileSource, Source
from brproxy.proxy.groups import Groups
from brproxy.relay.endpoint import Endpoint
from brproxy.tokenizer_file import load_tokenizer


def build_counting(
    config: Config, groups: Groups, estimator: TokenEstimator, clock: Clock
) -> Counting | None:
    """Return what counts for ``groups``, None where nobody does; raises InvalidInputError."""
    own = config.prompts
    source: Source | None = None
    if own.exact == "engine":
        pauses: Pauses[Endpoint] = Pauses(own.failures_max, own.pause_s)
        source = EngineSource(clock, pauses, own.timeout_s, config.limits.control_bytes_max)
    elif own.exact == "file":
        tokenizer = load_tokenizer(Path(own.tokenizer))
        source = FileSource(tokenizer, own.tokenizer_model, estimator, own.timeout_s)
    if source is None:
        return None
    gate = Gate(own.in_flight_max, own.per_second_max)
    counting = Counting(source, gate, estimator, clock, wait_s=own.wait_s, body_bytes_max=own.body_bytes_max)
    groups.follow_all(counting)
    return counting
