"""A scenario: a deployment, a workload, and how its requests arrive."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from brproxy.types import InvalidInputError
from loadgen.arrivals import at_once, faster, with_aborts, with_gamma_arrivals
from loadgen.capacity import Capacity, perfect_capacity
from loadgen.cluster_settings import ClusterSettings
from loadgen.emulator.settings import Transfer
from loadgen.traces.servegen import load_servegen
from loadgen.traces.synthetic import other_epochs, synthetic_workload
from loadgen.traces.trace_format import load_trace
from loadgen.workload import Workload


@dataclass(frozen=True, slots=True)
class WorkloadChoice:
    """Where requests come from: a trace (a file, or a folder of clients), or a synthetic law by name.

    ``requests``: the first so many; None: all, of a trace. ``abort_fraction`` of them are aborted by
    their clients, each somewhere in its output. ``epochs``: what runs is the last of so many passes over the
    same prompts. ``prompts_only``: each ends with its first token.
    """

    name: str = "short"
    trace: Path | None = None
    requests: int | None = 2000
    abort_fraction: float = 0.0
    epochs: int = 1
    prompts_only: bool = False

    def load(self, rng: np.random.Generator) -> tuple[Workload, bool]:
        """Return the requests, and whether they have arrival times; raises InvalidInputError."""
        workload, has_times = self._load(rng)
        if self.prompts_only:
            first_token = tuple(replace(request, output_tokens=1) for request in workload.requests)
            workload = replace(workload, requests=first_token)
        return workload, has_times

    def _load(self, rng: np.random.Generator) -> tuple[Workload, bool]:
        if self.requests is not None and self.requests < 1:
            msg = f"requests must be at least 1, got {self.requests}"
            raise InvalidInputError(msg)
        if self.trace is not None:
            if self.trace.is_dir():
                loaded = load_servegen(self.trace, self.requests, rng)
            else:
                loaded = load_trace(self.trace, self.requests)
            return loaded.workload, loaded.has_times
        if self.requests is None:
            msg = "a synthetic workload needs a number of requests: give --requests"
            raise InvalidInputError(msg)
        return synthetic_workload(self.name, self.requests, rng), False

    def earlier_epochs(self, rng: np.random.Generator) -> list[Workload]:
        """Return the epochs before, where there are any, with ``rng`` as for ``load``."""
        if self.epochs > 1 and (self.trace is not None or self.requests is None):
            raise InvalidInputError("epochs are of a synthetic workload; leave out the trace, or the epochs")
        return other_epochs(self.name, self.requests or 0, rng, self.epochs - 1)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When requests arrive; the first of these that is given decides.

    ``at_once``: all together, a closed batch; ``requests_per_s``; ``rate``, as a share of the perfect
    capacity; else the trace's own times, ``trace_speed`` times as fast. ``cv``: coefficient of variation of
    the gaps, 1 is Poisson.
    """

    requests_per_s: float | None = None
    rate: float | None = None
    cv: float = 1.0
    trace_speed: float = 1.0
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class PrefillServers:
    """So many ``servers`` that prefill for a deployment which then only decodes, each by itself.

    They prefill up to ``slots`` prompts in a step, at the deployment's ``prefill_s_per_token``, keep
    ``kv_capacity_tokens`` (None: unlimited) until it is fetched, and send it at ``transfer_ms_per_ktoken``.
    ``shares_barrier``: they are one group that steps together, which only a simulation knows.
    """

    servers: int = 4
    transfer: Transfer = Transfer.NIXL
    slots: int = 4
    kv_capacity_tokens: int | None = None
    transfer_ms_per_ktoken: float = 5.0
    shares_barrier: bool = False

    def __post_init__(self) -> None:
        """Refuse none, and the one form in which workers must know the proxy's port before it has one."""
        if self.servers < 1:
            raise InvalidInputError(f"prefill workers must be at least 1, got {self.servers}")
        if self.transfer == Transfer.ASCEND_LAYERWISE:
            msg = f"the transfer {self.transfer} cannot be compared: its workers ask the proxy, at a port"
            raise InvalidInputError(f"{msg} that must be known before; choose another")


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything that makes a run repeatable; ``prefill`` None: the cluster prefills for itself.

    ``transfer_s_per_token``: what comes between a request's last step here and its first token.
    """

    workload: WorkloadChoice = field(default_factory=WorkloadChoice)
    arrivals: Arrivals = field(default_factory=Arrivals)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    seed: int = 0
    prefill: PrefillServers | None = None
    transfer_s_per_token: float = 0.0

    def prefill_side(self) -> Scenario:
        """Return the prefill workers alone, one group: each request ends when its KV is sent.

        A scenario without any is returned as it is.
        """
        own = self.prefill
        if own is None:
            return self
        cluster = replace(
            self.cluster,
            workers=own.servers,
            slots=own.slots,
            kv_capacity_tokens=own.kv_capacity_tokens,
            # What is held for others costs a step nothing.
            step_s_per_kv_token=0.0,
        )
        return replace(
            self,
            workload=replace(self.workload, prompts_only=True),
            cluster=cluster,
            prefill=None,
            transfer_s_per_token=own.transfer_ms_per_ktoken / 1e6,
        )

    def draw(self) -> tuple[Workload, Capacity]:
        """Return the requests with their arrival times, and the deployment's perfect capacity.

        Raises InvalidInputError.
        """
        rng = np.random.default_rng(self.seed)
        workload, has_times = self.workload.load(rng)
        if self.workload.abort_fraction:
            # Drawn apart, so that who leaves changes nothing of what was asked.
            workload = with_aborts(
                workload, self.workload.abort_fraction, np.random.default_rng((self.seed, 1))
            )
        self._check_room(workload)
        prefills = self.prefill is None
        decoding = self.cluster if prefills else replace(self.cluster, prefill_s_per_token=0.0)
        capacity = perfect_capacity(workload, decoding)
        if self.arrivals.at_once:
            return at_once(workload), capacity
        rate_per_s = self.arrivals.requests_per_s
        if rate_per_s is None and self.arrivals.rate is not None:
            rate_per_s = self.arrivals.rate * capacity.requests_per_s
        if rate_per_s is not None:
            return with_gamma_arrivals(workload, rate_per_s, self.arrivals.cv, rng), capacity
        if not has_times:
            msg = f"workload {workload.name!r} has no arrival times: give --requests-per-s"
            raise InvalidInputError(msg)
        return faster(workload, self.arrivals.trace_speed), capacity

    def earlier_epochs(self) -> list[Workload]:
        """Return what ran before, from which a predictor knows the prompts; raises InvalidInputError."""
        epochs = self.workload.earlier_epochs(np.random.default_rng(self.seed))
        if epochs and not self.arrivals.at_once:
            raise InvalidInputError("epochs follow each other as closed batches; set arrivals.at_once")
        for workload in epochs:
            self._check_room(workload)
        return [at_once(workload) for workload in epochs]

    def _check_room(self, workload: Workload) -> None:
        """Refuse a request that no worker could ever hold before anything runs."""
        for number, request in enumerate(workload.requests, 1):
            rooms = [(self.cluster.kv_capacity_tokens, request.output_tokens, "a worker")]
            if self.prefill is not None:
                rooms.append((self.prefill.kv_capacity_tokens, 1, "a prefill worker"))
            for most_tokens, output_tokens, who in rooms:
                if most_tokens is not None and request.prompt_tokens + output_tokens > most_tokens:
                    msg = (
                        f"request {number} of {workload.name!r} grows to {request.prompt_tokens} + "
                        f"{output_tokens} tokens, more than {who}'s KV capacity of {most_tokens}"
                    )
                    raise InvalidInputError(msg)

    def describe(self, workload: Workload) -> dict[str, str | int | float | None]:
        """Return the scenario as it goes into the report."""
        cluster, prefill = self.cluster, self.prefill
        described: dict[str, str | int | float | None] = {
            "workload": workload.name,
            "requests": len(workload.requests),
            "requests_per_s": self.arrivals.requests_per_s,
            "rate": self.arrivals.rate,
            "cv": self.arrivals.cv,
            "trace_speed": self.arrivals.trace_speed,
            "seed": self.seed,
            "workers": cluster.workers,
            "slots": cluster.slots,
            "kv_capacity_tokens": cluster.kv_capacity_tokens,
            "step_base_ms": cluster.step_base_s * 1e3,
            "step_ns_per_kv_token": cluster.step_s_per_kv_token * 1e9,
            "prefill_us_per_token": cluster.prefill_s_per_token * 1e6,
            "prefill_tokens_max": cluster.prefill_tokens_max,
            **self._beyond_the_basics(),
        }
        if prefill is None:
            return described
        return described | {
            "prefill_workers": prefill.servers,
            "transfer": str(prefill.transfer),
            "prefill_slots": prefill.slots,
            "prefill_kv_capacity_tokens": prefill.kv_capacity_tokens,
            "transfer_ms_per_ktoken": prefill.transfer_ms_per_ktoken,
        }

    def _beyond_the_basics(self) -> dict[str, str | int | float | None]:
        """Return what only a simulation knows, as far as it is not as it mostly is."""
        cluster, plain = self.cluster, ClusterSettings()
        values: dict[str, tuple[str | float, str | float]] = {
            "at_once": (self.arrivals.at_once, False),
            "abort_fraction": (self.workload.abort_fraction, 0.0),
            "epochs": (self.workload.epochs, 1),
            "decode_factor_under_prefill": (
                cluster.decode_factor_under_prefill,
                plain.decode_factor_under_prefill,
            ),
            "step_us_per_request": (cluster.step_s_per_request * 1e6, plain.step_s_per_request),
            "batch_buckets": (" ".join(map(str, cluster.batch_buckets)), ""),
            "tokens_per_step": (cluster.tokens_per_step, plain.tokens_per_step),
            "slots_each": (" ".join(map(str, cluster.slots_each)), ""),
            "slowness": (" ".join(map(str, cluster.slowness)), ""),
            "shares_barrier": (self.prefill is not None and self.prefill.shares_barrier, False),
            "transfer_ms_per_ktoken": (self.transfer_s_per_token * 1e6, 0.0),
        }
        return {name: value for name, (value, usual) in values.items() if value != usual}

    def must_be_emulated(self) -> None:
        """Raise InvalidInputError for what an emulated deployment and its clients cannot do."""
        simulated = ", ".join(self._beyond_the_basics())
        if simulated:
            msg = f"{simulated}: only loadgen simulate knows that; leave it out"
            raise InvalidInputError(msg)
