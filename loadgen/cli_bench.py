"""The commands of ``loadgen`` that measure the proxy itself: ``bench`` and ``bench-proxy``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from brproxy.command import USAGE_ERROR
from loadgen.commands.bars import Bars
from loadgen.commands.bench import CASES as BENCH_CASES
from loadgen.commands.bench import bench as run_bench
from loadgen.commands.bench import bench_table
from loadgen.commands.bench_proxy import DIRECT, OWN, SPLIT, BenchSettings, bench_proxies, parse_port
from loadgen.commands.processes import run_to_end
from loadgen.dataplane.loads import parse_phase
from loadgen.dataplane.proxies import parse_proxy
from loadgen.options import Out, Seed, listed
from loadgen.report.proxies import proxy_table


def bench(
    rounds: Annotated[int, typer.Option(min=1, help="Decision rounds to time for each size.")] = 1000,
    seed: Seed = 0,
) -> None:
    """Time one decision round by size of the deployment: workers, active, waiting, horizon."""
    results = []
    with Bars() as bars:
        bars.begin("sizes", len(BENCH_CASES))
        for case in BENCH_CASES:
            results.append(run_bench(case, rounds, seed))
            bars.advance("sizes")
    Console().print(bench_table(results))


def bench_proxy(
    proxy: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=COMMAND LINE of a proxy that stays in the foreground; may be repeated. "
            "{port}, {workers} (URLs) and {config} (a configuration of brproxy) are filled in."
        ),
    ] = None,
    own: Annotated[bool, typer.Option(help="Measure this brproxy, before the others.")] = True,
    prefill_decode: Annotated[
        bool,
        typer.Option("--prefill-decode", help="Measure it with prefill and decode apart as well, after it."),
    ] = False,
    direct: Annotated[
        bool, typer.Option("--direct", help="Measure the load without a proxy, after them.")
    ] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where the proxies listen.")] = 9100,
    worker_ports: Annotated[str, typer.Option(help="Where the mock workers listen.")] = "9101,9102",
    phases: Annotated[
        str, typer.Option(help="req, short, pacedN (N streams at 50 tokens/s), unpaced; by commas.")
    ] = "req,short,paced200,paced1000",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; each starts each proxy afresh.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="Length of each measurement.")] = 4.0,
    pin: Annotated[bool, typer.Option(help="One core for the proxy, one for the load.")] = True,
    ready_s: Annotated[float, typer.Option(min=0, help="Give a proxy so long to start serving.")] = 60.0,
    out: Out = None,
) -> None:
    """Compare what proxies cost under the same loads: CPU time for each request and event. Linux only."""
    settings = BenchSettings(
        proxies=(
            *([OWN] * own),
            *([SPLIT] * prefill_decode),
            *map(parse_proxy, proxy or ()),
            *([DIRECT] * direct),
        ),
        phases=tuple(parse_phase(name, seconds) for name in listed(phases)),
        port=port,
        worker_ports=tuple(map(parse_port, listed(worker_ports))),
        rounds=rounds,
        pin=pin,
        ready_s_max=ready_s,
    )
    # No progress bar: redrawing it would take CPU time from what is measured.
    report = run_to_end(bench_proxies(settings, lambda line: typer.echo(line, err=True)))
    if out is not None:
        report.write(out)
    if report.loads:
        Console().print(*(proxy_table(report, phase) for phase in settings.phases))
    for warning in report.warnings():
        typer.echo(f"warning: {warning}", err=True)
    if report.errors:
        raise typer.Exit(USAGE_ERROR)
