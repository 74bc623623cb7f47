"""Scenario files (TOML): everything that makes a simulation repeatable, and figures to compare it with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from brproxy.validation import Section, load_toml, validate
from loadgen.cluster_settings import DISPATCH_STEPS_MAX, TOKENS_PER_STEP_MAX, ClusterSettings
from loadgen.commands.scenario import Arrivals, PrefillServers, Scenario, WorkloadChoice
from loadgen.emulator.settings import Transfer
from loadgen.report.tables import BEST_BASELINE
from loadgen.traces.synthetic import WORKLOADS

Number = Annotated[float, Field(strict=False)]


class WorkloadSection(Section):
    """Where requests come from."""

    name: str = Field(default="proprietary", description=f"Synthetic workload: {', '.join(WORKLOADS)}.")
    trace: str = Field(
        default="", description="Trace (file or folder) in its place, relative to the scenario file."
    )
    requests_per_worker: int = Field(
        default=1500, ge=1, description="Requests for each worker; of a trace the first so many."
    )
    abort_fraction: Number = Field(
        default=0.0, ge=0, le=1, description="Share of clients that leave, each somewhere in its output."
    )
    epochs: int = Field(
        default=1,
        ge=1,
        le=100,
        description="Passes over the same prompts, with new samples: the last is measured (rollouts).",
    )


class ArrivalsSection(Section):
    """When they arrive."""

    rate: Number | None = Field(
        default=1.1,
        gt=0,
        description="Share of the perfect capacity; a trace may leave it out for its own times.",
    )
    at_once: bool = Field(default=False, description="All at once, a closed batch, in place of a rate.")
    cv: Number = Field(default=1.0, ge=0, le=100, description="Burstiness: 1 is Poisson, more is bursty.")
    trace_speed: Number = Field(default=1.0, gt=0, description="A trace's own times, so many times as fast.")


class ClusterSection(Section):
    """The deployment."""

    workers: int = Field(default=8, ge=1, description="DP workers.")
    slots: int = Field(default=64, ge=1, description="Requests that a worker runs at once.")
    kv_capacity_tokens: int | None = Field(default=None, ge=1, description="KV cache; left out: unlimited.")
    step_base_ms: Number = Field(default=30.0, gt=0, description="t0.")
    step_ns_per_kv_token: Number = Field(default=100.0, ge=0, description="a.")
    prefill_us_per_token: Number = Field(default=0.0, ge=0, description="Added to the step that prefills.")
    prefill_tokens_max: int | None = Field(
        default=None,
        ge=1,
        description="Tokens that a worker prefills in a step at most, those that it decodes included; "
        "left out: whole prompts.",
    )
    decode_factor_under_prefill: Number = Field(
        default=1.0, ge=1, description="Cost of a KV token of a worker that prefills in the same step, in a."
    )
    step_us_per_request: Number = Field(
        default=0.0, ge=0, description="Added to a step for each request of the worker that runs most."
    )
    batch_buckets: list[int] = Field(
        default_factory=list, description="Sizes that this number is padded to; left out: none."
    )
    tokens_per_step: Number = Field(
        default=1.0,
        ge=1,
        le=TOKENS_PER_STEP_MAX,
        description="Mean tokens that a request decodes in a step, 1 to 3 at random (multi-token).",
    )
    slots_each: list[int] = Field(
        default_factory=list, description="Slots of each worker; left out: as `slots`."
    )
    slowness: list[Number] = Field(
        default_factory=list,
        description="How many times as long each worker's KV and prefill tokens take; left out: 1.",
    )
    dispatch_steps: int = Field(
        default=1,
        ge=0,
        le=DISPATCH_STEPS_MAX,
        description="Steps until what is decided takes part (simulated); 0: at once.",
    )


class PrefillSection(Section):
    """Servers that prefill for the deployment.

    ``loadgen compare`` has both sides; ``loadgen simulate`` the prefill side alone, where that shares a
    barrier, and the file's policies are that side's then.
    """

    workers: int = Field(default=4, ge=1, description="Prefill servers.")
    shares_barrier: bool = Field(
        default=False, description="They step together; else each by itself, which is not simulated."
    )
    transfer: Transfer = Field(default=Transfer.NIXL, strict=False, description="How they hand KV over.")
    slots: int = Field(default=4, ge=1, description="Prompts that one prefills in a step.")
    kv_capacity_tokens: int | None = Field(
        default=None, ge=1, description="KV that one keeps; left out: unlimited."
    )
    transfer_ms_per_ktoken: Number = Field(default=5.0, ge=0, description="Time that sending KV takes.")


class PaperRow(Section):
    """A row of a published table, to be shown beside ours: it holds for the file's own deployment."""

    policy: str = Field(description=f"One of the policies, or {BEST_BASELINE!r}.")
    output_tokens_per_s: Number
    imbalance_kv_tokens: Number | None = None
    tpot_ms_p95: Number | None = None


class ScenarioFile(Section):
    """A whole scenario file."""

    title: str = ""
    policies: list[str] = Field(min_length=1)
    predictor: str = "survival"
    seeds: int = Field(default=1, ge=1, le=1000, description="Repetitions, with one seed after another.")
    workload: WorkloadSection = Field(default_factory=WorkloadSection)
    arrivals: ArrivalsSection = Field(default_factory=ArrivalsSection)
    cluster: ClusterSection = Field(default_factory=ClusterSection)
    prefill: PrefillSection | None = None
    paper: list[PaperRow] = Field(default_factory=list)

    def scenario(self, folder: Path, seed: int, workers: int | None, rate: float | None) -> Scenario:
        """Return the scenario for one seed; ``workers`` and ``rate`` replace the file's."""
        cluster = self.cluster
        count = cluster.workers if workers is None else workers
        trace = folder / self.workload.trace if self.workload.trace else None
        return Scenario(
            WorkloadChoice(
                self.workload.name,
                trace,
                self.workload.requests_per_worker * count,
                self.workload.abort_fraction,
                self.workload.epochs,
            ),
            Arrivals(
                rate=self.arrivals.rate if rate is None else rate,
                cv=self.arrivals.cv,
                trace_speed=self.arrivals.trace_speed,
                at_once=self.arrivals.at_once,
            ),
            ClusterSettings(
                workers=count,
                slots=cluster.slots,
                kv_capacity_tokens=cluster.kv_capacity_tokens,
                step_base_s=cluster.step_base_ms / 1e3,
                step_s_per_kv_token=cluster.step_ns_per_kv_token / 1e9,
                prefill_s_per_token=cluster.prefill_us_per_token / 1e6,
                prefill_tokens_max=cluster.prefill_tokens_max,
                dispatch_steps=cluster.dispatch_steps,
                decode_factor_under_prefill=cluster.decode_factor_under_prefill,
                step_s_per_request=cluster.step_us_per_request / 1e6,
                batch_buckets=tuple(cluster.batch_buckets),
                tokens_per_step=cluster.tokens_per_step,
                slots_each=tuple(cluster.slots_each),
                slowness=tuple(cluster.slowness),
            ),
            seed,
            self._prefill_servers(),
        )

    def _prefill_servers(self) -> PrefillServers | None:
        own = self.prefill
        if own is None:
            return None
        return PrefillServers(
            own.workers,
            own.transfer,
            own.slots,
            own.kv_capacity_tokens,
            own.transfer_ms_per_ktoken,
            own.shares_barrier,
        )


def load_scenario(path: Path) -> ScenarioFile:
    """Read and check a scenario file; raises ConfigError, a line for each mistake."""
    return validate(ScenarioFile, load_toml(path), str(path))
