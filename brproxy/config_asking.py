"""Sections of the configuration on what the proxy asks workers: how and who they are, their load, prompts."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from brproxy.config_sections import MIB, Seconds
from brproxy.validation import Section


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
    ejected_share_max: float = Field(
        default=1.0,
        ge=0,
        le=1,
        strict=False,
        description="Share of a group's workers that may be out; with more unhealthy, all may be chosen; "
        "1: off (ratio).",
    )
    slow_start_s: float = Field(
        default=10.0,
        ge=0,
        le=3600,
        strict=False,
        description="In which an empty worker that comes back or joins gets its slots, one first, then "
        "evenly all; 0: at once (seconds).",
    )


class Discovery(Section):
    """What is asked of the engines at start, to fill in what the file leaves out."""

    enabled: bool = Field(
        default=True, description="Ask workers at start for slots and KV capacity; when off, defaults hold."
    )
    timeout_s: float = Field(
        default=5.0,
        gt=0,
        le=600,
        strict=False,
        description="For all of them; who has not answered by then keeps the defaults (seconds).",
    )
    resolve_interval_s: float = Field(
        default=10.0,
        ge=0.1,
        le=86_400,
        strict=False,
        description='Between two look-ups of a host whose addresses are "each" a worker (seconds).',
    )


class Prompts(Section):
    """Prompts counted exactly, beside their requests, which go on by the estimate meanwhile."""

    exact: Literal["off", "engine", "file"] = Field(
        default="off",
        description="Who counts prompts that are text: the \"engine\" (vLLM's and SGLang's /tokenize), a "
        '"file" with the model\'s tokenizer, or nobody ("off").',
    )
    tokenizer: str = Field(
        default="",
        description="The tokenizer.json to count by; it needs `pip install 'brproxy[tokenizer]'`.",
    )
    tokenizer_model: str = Field(
        default="", description="Model that it is of, as requests name it; empty: of all models."
    )
    wait_s: float = Field(
        default=0.0,
        ge=0,
        le=60,
        strict=False,
        description="How long a request may wait for its count before it is given a worker; 0: not at all "
        "(seconds).",
    )
    timeout_s: Seconds = Field(default=2.0, description="For one count (seconds).")
    in_flight_max: int = Field(
        default=16, ge=1, le=4096, description="Prompts counted at the same time; others are not (prompts)."
    )
    per_second_max: int = Field(
        default=200, ge=1, le=1_000_000, description="Prompts counted in a second; others are not (prompts)."
    )
    body_bytes_max: int = Field(
        default=MIB, ge=1024, description="Request whose prompt is counted; longer ones are not (bytes)."
    )
    failures_max: int = Field(
        default=3,
        ge=1,
        le=1000,
        description="Failures in a row after which a worker is not asked for pause_s (failures).",
    )
    pause_s: Seconds = Field(default=30.0, description="That it is then left alone (seconds).")

    @model_validator(mode="after")
    def _has_its_file(self) -> Self:
        if self.exact == "file" and not self.tokenizer:
            msg = 'exact = "file" needs tokenizer, which is not given'
            raise ValueError(msg)
        return self


class TelemetryPolls(Section):
    """What engines say of their load, asked for and taken up beside what is booked."""

    enabled: bool = Field(
        default=True,
        description="Ask engines for their load (vLLM: /metrics, SGLang: /v1/loads) and their LoRA adapters; "
        "when off, what is booked alone decides.",
    )
    interval_s: float = Field(
        default=1.0,
        ge=0.01,
        le=3600,
        strict=False,
        description="Between two questions to a worker (seconds).",
    )
    timeout_s: Seconds = Field(default=2.0, description="For one answer (seconds).")
    in_band: bool = Field(
        default=False,
        description="Ask vLLM for its load with each request too (endpoint-load-metrics-format): it tells it "
        "with answers that are no streams, and logs a line for each.",
    )
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


class FaultTolerance(Section):
    """What is done when a rank of vLLM fails whose peers wait to be told (--enable-fault-tolerance)."""

    enabled: bool = Field(
        default=False,
        description="Be the controller that vLLM's fault tolerance waits for: ask each server of a group how "
        "it stands, and tell those that wait to retry once nobody is healthy.",
    )
    interval_s: float = Field(
        default=1.0,
        ge=0.01,
        le=3600,
        strict=False,
        description="Between two looks at a group (seconds).",
    )
    timeout_s: Seconds = Field(default=2.0, description="For one answer (seconds).")
    recovery_s: Seconds = Field(
        default=120.0,
        description="From the first sign of a fault until it is given up; vLLM's servers stop after 120, or "
        "engine_recovery_timeout_sec (seconds).",
    )
    retries_max: int = Field(
        default=3,
        ge=1,
        le=1000,
        description="Retries until the group has been well for recovery_s (retries).",
    )
    retry_wait_s: float = Field(
        default=2.0,
        ge=0,
        le=3600,
        strict=False,
        description="After a retry has ended, before the next (seconds).",
    )
