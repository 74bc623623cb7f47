"""``loadgen validate``: a real run replayed in the cluster model, with the errors of what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from loadgen.commands.policy_spec import parse_policy
from loadgen.real_run import Figure, fitted, halves, judge, read_run, replay


def validate(
    folder: Annotated[Path, typer.Argument(help="Folder with requests.jsonl, meta.json and attention*.csv.")],
    layers: Annotated[int, typer.Option(min=1, help="Attention layers of the model.")] = 48,
    policy: Annotated[
        str, typer.Option(help="Who routed; vllm-queue is the balancer inside vLLM.")
    ] = "vllm-queue",
) -> None:
    """Fit the cluster model to one half of a real run's requests, and judge it by the other."""
    run, choice = read_run(folder, layers), parse_policy(policy)
    cluster = fitted(run, choice)
    simulation = replay(run, choice, cluster)
    first, second = halves(run)
    typer.echo(
        f"{folder.name}: {len(run.first_s)} requests, {cluster.workers} workers with {cluster.slots} slots\n"
        f"of the attention: {cluster.step_s_per_kv_token * 1e9:.1f} ns a KV token, "
        f"{cluster.decode_factor_under_prefill:.2f} times as much beside a prefill\n"
        f"fitted to the first half: {cluster.step_base_s * 1e3:.2f} ms a step, "
        f"{cluster.prefill_s_per_token * 1e6:.1f} µs a prompt token, "
        f"{cluster.step_s_per_request * 1e6:.0f} µs a request"
    )
    console = Console()
    for title, which in (("first half, fitted", first), ("second half, held out", second)):
        console.print(validation_table(title, judge(run, simulation, which)))


def validation_table(title: str, figures: list[Figure]) -> Table:
    """Return figures as measured, as simulated, and the relative error."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("figure")
    for column in ("measured", "simulated", "error"):
        table.add_column(column, justify="right")
    for figure in figures:
        cells = (f"{figure.measured:,.1f}", f"{figure.simulated:,.1f}", f"{figure.error:+.1%}")
        table.add_row(figure.name, *cells)
    return table
