"""Sections of the configuration that stand alone: listening, limits, time-outs, checks, telemetry, logs."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from brproxy.validation import Section

MIB = 1 << 20
Seconds = Annotated[float, Field(gt=0, le=86_400, strict=False)]
_WEB_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+")


def _web_origin(origin: str) -> str:
    """Check the origin of a web page (RFC 6454), and return it as browsers write it."""
    if not _WEB_ORIGIN.fullmatch(origin.lower()):
        msg = 'must be like "https://host:port", without a path, or "*"'
        raise ValueError(msg)
    return origin.lower()


class Listen(Section):
    """Where the proxy listens."""

    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(default=8080, ge=0, le=65535, description="TCP port; 0 takes a free one.")
    backlog: int = Field(
        default=1024, ge=1, description="Connections that may wait to be accepted (connections)."
    )
    accepts_per_turn: int = Field(
        default=32,
        ge=1,
        le=256,
        description="Connections accepted in one turn of the event loop: that many descriptors listen "
        "(connections).",
    )
    tls_certificate_file: str = Field(
        default="", description="Certificate chain (PEM): clients speak HTTPS; empty: plain HTTP."
    )
    tls_key_file: str = Field(
        default="", description="Its private key (PEM); empty: the certificate's file has it too."
    )
    cors_origins: list[Annotated[str, AfterValidator(_web_origin)]] = Field(
        default_factory=list,
        max_length=1024,
        description='Web origins whose pages may read what the proxy itself answers; ["*"]: all.',
    )

    @field_validator("tls_key_file", mode="after")
    @classmethod
    def _key_has_a_certificate(cls, key: str, info: ValidationInfo) -> str:
        # Else whoever forgot the certificate would serve plain HTTP without a word.
        if key and info.data.get("tls_certificate_file") == "":
            msg = "needs tls_certificate_file, which is not given"
            raise ValueError(msg)
        return key


class Limits(Section):
    """What bounds memory and work."""

    requests_max: int = Field(default=65_536, ge=1, description="Requests in the proxy at once (requests).")
    client_connections_max: int = Field(
        default=65_536,
        ge=1,
        description="Clients connected at once, idle ones too; fewer where files are short (connections).",
    )
    pool_requests_max: int = Field(
        default=4096, ge=1, description="Requests that wait in a group's pool; beyond: 429 (requests)."
    )
    pool_wait_s_max: Seconds = Field(default=60.0, description="Time in the pool; beyond: 503 (seconds).")
    retry_after_s: int = Field(
        default=1, ge=0, le=3600, description="Retry-After of the proxy's own 429 and 503 (seconds)."
    )
    retries_max: int = Field(
        default=2,
        ge=0,
        le=64,
        description="Other workers tried when one fails before its first byte (workers).",
    )
    body_bytes_max: int = Field(default=64 * MIB, ge=1024, description="Request body; beyond: 413 (bytes).")
    bodies_bytes_max: int = Field(
        default=1024 * MIB,
        ge=1024,
        description="Bodies of all requests together, until they are answered; beyond: 429 (bytes).",
    )
    upload_bytes_max: int = Field(
        default=4096 * MIB,
        ge=1024,
        description="Upload that is no JSON and is passed on as it comes; beyond: 413 (bytes).",
    )
    idle_connections_max: int = Field(
        default=1024, ge=0, description="Idle connections kept to each worker (connections)."
    )
    header_bytes_max: int = Field(
        default=32_768, ge=1024, le=MIB, description="Header line, of requests and responses (bytes)."
    )
    event_bytes_max: int = Field(
        default=MIB, ge=1024, description="Server-sent event; a longer one passes without being read (bytes)."
    )
    response_parse_bytes_max: int = Field(
        default=8 * MIB, ge=1024, description="JSON reply; a longer one passes without being read (bytes)."
    )
    control_bytes_max: int = Field(
        default=4 * MIB,
        ge=1024,
        description="A worker's answer to the proxy itself, as its models; beyond: a failure (bytes).",
    )
    models_kept_s: float = Field(
        default=5.0,
        ge=0,
        le=3600,
        strict=False,
        description="That an answer to /v1/models is kept for clients with the same credentials (seconds).",
    )
    models_max: int = Field(
        default=64, ge=1, description="Models whose token ratios are remembered (models)."
    )


class Timeouts(Section):
    """How long the proxy waits for others."""

    connect_s: Seconds = Field(default=2.0, description="For a connection to a worker (seconds).")
    first_byte_s: Seconds = Field(
        default=600.0, description="For a worker's response to begin, prefill included (seconds)."
    )
    stall_s: Seconds = Field(default=120.0, description="Between two reads of a response (seconds).")
    gone_s: Seconds = Field(
        default=5.0,
        description="Silence on its connections that makes a worker that refuses new ones gone (seconds).",
    )
    keepalive_s: Seconds = Field(
        default=3.0,
        description="That an idle worker connection is kept; engines close theirs at 5 (seconds).",
    )
    client_keepalive_s: Seconds = Field(
        default=75.0, description="That an idle client connection is kept (seconds)."
    )
    client_head_s: Seconds = Field(
        default=60.0, description="For a client to send the head of a request (seconds)."
    )
    client_stall_s: Seconds = Field(
        default=30.0, description="Between two pieces of a request's body (seconds)."
    )
    client_body_s: Seconds = Field(default=1800.0, description="For the whole of a request's body (seconds).")
    retry_wait_s: Seconds = Field(
        default=0.05,
        description="Before a request moves to another worker; twice that before it moves again, and so on "
        "(seconds).",
    )
    retry_wait_s_max: Seconds = Field(default=1.0, description="The longest such wait (seconds).")
    drain_s: Seconds = Field(
        default=30.0, description="For running requests to finish after SIGTERM (seconds)."
    )


class HealthChecks(Section):
    """Active health checks of every worker."""

    enabled: bool = Field(default=True, description="Check workers; when off, all count as healthy.")
    path: str = Field(
        default="", pattern=r"^(/[!-~]*)?$", description="Path that must answer 2xx; empty: the engine's own."
    )
    interval_s: Seconds = Field(default=2.0, description="Between two checks of a worker (seconds).")
    timeout_s: Seconds = Field(default=2.0, description="For one check (seconds).")
    unhealthy_after: int = Field(
        default=3, ge=1, le=1000, description="Failures in a row that take a worker out."
    )
    healthy_after: int = Field(
        default=1, ge=1, le=1000, description="Successes in a row that bring a worker back."
    )


class TelemetryPolls(Section):
    """What engines say of their load, asked for and taken up beside what is booked."""

    enabled: bool = Field(
        default=True,
        description="Ask engines for their load (vLLM: /metrics, SGLang: /v1/loads); when off, what is "
        "booked alone decides.",
    )
    interval_s: float = Field(
        default=1.0,
        ge=0.01,
        le=3600,
        strict=False,
        description="Between two questions to a worker (seconds).",
    )
    timeout_s: Seconds = Field(default=2.0, description="For one answer (seconds).")
    lag_s: float = Field(
        default=6.0,
        ge=0,
        le=60,
        strict=False,
        description="Age that an engine's figures may have under load: what was booked within it explains "
        "them (seconds).",
    )
    stale_s: Seconds = Field(
        default=10.0, description="After the last answer, until what it said begins to fade (seconds)."
    )
    half_life_s: Seconds = Field(
        default=10.0, description="In which what an old answer said fades by half (seconds)."
    )


class Estimate(Section):
    """How load is estimated before and between reports of usage."""

    bytes_per_token: float = Field(
        default=4.0,
        ge=0.5,
        le=16,
        strict=False,
        description="UTF-8 bytes of a prompt token before a model's ratio is learnt (bytes).",
    )
    ask_usage: bool = Field(
        default=True,
        description="Ask workers for usage in streams whose client did not; the extra chunk is taken out.",
    )


class Log(Section):
    """Logging, to standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least level.")
    format: Literal["text", "json"] = Field(
        default="text", description="One line of text or one JSON object each."
    )
