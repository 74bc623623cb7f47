"""The picture of why: what each worker holds under several policies, and who prefills in which step.

Needs the ``plots`` extra (matplotlib).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from loadgen.report.plots import prefill_in_the_middle, steady_steps, usual_prefill
from loadgen.report.schema import PolicyResult
from loadgen.simulator import Simulation

_INCHES = (10.0, 6.6)
_STEPS_DRAWN = 300
_STEPS_OF_PREFILL = 160
_WORKER, _MEAN, _ENVELOPE = "#b9c4d0", "#1b2733", "#c2410c"
"""Readable for the colour-blind too: greys, and one colour for what holds all up."""


class Drawn(NamedTuple):
    """A simulation and its figures."""

    simulation: Simulation
    result: PolicyResult


def draw_why(plt: Any, loads: Mapping[str, Drawn], prefill: Mapping[str, Drawn]) -> Any:
    """Return the figure: panels of ``loads`` above those of ``prefill``, by label."""
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure = plt.figure(figsize=_INCHES, layout="constrained", facecolor="white")
        above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1), hspace=0.04)
        _draw_loads(above, loads)
        _draw_prefill(below, prefill)
    return figure


def _draw_loads(figure: Any, drawn: Mapping[str, Drawn]) -> None:
    workers = next(iter(drawn.values())).simulation.loads.kv_tokens.shape[1]
    figure.suptitle(f"KV tokens of each of {workers} workers: every step waits for the fullest", fontsize=11)
    panels = figure.subplots(1, len(drawn), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (label, (simulation, result)) in zip(panels, drawn.items(), strict=True):
        inside = steady_steps(simulation)
        shown = inside[:: max(1, len(inside) // _STEPS_DRAWN)]
        start_s = simulation.loads.start_s[shown] - simulation.steady_s[0]
        tokens = simulation.loads.kv_tokens[shown] / 1e3
        lines = axes.plot(start_s, tokens, color=_WORKER, linewidth=0.4)
        lines[0].set_label("a worker")
        axes.plot(start_s, tokens.max(axis=1), color=_ENVELOPE, linewidth=1.3, label="fullest")
        axes.plot(start_s, tokens.mean(axis=1), color=_MEAN, linewidth=1.3, label="mean")
        facts = f"{_percent(result.idle_fraction)} idle, {_percent(result.throughput_of_perfect)} of perfect"
        axes.set_title(f"{label}\n{facts}", fontsize=9)
        axes.set_xlabel("time (s)")
        axes.margins(x=0)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("KV tokens (thousands)")
    panels[-1].legend(loc="lower right", fontsize=8, frameon=False)


def _draw_prefill(figure: Any, drawn: Mapping[str, Drawn]) -> None:
    figure.suptitle("Prompt tokens prefilled in each step: every step waits for the most", fontsize=11)
    panels = figure.subplots(1, len(drawn), sharex=True, sharey=True, squeeze=False)[0]
    parts = [prefill_in_the_middle(one.simulation, _STEPS_OF_PREFILL) for one in drawn.values()]
    highest = usual_prefill(parts)
    image = None
    for axes, part, (label, (_, result)) in zip(panels, parts, drawn.items(), strict=True):
        image = axes.imshow(
            part.T, aspect="auto", interpolation="nearest", cmap="Greys", vmin=0, vmax=highest, origin="lower"
        )
        facts = f"{_percent(result.prefill_balance)} balanced"
        axes.set_title(f"{label}: {facts}, {_percent(result.throughput_of_perfect)} of perfect", fontsize=9)
        axes.set_xlabel("step")
        axes.set_yticks(np.arange(0, part.shape[1], max(1, part.shape[1] // 4)))
    panels[0].set_ylabel("worker")
    figure.colorbar(image, ax=list(panels), label="prompt tokens", pad=0.01)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"
