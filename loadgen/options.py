"""Options that several commands of ``loadgen`` have, and those of emulated prefill and decode."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from brproxy.types import InvalidInputError
from loadgen.emulator.settings import Role, Transfer
from loadgen.traces.synthetic import WORKLOADS


def to_be_written(path: Path | None) -> Path | None:
    """Return ``path``; raises InvalidInputError, before a run of minutes, where no file could be written."""
    if path is None:
        return None
    reason = None
    if not path.parent.is_dir():
        reason = f"there is no folder {path.parent}"
    elif path.is_dir():
        reason = "it is a folder"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "that is not allowed"
    if reason is not None:
        raise InvalidInputError(f"{path}: cannot be written: {reason}")
    return path


Workers = Annotated[int, typer.Option(help="DP workers of the emulated deployment.")]
Slots = Annotated[int, typer.Option(help="Requests that a worker runs at once.")]
KvCapacity = Annotated[int | None, typer.Option(help="KV cache of a worker (tokens); left out: unlimited.")]
StepBase = Annotated[float, typer.Option(help="t0: what a step takes without KV load (ms).")]
StepPerKv = Annotated[float, typer.Option(help="a: what each KV token of the heaviest worker adds (ns).")]
Prefill = Annotated[float, typer.Option(help="What a prompt token adds to the step that prefills it (µs).")]
Chunk = Annotated[
    int | None,
    typer.Option(
        "--prefill-tokens-max",
        help="Tokens that a worker prefills in a step at most; left out: whole prompts.",
    ),
]
Speed = Annotated[float, typer.Option(help="Run so many times as fast as real time.")]
BesideSimulator = Annotated[
    bool,
    typer.Option("--beside-simulator", help="Simulate the same as well, and say how far apart both are."),
]
Name = Annotated[str, typer.Option("--workload", help=f"Synthetic workload: {', '.join(WORKLOADS)}.")]
TraceFile = Annotated[
    Path | None,
    typer.Option(
        help="Trace instead: a file (Azure, Mooncake, BurstGPT or ShareGPT, told by content), "
        "or a folder of ServeGen's clients."
    ),
]
Requests = Annotated[int | None, typer.Option(help="Requests; of a trace the first so many, by default all.")]
RequestsPerWorker = Annotated[
    int | None,
    typer.Option(min=1, help="Requests for each worker, not the file's; of a trace the first so many."),
]
RequestsPerS = Annotated[float | None, typer.Option(help="Arrivals a second, in the deployment's time.")]
Rate = Annotated[
    float | None, typer.Option(help="Arrivals as a share of what a perfectly balanced deployment could do.")
]
Cv = Annotated[float, typer.Option(help="Burstiness of arrivals: 1 Poisson, more is bursty, 0 uniform.")]
TraceSpeed = Annotated[float, typer.Option(help="Replay a trace's own times so many times as fast.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Out = Annotated[
    Path | None, typer.Option(help="Write the report as JSON to this file.", callback=to_be_written)
]

ScenarioPath = Annotated[
    Path | None,
    typer.Option("--scenario", help="Scenario file (TOML) instead of options for deployment and workload."),
]

CalibratedFrom = Annotated[
    str | None,
    typer.Option(
        "--calibrated-from",
        metavar="URL|FILE",
        help="Simulate the deployment behind a running brproxy, as its metrics (URL, or saved) show it.",
    ),
]
CalibratedGroup = Annotated[
    str | None, typer.Option("--group", help="Its barrier group, where there are several.")
]

PrefillWorkers = Annotated[
    int, typer.Option(min=0, help="Servers that prefill for the deployment, each by itself; 0: none.")
]
PrefillSlots = Annotated[int, typer.Option(min=1, help="Prompts that a prefill worker prefills in a step.")]
PrefillKvCapacity = Annotated[
    int | None, typer.Option(help="KV that a prefill worker keeps (tokens); left out: unlimited.")
]
DeploymentRole = Annotated[
    Role, typer.Option("--role", help="What the workers do of a request; needs --transfer.")
]
KvTransfer = Annotated[
    Transfer | None, typer.Option("--transfer", help="How KV gets from prefill to decode workers.")
]
Lease = Annotated[
    float | None,
    typer.Option(
        "--lease-s", help="How long KV is kept and one side waits for the other (s); left out: as the engine."
    ),
]
TransferTime = Annotated[
    float, typer.Option("--transfer-ms-per-ktoken", help="Time that a prefill worker takes to send KV (ms).")
]
BootstrapPort = Annotated[
    int, typer.Option(min=0, max=65535, help="Bootstrap port of the first prefill server, 0: free ones.")
]
RecomputedShare = Annotated[
    float, typer.Option(help="Share of decodes that end early, to be prefilled again (ascend).")
]


def listed(text: str) -> tuple[str, ...]:
    """Return what a text names, separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
