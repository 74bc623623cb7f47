"""The TOML configuration: every key with its type, range, unit and default, and a line for each mistake.

The models below are the reference: the shipped file, the Markdown table in the README and the messages are
all checked against or made from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo, create_model, field_validator

from brproxy.engines.dialect import DIALECTS
from brproxy.origins import read_origin
from brproxy.prediction.predictor import PREDICTORS, PredictorParams
from brproxy.registry import Registry, UnknownNameError
from brproxy.routing.policy import POLICIES, PolicyParams
from brproxy.types import InvalidInputError
from brproxy.validation import Disagreement, Section, load_toml, refuse, validate

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


def _known(registry: Registry[Any]) -> AfterValidator:
    """Return a validator that takes the names of ``registry`` only."""

    def check(name: str) -> str:
        try:
            registry.get(name)
        except UnknownNameError as error:
            raise ValueError(str(error)) from error
        return name

    return AfterValidator(check)


class RoutingBase(Section):
    """Which policy decides, and how often; each policy has a table of its own beside these keys."""

    policy: Annotated[str, _known(POLICIES)] = Field(
        default="br-0", description="Name of the routing policy."
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

    predictor: Annotated[str, _known(PREDICTORS)] = Field(
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


def _origin(url: str) -> str:
    """Check a worker's URL and return it as it goes over the wire, without a trailing slash."""
    try:
        return read_origin(url).url
    except InvalidInputError as error:
        raise ValueError(str(error)) from error


class Worker(Section):
    """One DP rank behind a port of its own."""

    url: Annotated[str, AfterValidator(_origin)] = Field(
        description='Where the worker listens, as "http://host:port".'
    )
    name: str = Field(
        default="",
        max_length=128,
        description="Name in logs and metrics; the URL's host and port when empty.",
    )
    group: str = Field(
        default="default",
        min_length=1,
        max_length=128,
        description="Barrier group: workers of the same name run in lockstep.",
    )
    model: str | list[str] = Field(
        default_factory=list,
        description="Model or list of models that the worker serves; empty: whatever a request names.",
    )
    slots: int = Field(
        default=64, ge=1, le=1 << 20, description="Most requests that it runs at once (vLLM: --max-num-seqs)."
    )
    kv_capacity_tokens: int | None = Field(
        default=None, ge=1, description="KV cache size (tokens); unknown and not watched when left out."
    )
    engine: Annotated[str, _known(DIALECTS)] = Field(default="vllm", description="What the worker speaks.")

    @property
    def label(self) -> str:
        """The name, or host and port."""
        return self.name or urlsplit(self.url).netloc

    @property
    def models(self) -> frozenset[str]:
        """The models as a set; empty for any."""
        return frozenset([self.model] if isinstance(self.model, str) else self.model) - {""}


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


def _disagreements(workers: Sequence[Worker]) -> Iterator[Disagreement]:
    """Yield what is wrong with workers beside others; each is compared with the first that is like it."""
    by_url: dict[str, int] = {}
    by_label: dict[str, int] = {}
    by_group: dict[str, int] = {}
    for i, worker in enumerate(workers):
        same_url = by_url.setdefault(worker.url, i)
        same_label = by_label.setdefault(worker.label, i)
        first = workers[by_group.setdefault(worker.group, i)]
        if same_url != i:
            text = f"{worker.url!r} is worker[{same_url}]'s already; each worker must have its own"
            yield Disagreement((i, "url"), text)
        # Without a name it is the URL's: then one of the two says it.
        if same_label != i and (worker.name or workers[same_label].url != worker.url):
            text = f"{worker.label!r} is worker[{same_label}]'s already; each worker must have its own"
            yield Disagreement((i, "name"), text)
        if worker.models != first.models or worker.engine != first.engine:
            text = (
                f"group {worker.group!r} has workers with different models or engines; "
                "the workers of a group must agree, others belong in a group of their own"
            )
            yield Disagreement((i,), text)


class Config(Section):
    """The whole file."""

    listen: Listen = Field(default_factory=Listen)
    routing: Routing = Field(default_factory=Routing)
    prediction: Prediction = Field(default_factory=Prediction)
    worker: list[Worker] = Field(min_length=1, max_length=4096)
    limits: Limits = Field(default_factory=Limits)
    timeouts: Timeouts = Field(default_factory=Timeouts)
    health: HealthChecks = Field(default_factory=HealthChecks)
    estimate: Estimate = Field(default_factory=Estimate)
    log: Log = Field(default_factory=Log)

    @field_validator("worker", mode="after")
    @classmethod
    def _workers_agree(cls, workers: list[Worker]) -> list[Worker]:
        refuse(_disagreements(workers))
        return workers

    @property
    def groups(self) -> dict[str, list[Worker]]:
        """The workers of each barrier group, in order of the file."""
        groups: dict[str, list[Worker]] = {}
        for worker in self.worker:
            groups.setdefault(worker.group, []).append(worker)
        return groups

    def policy_params(self) -> PolicyParams:
        """Return the table of the chosen policy."""
        params: PolicyParams = getattr(self.routing, self.routing.policy.replace("-", "_"))
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
