"""Sections of the configuration that stand alone: listening, admin, limits, time-outs, logs."""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from brproxy.validation import Section

MIB = 1 << 20
HOSTS_MAX = 64
COMMENTS_S_MIN = 0.02
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

    host: str | list[str] = Field(
        default="127.0.0.1",
        description='Address or name to listen on, or a list of them; "" or "::": all addresses, IPv4 and '
        "IPv6.",
    )
    port: int = Field(
        default=8080, ge=0, le=65535, description="TCP port, the same on all addresses; 0 takes a free one."
    )
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

    @property
    def hosts(self) -> list[str]:
        """The hosts as a list, never empty."""
        return [self.host] if isinstance(self.host, str) else self.host

    @field_validator("host", mode="after")
    @classmethod
    def _names_some(cls, host: str | list[str]) -> str | list[str]:
        if not isinstance(host, str) and not 1 <= len(host) <= HOSTS_MAX:
            msg = f"must have 1 to {HOSTS_MAX} addresses, not {len(host)}"
            raise ValueError(msg)
        return host

    @field_validator("tls_key_file", mode="after")
    @classmethod
    def _key_has_a_certificate(cls, key: str, info: ValidationInfo) -> str:
        # Else whoever forgot the certificate would serve plain HTTP without a word.
        if key and info.data.get("tls_certificate_file") == "":
            msg = "needs tls_certificate_file, which is not given"
            raise ValueError(msg)
        return key


class Forwarding(Section):
    """What workers are told of the client and of this proxy."""

    x_forwarded: Literal["append", "replace", "off"] = Field(
        default="append",
        description="X-Forwarded-For (the client's address) and X-Forwarded-Proto: append to what the client "
        "says, replace it (this proxy is the first), or off: what it says passes.",
    )
    via: bool = Field(default=True, description="Name this proxy in the Via field of requests.")


class Admin(Section):
    """The admin API, on a listener of its own: who may reach it may take workers away."""

    enabled: bool = Field(default=False, description="Listen for the admin API.")
    host: str = Field(
        default="127.0.0.1", min_length=1, description="Address to listen on; without a token a loopback one."
    )
    port: int = Field(default=9090, ge=0, le=65535, description="TCP port; 0 takes a free one.")
    token: str = Field(
        default="",
        max_length=4096,
        repr=False,
        description="Bearer token that clients show; empty: none.",
    )
    token_file: str = Field(default="", description="File that has the token instead, read at start.")

    @model_validator(mode="after")
    def _is_guarded(self) -> Self:
        # Of the whole table, so that no message shows the token.
        if self.token and self.token_file:
            msg = "token and token_file are both given; one of them has the token"
            raise ValueError(msg)
        if self.token and not is_token(self.token):
            msg = "token must be printable ASCII without spaces"
            raise ValueError(msg)
        if not (self.token or self.token_file or _is_loopback(self.host)):
            msg = f"host {self.host!r} needs token or token_file; without one it must be a loopback address"
            raise ValueError(msg)
        return self


def is_token(text: str) -> bool:
    """Tell whether ``text`` can stand in a header field as a bearer token."""
    return text.isascii() and text.isprintable() and bool(text) and " " not in text


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


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
    kv_growth_share: float = Field(
        default=0.015,
        ge=0,
        le=0.5,
        strict=False,
        description="Share of a worker's KV capacity that is left free when requests leave the pool, beside "
        "what those that run are expected to grow into, so that the engine need not preempt; 0: neither is "
        "(ratio).",
    )
    retry_after_s: int = Field(
        default=1, ge=0, le=3600, description="Retry-After of the proxy's own 429 and 503 (seconds)."
    )
    retries_max: int = Field(
        default=2,
        ge=0,
        le=64,
        description="Other workers tried when one fails before its first byte (workers).",
    )
    failovers_max: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Times that a stream of /v1/completions goes on at another worker if one dies after its "
        "first byte, where that is exact (failovers); 0: such a stream ends with an error.",
    )
    kept_text_bytes_max: int = Field(
        default=MIB,
        ge=1024,
        description="Text of a stream that may go on at another worker; a longer one does not (bytes).",
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
        default=1024, ge=0, description="Idle connections kept to each worker's URL (connections)."
    )
    header_bytes_max: int = Field(
        default=32_768,
        ge=1024,
        le=MIB,
        description="Header line, of requests (beyond: 431) and responses (bytes).",
    )
    header_fields_max: int = Field(
        default=128, ge=16, le=10_000, description="Header fields of a request; beyond: 431 (fields)."
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
    paused_s_max: float = Field(
        default=600.0,
        ge=0,
        le=86_400,
        strict=False,
        description="How long beyond first_byte_s or stall_s a silent response is kept while the worker's "
        "telemetry says that its engine has the request (waiting, preempted or paused); 0: not at all "
        "(seconds).",
    )
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
    client_linger_s: Seconds = Field(
        default=10.0,
        description="For the rest of a request that was answered before it had come, so that the client can "
        "read the answer (seconds).",
    )
    keepalive_comments_s: float = Field(
        default=0.0,
        ge=0,
        le=3600,
        strict=False,
        description="Between two comments to a client whose stream has not begun, which keep its connection; "
        "0: none. Errors that come then are events of a stream (seconds).",
    )
    retry_wait_s: Seconds = Field(
        default=0.05,
        description="Before a request moves to another worker; twice that before it moves again, and so on "
        "(seconds).",
    )
    retry_wait_s_max: Seconds = Field(default=1.0, description="The longest such wait (seconds).")
    drain_delay_s: float = Field(
        default=0.0,
        ge=0,
        le=3600,
        strict=False,
        description="After SIGTERM, that /ready says so and new requests are still served (seconds).",
    )
    drain_s: Seconds = Field(
        default=30.0,
        description="For running requests to finish, after that delay; also for those of a group that a "
        "reload removes (seconds).",
    )

    @field_validator("keepalive_comments_s", mode="after")
    @classmethod
    def _comments_are_rare(cls, seconds: float) -> float:
        if 0 < seconds < COMMENTS_S_MIN:
            msg = f"must be 0 or at least {COMMENTS_S_MIN:g}"
            raise ValueError(msg)
        return seconds


class PrefillDecode(Section):
    """Requests that one worker prefills and another decodes (``role`` of workers)."""

    split_prompt_tokens_min: int = Field(
        default=0,
        ge=0,
        description="Prompts below that are prefilled by the worker that decodes them, where it can and has "
        "room (tokens); 0: none.",
    )
    shares_barrier: bool = Field(
        default=False,
        description="Whether the prefill workers of a group share a barrier (DP attention): whole prompts "
        "wait for a step to end and then go together, equal tokens to each, by the policy "
        '"prefill-in-step" in place of routing.prefill_policy. With chunked prefill '
        "(costs.prefill_tokens_max) nobody waits.",
    )
    lease_s: float = Field(
        default=0.0,
        ge=0,
        le=86_400,
        strict=False,
        description="How long a prefill worker keeps what it has prefilled: a request that has waited longer "
        "for a worker is prefilled again (seconds); 0: as the transfer says, 25 for vLLM's NIXL.",
    )
    recomputed_max: int = Field(
        default=8,
        ge=0,
        le=64,
        description="Times that a request is prefilled again because its decode worker ran out of KV cache "
        '(vllm-ascend\'s "recomputed"); beyond: an error (times).',
    )
    free_at_once_max: int = Field(
        default=64,
        ge=0,
        le=4096,
        description="Prompts of clients that have left which prefill workers are told to free at the same "
        "time; others stay until their lease ends (requests).",
    )
    finish_prefill_s: float = Field(
        default=1.0,
        ge=0,
        le=3600,
        strict=False,
        description="Where a client leaves during a prefill, how long that is waited for, so that what it "
        "leaves can be freed, before it is ended (seconds).",
    )
    free_timeout_s: Seconds = Field(default=5.0, description="Limit for telling it (seconds).")
    metaserver_url: str = Field(
        default="",
        max_length=2048,
        description='Where decode workers reach this proxy, as "http://host:port", for the transfer '
        '"ascend-layerwise"; empty: listen.host and listen.port.',
    )


class Estimate(Section):
    """How load is estimated before and between reports of usage."""

    bytes_per_token: float = Field(
        default=4.0,
        ge=0.5,
        le=16,
        strict=False,
        description="UTF-8 bytes of letters in a prompt token before a model has learnt; other text in "
        "proportion (bytes).",
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
