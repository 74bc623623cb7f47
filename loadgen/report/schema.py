"""The JSON document that ``run``, ``compare``, ``demo`` and ``simulate`` write with ``--out``.

One object for each policy; a figure that a command cannot know is null. Times are in milliseconds and rates
per second of the deployment's own time: a deployment emulated at four times real time is reported as if it
ran at normal speed.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from brproxy.types import InvalidInputError


class Document(BaseModel):
    """A part of a document, or all of it; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")

    def write(self, path: Path) -> None:
        """Write the document; raises InvalidInputError when that fails."""
        try:
            path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            msg = f"{path}: cannot be written: {error.strerror}"
            raise InvalidInputError(msg) from error


class Percentiles(Document):
    """Mean and percentiles of a latency in milliseconds."""

    mean: float
    p50: float
    p95: float
    p99: float


class PrefillResult(Document):
    """What the workers did that prefill for others, in all of the run; lists are by worker."""

    prefill_tokens: list[int] = Field(description="Prompt tokens that each prefilled.")
    held_tokens_max: list[int] = Field(description="Most KV tokens that each kept to be fetched.")
    kv_capacity_tokens: int | None = Field(description="KV tokens that one has room for; null: unlimited.")
    again: int = Field(description="Prefills that were repeated, as what there was had been lost.")
    expired: int = Field(description="Prefills that waited past their lease for a worker to decode them.")
    failed: int = Field(description="Requests whose KV did not come.")
    lag_s: float = Field(description="How far one's emulation fell behind (s).")

    @property
    def unevenness(self) -> float | None:
        """The most that one prefilled by the mean, 1 if all did the same; None: nothing was prefilled."""
        total = sum(self.prefill_tokens)
        return max(self.prefill_tokens) * len(self.prefill_tokens) / total if total else None


class LearntCosts(Document):
    """What a proxy had learnt of a step's costs by the end of a run, at normal speed."""

    step_base_ms: float
    step_ns_per_kv_token: float
    prefill_us_per_token: float
    prefill_tokens_max: int | None = Field(description="Of a chunk; null: whole prompts, as far as is seen.")


class PolicyResult(Document):
    """What one policy did with the scenario."""

    policy: str
    imbalance_kv_tokens: float | None = Field(description="Time-average of max - min KV tokens of a worker.")
    idle_fraction: float | None = Field(description="Share of the KV work lost waiting at the barrier.")
    throughput_of_perfect: float | None = Field(
        description="Output tokens/s as a share of every slot full and every step at max = mean."
    )
    output_tokens_per_s: float | None = Field(
        description="Decoded (compare: in the steady part; run: in all)."
    )
    tpot_ms_p95: float | None = Field(description="Time per output token after the first, 95th percentile.")
    ttft_ms_p95: float | None = Field(description="Time to first token, from when the request was due.")
    wait_ms_p99: float | None = Field(description="Time from arrival to a slot; only a simulator knows it.")
    requests: int = Field(description="Requests of the whole run.")
    lost: int = Field(description="Requests that failed, for whatever reason.")
    mean_kv_tokens: float | None = Field(
        default=None, description="Time-average of the mean KV tokens of a worker."
    )
    prefill_balance: float | None = Field(
        default=None, description="Mean over most prompt tokens of a worker, over the steps that prefill any."
    )
    preemptions: float | None = Field(
        default=None, description="Requests pushed back by full KV caches in the whole run (mean over seeds)."
    )
    makespan_s: float | None = Field(
        default=None, description="From the first arrival to the last answer: the figure of a closed batch."
    )
    makespan_of_packed: float | None = Field(
        default=None, description="The same as a multiple of what a perfect packing takes."
    )
    ttft_ms_p50: float | None = Field(default=None, description="Time to first token, median.")
    failures: dict[str, int] = Field(default_factory=dict, description="Lost requests by kind.")
    ttft_ms: Percentiles | None = None
    tpot_ms: Percentiles | None = None
    itl_ms: Percentiles | None = None
    e2e_ms: Percentiles | None = None
    goodput_requests_per_s: float | None = Field(
        default=None, description="Requests that met every SLO, per second."
    )
    intervals: dict[str, float] = Field(
        default_factory=dict, description="Half-widths of 95 % confidence intervals over seeds, by figure."
    )
    by_seed: dict[str, list[float]] = Field(
        default_factory=dict,
        description="Figures of each seed, in order; policies meet the same requests, so they pair.",
    )
    prefill: PrefillResult | None = Field(
        default=None, description="The prefill side, where that is apart; all else is of the decode side."
    )
    learnt: LearntCosts | None = Field(
        default=None, description="compare: what the proxy took a step to cost; null: it had learnt nothing."
    )
    late_share: float | None = Field(
        default=None, description="compare: how late emulated steps ended, by how long they took."
    )
    warnings: list[str] = Field(default_factory=list, description="Why figures may not be trusted.")


class Report(Document):
    """A scenario, and what each policy did with it."""

    scenario: dict[str, str | int | float | None]
    policies: list[PolicyResult]
    simulated: list[PolicyResult] = Field(
        default_factory=list, description="compare: what the simulator says of the same policies, in order."
    )
