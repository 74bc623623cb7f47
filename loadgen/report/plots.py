"""Pictures of simulations: load of each worker under the envelope, imbalance, prefill, and latencies.

Needs the ``plots`` extra (matplotlib).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from brproxy.types import InvalidInputError
from loadgen.cluster_settings import IntArray
from loadgen.commands.scenario import Scenario
from loadgen.simulator import SimulatedPolicy, Simulation, simulate

_STEPS_DRAWN = 600
_STEPS_OF_PREFILL = 80
"""So many steps in a row show who prefills together."""

_COLOURED_MAX = 16
"""More workers than that are drawn in one colour: nobody could tell them apart."""

_COLUMN_INCHES, _ROW_INCHES = 4.2, 2.9


def plot_simulations(scenario: Scenario, policies: Mapping[str, SimulatedPolicy], path: Path) -> None:
    """Simulate ``policies`` once and draw them, a column each; raises InvalidInputError."""
    plt = pyplot("--plot")
    save(plt, draw_simulations(plt, scenario, policies), path, 110)


def save(plt: Any, figure: Any, path: Path, dots_per_inch: int) -> None:
    """Write a figure and let it go; raises InvalidInputError."""
    try:
        figure.savefig(path, dpi=dots_per_inch)
    except (OSError, ValueError) as error:
        msg = f"{path}: cannot be drawn: {error}"
        raise InvalidInputError(msg) from error
    finally:
        plt.close(figure)


def draw_simulations(plt: Any, scenario: Scenario, policies: Mapping[str, SimulatedPolicy]) -> Any:
    """Simulate ``policies`` once and return the figure that ``plt`` makes of them."""
    workload, _ = scenario.draw()
    simulations = {
        label: simulate(workload, scenario.cluster, choice, scenario.seed, keep_loads=True)
        for label, choice in policies.items()
    }
    rows = 3 if scenario.cluster.prefill_s_per_token else 2
    size = max(2 * _COLUMN_INCHES, _COLUMN_INCHES * len(policies)), _ROW_INCHES * (rows + 1)
    figure = plt.figure(figsize=size, layout="constrained")
    over_time, distributions = figure.subfigures(2, 1, height_ratios=(rows, 1))
    axes = over_time.subplots(rows, len(policies), squeeze=False, sharey="row")
    for column, (label, simulation) in enumerate(simulations.items()):
        _draw_loads(axes[0][column], label, simulation)
        _draw_imbalance(axes[1][column], simulation)
    if rows > 2:
        _draw_prefill(over_time, axes[2], list(simulations.values()))
    # Short: a label that is longer than its axes is cut, or runs into the next one.
    axes[0][0].set_ylabel("load (k KV tokens)")
    axes[1][0].set_ylabel("max - min (k KV tokens)")
    axes[0][0].legend(loc="lower right", fontsize="small")
    axes[1][0].legend(loc="upper right", fontsize="small")
    _draw_distributions(distributions, simulations)
    return figure


def pyplot(option: str) -> Any:
    """Return what draws, without a screen, for an ``option`` of the command; raises InvalidInputError."""
    try:
        import matplotlib as mpl  # noqa: PLC0415
    except ImportError as error:
        msg = f"{option} needs matplotlib: pip install 'brproxy[plots]'"
        raise InvalidInputError(msg) from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    return plt


def _draw_loads(axes: Any, label: str, simulation: Simulation) -> None:
    """Draw every worker's load over the steady part, the envelope, and what is lost between mean and it."""
    start_s, loads = simulation.loads.start_s, simulation.loads.kv_tokens
    inside = steady_steps(simulation)
    shown = inside[:: max(1, len(inside) // _STEPS_DRAWN)]
    colour = {} if loads.shape[1] <= _COLOURED_MAX else {"color": "tab:blue", "alpha": 0.35}
    times_s, shown_loads = start_s[shown], loads[shown] / 1e3
    mean, envelope = shown_loads.mean(axis=1), shown_loads.max(axis=1)
    axes.plot(times_s, shown_loads, linewidth=0.5, **colour)
    axes.fill_between(times_s, mean, envelope, color="tab:red", alpha=0.12, linewidth=0, label="idle")
    axes.plot(times_s, mean, color="black", linewidth=0.8, linestyle="--", label="mean")
    axes.plot(times_s, envelope, color="black", linewidth=1.0, label="envelope")
    idle = simulation.barrier.idle_fraction
    axes.set_title(label if idle is None else f"{label}: {idle:.1%} idle", fontsize="medium", wrap=True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("time (s)")


def _draw_imbalance(axes: Any, simulation: Simulation) -> None:
    start_s, loads = simulation.loads.start_s, simulation.loads.kv_tokens
    shown = slice(None, None, max(1, len(start_s) // _STEPS_DRAWN))
    axes.plot(start_s[shown], (loads[shown].max(axis=1) - loads[shown].min(axis=1)) / 1e3, linewidth=0.8)
    axes.axvspan(*simulation.steady_s, alpha=0.08, label="steady part")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("time (s)")


def _draw_prefill(figure: Any, row: Any, simulations: list[Simulation]) -> None:
    """Draw what each worker prefills in some steps in the middle: stripes where they do it together."""
    parts = [prefill_in_the_middle(simulation, _STEPS_OF_PREFILL) for simulation in simulations]
    highest = usual_prefill(parts)
    image = None
    for axes, part, simulation in zip(row, parts, simulations, strict=True):
        image = axes.imshow(
            part.T, aspect="auto", interpolation="nearest", cmap="Greys", vmin=0, vmax=highest, origin="lower"
        )
        balance = simulation.barrier.prefill_balance
        if balance is not None:
            axes.set_title(f"prefill balance {balance:.0%}", fontsize="small")
        axes.set_xlabel("steps in the middle")
    row[0].set_ylabel("worker")
    figure.colorbar(image, ax=list(row), label="prefilled (tokens)", pad=0.01)


def usual_prefill(parts: Sequence[IntArray]) -> float:
    """Return the prompt tokens that are drawn darkest: one giant must not make all others invisible."""
    some = np.concatenate([part[part > 0] for part in parts])
    return float(np.percentile(some, 95)) if len(some) else 1.0


def prefill_in_the_middle(simulation: Simulation, steps: int) -> IntArray:
    """Return the prompt tokens of some ``steps``, int64[S, G]."""
    inside = steady_steps(simulation)
    first = max(0, len(inside) // 2 - steps // 2)
    return simulation.loads.prefill_tokens[inside[first : first + steps]]


def steady_steps(simulation: Simulation) -> IntArray:
    """Return which steps begin in the steady part, by number."""
    start_s = simulation.loads.start_s
    return np.flatnonzero((start_s >= simulation.steady_s[0]) & (start_s < simulation.steady_s[1]))


def _draw_distributions(figure: Any, simulations: Mapping[str, Simulation]) -> None:
    """Draw the distributions of TPOT and waiting, all policies in each."""
    left, right = figure.subplots(1, 2, sharey=True)
    for label, simulation in simulations.items():
        for axes, values in ((left, simulation.tpot_s * 1e3), (right, simulation.wait_s)):
            shown = np.sort(values[~np.isnan(values)])
            axes.plot(shown, np.arange(1, len(shown) + 1) / max(1, len(shown)), label=label)
    left.set_xlabel("TPOT (ms)")
    right.set_xlabel("wait (s)")
    left.set_ylabel("share of requests")
    right.legend(loc="lower right", fontsize="small")
