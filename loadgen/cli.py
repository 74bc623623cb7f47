"""The ``loadgen`` command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console

from brproxy.command import make_command, run_command
from brproxy.types import InvalidInputError
from loadgen.cli_bench import bench, bench_proxy
from loadgen.cli_results import results
from loadgen.client import ClientSettings, Lengths
from loadgen.cluster_settings import ClusterSettings
from loadgen.commands import demo as demonstration
from loadgen.commands.bars import Bars
from loadgen.commands.calibration import calibrated_from
from loadgen.commands.compare import ComparisonSettings
from loadgen.commands.compare import compare as run_comparison
from loadgen.commands.comparison_plan import DEFAULT_POLICIES, options_given, plan_from_file
from loadgen.commands.emulate import emulate as run_emulator
from loadgen.commands.processes import run_to_end
from loadgen.commands.run import run as run_replay
from loadgen.commands.scenario import Arrivals, PrefillServers, Scenario, WorkloadChoice
from loadgen.commands.simulate import simulate_all
from loadgen.commands.simulation_plan import plan_simulation
from loadgen.commands.validate import validate
from loadgen.emulator.settings import EmulatorSettings, Role, Transfer
from loadgen.options import (
    BesideSimulator,
    BootstrapPort,
    CalibratedFrom,
    CalibratedGroup,
    Chunk,
    Cv,
    DeploymentRole,
    KvCapacity,
    KvTransfer,
    Lease,
    Name,
    Out,
    Prefill,
    PrefillKvCapacity,
    PrefillSlots,
    PrefillWorkers,
    Rate,
    RecomputedShare,
    Requests,
    RequestsPerS,
    RequestsPerWorker,
    ScenarioPath,
    Seed,
    Slots,
    Speed,
    StepBase,
    StepPerKv,
    TraceFile,
    TraceSpeed,
    TransferTime,
    Workers,
    listed,
    to_be_written,
)
from loadgen.report.plots import plot_simulations
from loadgen.report.schema import Document, Report
from loadgen.report.statistics import Slo
from loadgen.report.tables import comparison_tables, latency_table, outcome_table, simulation_tables

app = make_command("loadgen", "The load generator of brproxy: emulate, replay, compare.")

SYNTHETIC_REQUESTS = 2000
SYNTHETIC_RATE = 1.1


@app.command()
def emulate(
    workers: Workers = 8,
    slots: Slots = 64,
    kv_capacity_tokens: KvCapacity = None,
    step_base_ms: StepBase = 30.0,
    step_ns_per_kv_token: StepPerKv = 100.0,
    prefill_us_per_token: Prefill = 0.0,
    prefill_tokens_max: Chunk = None,
    speed: Speed = 1.0,
    base_port: Annotated[int, typer.Option(help="Port of the first worker, 0: free ones.")] = 8001,
    model: Annotated[str, typer.Option(help="Name of the model that the workers serve.")] = "emulated",
    queued_requests_max: Annotated[
        int | None, typer.Option(help="Answer 503 when so many requests wait in a worker.")
    ] = None,
    ranks_per_url: Annotated[int, typer.Option(help="Workers behind each port, as DP ranks.")] = 1,
    sglang: Annotated[bool, typer.Option(help="Say what SGLang says of itself and its load.")] = False,
    role: DeploymentRole = Role.BOTH,
    transfer: KvTransfer = None,
    lease_s: Lease = None,
    transfer_ms_per_ktoken: TransferTime = 5.0,
    bootstrap_port: BootstrapPort = 8998,
    recomputed_share: RecomputedShare = 0.0,
    seed: Seed = 0,
    deployments: Annotated[int, typer.Option(help="Deployments of that size, each with its barrier.")] = 1,
) -> None:
    """Emulate a DP deployment: HTTP ports for its workers, vLLM's wire format, a barrier at each step."""
    cluster = _cluster(
        *(workers, slots, kv_capacity_tokens, step_base_ms, step_ns_per_kv_token),
        *(prefill_us_per_token, prefill_tokens_max),
    )
    sglang = sglang or transfer == Transfer.SGLANG
    settings = EmulatorSettings(
        cluster,
        speed,
        model,
        base_port=base_port,
        queued_requests_max=queued_requests_max,
        ranks_per_url=ranks_per_url,
        ranks_are_global=sglang,
        sglang=sglang,
        role=role,
        transfer=transfer,
        lease_s=lease_s,
        transfer_ms_per_ktoken=transfer_ms_per_ktoken,
        bootstrap_port=bootstrap_port,
        recomputed_share=recomputed_share,
        seed=seed,
    )
    uvloop.run(run_emulator(settings, deployments, lambda line: print(line, flush=True)))


@app.command()
def run(
    target: Annotated[str, typer.Option(help='Where to send requests, as "http://host:port".')],
    model: Annotated[str, typer.Option(help="Model that requests ask for.")] = "emulated",
    workload: Name = "short",
    trace: TraceFile = None,
    requests: Requests = None,
    requests_per_s: RequestsPerS = None,
    cv: Cv = 1.0,
    trace_speed: TraceSpeed = 1.0,
    speed: Speed = 1.0,
    seed: Seed = 0,
    lengths: Annotated[
        Lengths, typer.Option(help="How the engine learns the output length.")
    ] = Lengths.MAX_TOKENS,
    chat: Annotated[bool, typer.Option("--chat/--completions", help="Which API to use.")] = True,
    verify: Annotated[bool, typer.Option(help="The target is the emulator: check every token.")] = False,
    timeout_s: Annotated[float, typer.Option(help="Give up on a request after so many seconds.")] = 600.0,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="Objective for the time to first token.")] = None,
    slo_tpot_ms: Annotated[
        float | None, typer.Option(help="Objective for the time per output token.")
    ] = None,
    slo_e2e_ms: Annotated[float | None, typer.Option(help="Objective for the whole request.")] = None,
    label: Annotated[str, typer.Option(help="What the report calls the target.")] = "target",
    out: Out = None,
) -> None:
    """Replay a trace or a synthetic workload against a URL, open loop.

    The key in OPENAI_API_KEY, if there is one, is sent with each request.
    """
    scenario = Scenario(
        WorkloadChoice(workload, trace, _requests(requests, trace)),
        Arrivals(requests_per_s, None, cv, trace_speed),
        seed=seed,
    )
    drawn, _ = scenario.draw()
    settings = ClientSettings(
        target.rstrip("/"),
        model=model,
        chat=chat,
        speed=speed,
        lengths=lengths,
        verify=verify,
        timeout_s=timeout_s,
        api_key=os.environ.get("OPENAI_API_KEY"),
        seed=seed,
    )
    slo = Slo(slo_ttft_ms, slo_tpot_ms, slo_e2e_ms)
    with Bars() as bars:
        bars.begin(label, len(drawn.requests))
        report = uvloop.run(run_replay(drawn, scenario, settings, slo, label, bars.finished))
    _write(report, out)
    console = Console()
    console.print(latency_table(report.policies[0]), outcome_table(report.policies[0]))
    _warn(report)


@app.command()
def compare(
    context: typer.Context,
    scenario_file: ScenarioPath = None,
    policies: Annotated[
        str | None, typer.Option(help="Names of policies, separated by commas; the file's, else four.")
    ] = None,
    workers: Workers = 8,
    slots: Slots = 64,
    kv_capacity_tokens: KvCapacity = None,
    step_base_ms: StepBase = 30.0,
    step_ns_per_kv_token: StepPerKv = 100.0,
    prefill_us_per_token: Prefill = 0.0,
    prefill_tokens_max: Chunk = None,
    prefill_workers: PrefillWorkers = 0,
    prefill_slots: PrefillSlots = 4,
    prefill_kv_capacity_tokens: PrefillKvCapacity = None,
    transfer: KvTransfer = Transfer.NIXL,
    transfer_ms_per_ktoken: TransferTime = 5.0,
    workload: Name = "short",
    trace: TraceFile = None,
    requests: Requests = None,
    requests_per_s: RequestsPerS = None,
    rate: Rate = None,
    cv: Cv = 1.0,
    trace_speed: TraceSpeed = 1.0,
    speed: Speed = 1.0,
    seed: Seed = 0,
    beside_simulator: BesideSimulator = False,
    out: Out = None,
) -> None:
    """Run emulator and proxy under one policy after another, on the same arrivals.

    Arrivals follow --requests-per-s, else --rate, else a trace's own times. Synthetic: rate 1.1. With
    --prefill-workers others prefill, and the deployment only decodes.
    """
    names = listed(policies) if policies else DEFAULT_POLICIES
    if scenario_file is not None:
        given = options_given(context)
        plan = plan_from_file(
            scenario_file,
            given,
            names if policies else (),
            workers if "workers" in given else None,
            rate,
            seed,
        )
        scenario, names = plan.scenario, plan.policies
    else:
        if rate is None and requests_per_s is None and trace is None:
            rate = SYNTHETIC_RATE
        cluster = _cluster(
            *(workers, slots, kv_capacity_tokens, step_base_ms, step_ns_per_kv_token),
            *(prefill_us_per_token, prefill_tokens_max),
        )
        prefill = None
        if prefill_workers:
            prefill = PrefillServers(
                prefill_workers,
                transfer or Transfer.NIXL,
                prefill_slots,
                prefill_kv_capacity_tokens,
                transfer_ms_per_ktoken,
            )
        scenario = Scenario(
            WorkloadChoice(workload, trace, _requests(requests, trace)),
            Arrivals(requests_per_s, rate, cv, trace_speed),
            cluster,
            seed,
            prefill,
        )
    report = _compare(scenario, ComparisonSettings(names, speed, beside_simulator))
    _write(report, out)
    Console().print(*comparison_tables(report))
    _warn(report)


@app.command()
def demo(
    speed: Speed = demonstration.SETTINGS.speed,
    out: Out = None,
) -> None:
    """Show in three minutes what balancing gives: policies side by side on an emulated deployment."""
    settings = demonstration.settings_at(speed)
    typer.echo(demonstration.introduction(speed))
    report = _compare(demonstration.SCENARIO, settings)
    _write(report, out)
    Console().print(*comparison_tables(report))
    typer.echo(f"{demonstration.verdict(report)}\n\n{demonstration.NEXT_STEPS}")


@app.command()
def simulate(
    scenario: Annotated[
        list[Path] | None,
        typer.Option(help="Scenario file (TOML), may be repeated; left out: its defaults."),
    ] = None,
    policies: Annotated[
        str | None,
        typer.Option(
            help="NAME[:key=value,…][+late|+early][+learnt][+fifo][@PREDICTOR], with commas between."
        ),
    ] = None,
    predictor: Annotated[str | None, typer.Option(help="For policies that name none.")] = None,
    trace: TraceFile = None,
    workers: Annotated[int | None, typer.Option(min=1, help="DP workers, not the file's.")] = None,
    rate: Rate = None,
    requests_per_worker: RequestsPerWorker = None,
    dispatch_steps: Annotated[
        int | None,
        typer.Option(min=0, help="Steps until what is decided takes part, not the file's; 0: at once."),
    ] = None,
    calibrated: CalibratedFrom = None,
    group: CalibratedGroup = None,
    seed: Seed = 1,
    seeds: Annotated[int | None, typer.Option(min=1, help="So many seeds, from --seed on.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Simulations at once; left out: one each core.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw loads, imbalance and latencies (PNG or SVG).", callback=to_be_written),
    ] = None,
    out: Out = None,
) -> None:
    """Run the production dispatcher, policies and predictors in virtual time, side by side."""
    paths: list[Path | None] = [*scenario] if scenario else [None]
    if len(paths) > 1 and (out or plot):
        msg = "--out and --plot take one --scenario at a time"
        raise InvalidInputError(msg)
    calibration = None if calibrated is None else calibrated_from(calibrated, group)
    plans = [
        plan_simulation(
            path, policies, predictor, trace, workers, rate, dispatch_steps, calibration
        ).with_requests(requests_per_worker)
        for path in paths
    ]
    console = Console()
    for plan in plans:
        first_to_last = range(seed, seed + (plan.seeds if seeds is None else seeds))
        with Bars() as bars:
            bars.begin("simulations", len(plan.policies) * len(first_to_last))
            report = simulate_all(plan.scenario, plan.policies, first_to_last, bars.advance, processes)
        _write(report, out)
        console.print(*simulation_tables(report, plan.title, plan.published))
        if plot is not None:
            plot_simulations(plan.scenario(seed), plan.policies, plot)


app.command()(bench)
app.command("bench-proxy")(bench_proxy)
app.command()(results)
app.command()(validate)


def _compare(scenario: Scenario, settings: ComparisonSettings) -> Report:
    with Bars() as bars:
        return run_to_end(run_comparison(scenario, settings, bars.begin, bars.finished))


def _cluster(
    workers: int,
    slots: int,
    kv_capacity_tokens: int | None,
    step_base_ms: float,
    step_ns_per_kv_token: float,
    prefill_us_per_token: float,
    prefill_tokens_max: int | None,
) -> ClusterSettings:
    return ClusterSettings(
        workers=workers,
        slots=slots,
        kv_capacity_tokens=kv_capacity_tokens,
        step_base_s=step_base_ms / 1e3,
        step_s_per_kv_token=step_ns_per_kv_token / 1e9,
        prefill_s_per_token=prefill_us_per_token / 1e6,
        prefill_tokens_max=prefill_tokens_max,
    )


def _requests(requests: int | None, trace: Path | None) -> int | None:
    return SYNTHETIC_REQUESTS if requests is None and trace is None else requests


def _write(report: Document, out: Path | None) -> None:
    if out is not None:
        report.write(out)


def _warn(report: Report) -> None:
    for result in report.policies:
        for warning in result.warnings:
            typer.echo(f"warning: {result.policy}: {warning}", err=True)


def main() -> None:
    """Run the command."""
    run_command(app, "loadgen")
