"""The picture of why, simulated and drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from loadgen.commands.results import FIRST_SEED
from loadgen.commands.results_file import Picture, Run
from loadgen.commands.simulate import policy_result
from loadgen.report.pictures import Drawn, draw_why
from loadgen.report.plots import pyplot, save
from loadgen.simulator import simulate

_DOTS_PER_INCH = 160
"""Twice what a page shows of it, for screens that have as many."""

_COLOURS = 128


def draw_picture(
    picture: Picture, labels: Mapping[str, str], path: Path, on_done: Callable[[str], None]
) -> None:
    """Simulate what ``picture`` shows and draw it; raises InvalidInputError."""
    plt = pyplot("--picture")
    loads, prefill = (_drawn(run, labels, on_done) for run in (picture.loads, picture.prefill))
    save(plt, draw_why(plt, loads, prefill), path, _DOTS_PER_INCH)
    if path.suffix == ".png":
        with_few_colours(path)


def with_few_colours(path: Path) -> None:
    """Write a PNG again with a palette: a quarter of the bytes, and nothing that one would see."""
    from PIL import Image  # noqa: PLC0415 - comes with matplotlib

    with Image.open(path) as image:
        reduced = image.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    reduced.save(path, optimize=True)


def _drawn(run: Run, labels: Mapping[str, str], on_done: Callable[[str], None]) -> dict[str, Drawn]:
    """Return what each policy did, by its label."""
    plan = run.simulation()
    scenario = plan.scenario(FIRST_SEED)
    workload, capacity = scenario.draw()
    drawn = {}
    for policy, choice in plan.policies.items():
        done = simulate(workload, scenario.cluster, choice, scenario.seed, drain=False, keep_loads=True)
        figures = policy_result(policy, done, capacity.output_tokens_per_s)
        drawn[labels.get(policy, policy)] = Drawn(done, figures)
        on_done(policy)
    return drawn
