"""The loads that proxies are compared under, and what one of them measures. Pure."""

from __future__ import annotations

import math
import re

from pydantic import BaseModel, ConfigDict, Field

from brproxy.types import InvalidInputError
from loadgen.report.schema import Document, Percentiles

TOKEN_INTERVAL_MS = 20.0
"""Between two tokens of a paced stream: 50 tokens/s, a fast engine under load."""

STREAMS_MAX = 10_000
"""Of a paced phase: loopback has 28,000 ports, and each stream takes two."""

RAMP_STREAMS_PER_S = 800.0
"""How fast paced streams are opened before the measured part."""

SETTLE_S = 0.75
"""From the last stream's start to the measured part."""

DRAIN_S_MAX = 30.0
"""For what is running at the end of the measured part to finish."""

_PACED = re.compile(r"paced([1-9]\d*)")


class Phase(BaseModel):
    """One kind of load, measured for ``seconds`` after ``warm_s``.

    ``connections`` clients repeat a request of ``tokens`` output tokens, one after the other; if ``once``,
    each sends one, which outlasts the measured part. ``ramp_s``: over which they start. ``interval_ms``:
    between two tokens of a stream, 0: none.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    text: str = Field(description="What it is, for people.")
    unit: str = Field(description="What CPU time is counted per: request, stream or event.")
    stream: bool = True
    once: bool = False
    connections: int
    tokens: int
    interval_ms: float = 0.0
    ramp_s: float = 0.0
    warm_s: float
    seconds: float

    @property
    def offered_per_s(self) -> float | None:
        """Events that the workers send in a second if the proxy takes them; None: as many as it takes."""
        return self.connections * 1000 / self.interval_ms if self.interval_ms else None


def parse_phase(name: str, seconds: float) -> Phase:
    """Return the phase of that name: req, short, unpaced or pacedN; raises InvalidInputError."""
    if match := _PACED.fullmatch(name):
        return _paced(int(match[1]), seconds)
    match name:
        case "req":
            text = "small requests that do not stream, 32 connections; per request"
            return Phase(
                name=name,
                text=text,
                unit="request",
                stream=False,
                connections=32,
                tokens=16,
                warm_s=0.5,
                seconds=seconds,
            )
        case "short":
            text = "streams of 4 tokens, 4 connections; per stream"
            return Phase(
                name=name, text=text, unit="stream", connections=4, tokens=4, warm_s=0.5, seconds=seconds
            )
        case "unpaced":
            text = "64 streams as fast as they go; per event. Bound by the load generator: compare CPU only"
            return Phase(
                name=name, text=text, unit="event", connections=64, tokens=256, warm_s=0.7, seconds=seconds
            )
    raise InvalidInputError(
        f"unknown phase {name!r}; allowed: req, short, unpaced, paced1 to paced{STREAMS_MAX}"
    )


def _paced(streams: int, seconds: float) -> Phase:
    if streams > STREAMS_MAX:
        raise InvalidInputError(f"at most {STREAMS_MAX} paced streams, got {streams}")
    ramp_s = streams / RAMP_STREAMS_PER_S
    warm_s = ramp_s + SETTLE_S
    return Phase(
        name=f"paced{streams}",
        text=f"{streams:,} streams, a token each {TOKEN_INTERVAL_MS:g} ms; per event",
        unit="event",
        once=True,
        connections=streams,
        tokens=math.ceil((warm_s + seconds + SETTLE_S) * 1000 / TOKEN_INTERVAL_MS),
        interval_ms=TOKEN_INTERVAL_MS,
        ramp_s=ramp_s,
        warm_s=warm_s,
        seconds=seconds,
    )


class LoadSpec(BaseModel):
    """What the load client is told: the phase, whom to load, and whose CPU time to read.

    Connections take the ``ports`` of 127.0.0.1 in turn.
    """

    model_config = ConfigDict(frozen=True)

    phase: Phase
    model: str
    ports: tuple[int, ...]
    proxy_pids: tuple[int, ...]
    worker_pids: tuple[int, ...]


class LoadResult(Document):
    """What one load has measured; counts and times are of the measured part, failures of all of it."""

    window_s: float = Field(description="Length of the measured part in seconds.")
    requests: int = Field(description="Requests that ended.")
    events: int = Field(description="Tokens that arrived, each an event of a stream.")
    reads: int = Field(description="Reads in which the client got what it got.")
    proxy_cpu_s: float = Field(description="CPU seconds of the proxy: all its processes, user and system.")
    workers_cpu_s: float = Field(description="CPU seconds of the mock workers.")
    client_cpu_s: float = Field(description="CPU seconds of the load client.")
    rss_bytes: int = Field(description="Most memory that the proxy had resident since its start.")
    first_ms: Percentiles | None = Field(description="From a request to its first token.")
    whole_ms: Percentiles | None = Field(description="From a request to the end of its answer.")
    delay_ms: Percentiles | None = Field(description="From a token's writing in the worker to its arrival.")
    gap_ms: Percentiles | None = Field(description="Between two tokens of a stream.")
    checked: int = Field(description="Requests that ended in the whole load, all as they should have.")
    failures: dict[str, int] = Field(description="Requests of the whole load that did not, by kind.")
    first_failure: str = Field(description="What the first of them was, in words.")

    @property
    def lost(self) -> int:
        """Requests that failed."""
        return sum(self.failures.values())
