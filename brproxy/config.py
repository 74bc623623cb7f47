"""The TOML configuration: every key with its type, range, unit and default, and a line for each mistake.

The models below are the reference: the shipped file, the Markdown table in the README and the messages are
all checked against or made from them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, create_model, field_validator

from brproxy.config_affinity import Affinity
from brproxy.config_asking import Discovery, FaultTolerance, HealthChecks, Prompts, TelemetryPolls
from brproxy.config_batches import Batches
from brproxy.config_costs import Costs
from brproxy.config_sections import (
    Admin,
    Estimate,
    Forwarding,
    Limits,
    Listen,
    Log,
    PrefillDecode,
    Seconds,
    Timeouts,
)
from brproxy.config_workers import Worker, disagreements, known_name
from brproxy.prediction.predictor import PREDICTORS, PredictorParams
from brproxy.routing.policy import POLICIES, PolicyParams
from brproxy.validation import Section, load_toml, refuse, validate


class RoutingBase(Section):
    """Which policy decides, and how often; each policy has a table of its own beside these keys."""

    policy: Annotated[str, known_name(POLICIES)] = Field(
        default="br-0", description="Name of the routing policy."
    )
    prefill_policy: Annotated[str, known_name(POLICIES)] = Field(
        default="least-prefill", description="Name of the policy that decides which worker prefills."
    )
    tick_ms: float = Field(
        default=5.0,
        gt=0,
        le=1000,
        strict=False,
        description="Time between decision rounds while requests wait (milliseconds).",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the random choices that break ties.")


class PredictionBase(Section):
    """Which predictor forecasts load for policies that look ahead; each has a table of its own."""

    predictor: Annotated[str, known_name(PREDICTORS)] = Field(
        default="survival", description="Name of the predictor."
    )
    state_file: str = Field(
        default="", description="File that keeps what was learnt across restarts; empty: nothing is kept."
    )
    state_interval_s: Seconds = Field(default=300.0, description="Between two writes of that file (seconds).")


def _table(name: str, base: type[Section], tables: dict[str, type[BaseModel]]) -> type[Any]:
    """Return ``base`` with a sub-table for each of ``tables``, under its own name."""
    fields: dict[str, Any] = {
        key.replace("-", "_"): (
            params,
            Field(default_factory=params, alias=key, description=(params.__doc__ or "").strip()),
        )
        for key, params in tables.items()
    }
    return create_model(name, __base__=base, __doc__=base.__doc__, **fields)


if TYPE_CHECKING:
    # The sub-tables come from the registries, which a type checker cannot see into.
    Routing = RoutingBase
    Prediction = PredictionBase
else:
    Routing = _table("Routing", RoutingBase, {name: POLICIES.get(name).Params for name in POLICIES.names()})
    Prediction = _table(
        "Prediction", PredictionBase, {name: PREDICTORS.get(name).Params for name in PREDICTORS.names()}
    )


class Config(Section):
    """The whole file."""

    listen: Listen = Field(default_factory=Listen)
    forwarding: Forwarding = Field(default_factory=Forwarding)
    admin: Admin = Field(default_factory=Admin)
    routing: Routing = Field(default_factory=Routing)
    prediction: Prediction = Field(default_factory=Prediction)
    worker: list[Worker] = Field(min_length=1, max_length=4096)
    limits: Limits = Field(default_factory=Limits)
    timeouts: Timeouts = Field(default_factory=Timeouts)
    health: HealthChecks = Field(default_factory=HealthChecks)
    prefill_decode: PrefillDecode = Field(default_factory=PrefillDecode)
    discovery: Discovery = Field(default_factory=Discovery)
    telemetry: TelemetryPolls = Field(default_factory=TelemetryPolls)
    fault_tolerance: FaultTolerance = Field(default_factory=FaultTolerance)
    costs: Costs = Field(default_factory=Costs)
    estimate: Estimate = Field(default_factory=Estimate)
    prompts: Prompts = Field(default_factory=Prompts)
    affinity: Affinity = Field(default_factory=Affinity)
    batches: Batches = Field(default_factory=Batches)
    log: Log = Field(default_factory=Log)

    @field_validator("worker", mode="after")
    @classmethod
    def _workers_agree(cls, workers: list[Worker]) -> list[Worker]:
        refuse(disagreements(workers))
        return workers

    @property
    def groups(self) -> dict[str, list[Worker]]:
        """The workers of each barrier group, in order of the file."""
        groups: dict[str, list[Worker]] = {}
        for worker in self.worker:
            groups.setdefault(worker.barrier_group, []).append(worker)
        return groups

    @property
    def group_sizes(self) -> dict[str, int]:
        """The members of each barrier group, each rank counted."""
        return {name: sum(len(w.seats) for w in workers) for name, workers in self.groups.items()}

    def policy_params(self, name: str) -> PolicyParams:
        """Return the table of the policy called ``name``."""
        params: PolicyParams = getattr(self.routing, name.replace("-", "_"))
        return params

    def predictor_params(self) -> PredictorParams:
        """Return the table of the chosen predictor."""
        params: PredictorParams = getattr(self.prediction, self.prediction.predictor.replace("-", "_"))
        return params


def load_config(path: Path) -> Config:
    """Read and check a configuration file; raises ConfigError, a line for each mistake."""
    return parse_config(load_toml(path), str(path))


def parse_config(document: dict[str, Any], source: str) -> Config:
    """Check a parsed document; ``source`` is what the messages call it. Raises ConfigError."""
    return validate(Config, document, source)
