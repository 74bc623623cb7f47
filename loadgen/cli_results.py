"""``loadgen results``: the tables and pictures of RESULTS.md, made anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from brproxy.types import InvalidInputError
from loadgen.commands.bars import Bars
from loadgen.commands.pictures import draw_picture
from loadgen.commands.results import Kept, command_lines, run_all, tables, without_trace
from loadgen.commands.results_file import Experiments, load_experiments
from loadgen.report.markdown import renewed

QUICK_SEEDS, QUICK_REQUESTS_PER_WORKER = 2, 150


def results(
    experiments: Annotated[Path, typer.Option(help="What is to be run, and its tables (TOML).")] = Path(
        "config/results.toml"
    ),
    out: Annotated[
        Path, typer.Option(help="Folder that keeps each run, as `loadgen simulate --out` writes it.")
    ] = Path("results"),
    only: Annotated[
        list[str] | None, typer.Option(help="Name of a table or a run, may be repeated; left out: all.")
    ] = None,
    traces: Annotated[Path | None, typer.Option(help="Folder of the traces that are not shipped.")] = None,
    write: Annotated[
        Path | None,
        typer.Option(help="Markdown file to put the tables into, between their marks; left out: printed."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw why it matters (PNG or SVG), and run nothing else.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds of every run, not the file's.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few seeds and requests, for a look.")] = False,
    kept: Annotated[bool, typer.Option("--kept", help="Run nothing: only what is kept.")] = False,
    commands: Annotated[
        bool, typer.Option("--commands", help="Run nothing: print what would be, a command a line.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Simulations at once; left out: one each core.")
    ] = None,
) -> None:
    """Run the experiments that are not kept yet, and make their tables anew.

    What is kept stays: after a change of the code that it measures, give an empty --out.
    """
    chosen = load_experiments(experiments).only(only or [])
    if quick:
        chosen = chosen.shortened(QUICK_SEEDS, QUICK_REQUESTS_PER_WORKER)
    chosen = chosen.shortened(seeds, None)
    if picture is not None:
        _draw(chosen, picture)
        return
    folder = Kept(out, traces)
    for line in without_trace(chosen, folder):
        typer.echo(line, err=True)
    if commands:
        for line in command_lines(chosen, folder):
            typer.echo(line)
        return
    if not kept:
        _make_folder(out)
        with Bars() as bars:
            run_all(chosen, folder, bars.begin, bars.advance, processes)
    made = tables(chosen, folder)
    if write is None:
        for name, table in made.items():
            typer.echo(f"{name}\n\n{table}")
    else:
        _renew(write, made)


def _draw(experiments: Experiments, path: Path) -> None:
    if experiments.picture is None:
        msg = "--picture: the file of experiments has no [picture]"
        raise InvalidInputError(msg)
    with Bars() as bars:
        bars.begin("picture", len(experiments.picture.loads.policies + experiments.picture.prefill.policies))
        draw_picture(experiments.picture, experiments.labels, path, bars.advance)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"{folder}: cannot be made: {error.strerror}"
        raise InvalidInputError(msg) from error


def _renew(path: Path, made: dict[str, str]) -> None:
    try:
        # Bytes, so that line ends stay as they are.
        text = path.read_bytes().decode()
        path.write_bytes(renewed(text, made).encode())
    except OSError as error:
        msg = f"{path}: cannot be renewed: {error.strerror}"
        raise InvalidInputError(msg) from error
    except UnicodeDecodeError as error:
        msg = f"{path}: must be UTF-8 text: byte {error.start} is not"
        raise InvalidInputError(msg) from error
