"""Pictures of simulations: load of each worker under the envelope, imbalance, and latencies.

Needs the ``plots`` extra (matplotlib).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from brproxy.types import InvalidInputError
from loadgen.commands.scenario import Scenario
from loadgen.simulator import SimulatedPolicy, Simulation, simulate

_STEPS_DRAWN = 600


def plot_simulations(scenario: Scenario, policies: Mapping[str, SimulatedPolicy], path: Path) -> None:
    """Simulate ``policies`` once and draw them, a column each; raises InvalidInputError."""
    plt = _pyplot()
    workload, _ = scenario.draw()
    figure = plt.figure(figsize=(max(8.0, 4.5 * len(policies)), 9.0), layout="constrained")
    over_time, distributions = figure.subfigures(2, 1, height_ratios=(2, 1))
    axes = over_time.subplots(2, len(policies), squeeze=False, sharey="row")
    simulations: list[tuple[str, Simulation]] = []
    for column, (label, choice) in enumerate(policies.items()):
        simulation = simulate(workload, scenario.cluster, choice, scenario.seed, keep_loads=True)
        simulations.append((label, simulation))
        _draw_loads(axes[0][column], label, simulation)
        _draw_imbalance(axes[1][column], simulation)
    axes[0][0].set_ylabel("load of each worker (thousand KV tokens)")
    axes[1][0].set_ylabel("imbalance, max - min (thousand KV tokens)")
    _draw_distributions(distributions, simulations)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        msg = f"{path}: cannot be drawn: {error}"
        raise InvalidInputError(msg) from error
    finally:
        plt.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib as mpl  # noqa: PLC0415
    except ImportError as error:
        msg = "--plot needs matplotlib: pip install 'brproxy[plots]'"
        raise InvalidInputError(msg) from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    return plt


def _draw_loads(axes: Any, label: str, simulation: Simulation) -> None:
    """Draw every worker's load over the steady part, and the envelope above them."""
    start_s, loads = simulation.loads.start_s, simulation.loads.kv_tokens
    inside = np.flatnonzero((start_s >= simulation.steady_s[0]) & (start_s < simulation.steady_s[1]))
    shown = inside[:: max(1, len(inside) // _STEPS_DRAWN)]
    axes.plot(start_s[shown], loads[shown] / 1e3, linewidth=0.6, alpha=0.7)
    axes.plot(start_s[shown], loads[shown].max(axis=1) / 1e3, color="black", linewidth=1.0, label="envelope")
    axes.set_title(label)
    axes.set_xlabel("time (s)")
    axes.legend(loc="lower right")


def _draw_imbalance(axes: Any, simulation: Simulation) -> None:
    start_s, loads = simulation.loads.start_s, simulation.loads.kv_tokens
    shown = slice(None, None, max(1, len(start_s) // _STEPS_DRAWN))
    axes.plot(start_s[shown], (loads[shown].max(axis=1) - loads[shown].min(axis=1)) / 1e3, linewidth=0.8)
    axes.axvspan(*simulation.steady_s, alpha=0.08, label="steady part")
    axes.set_xlabel("time (s)")
    axes.legend(loc="upper right")


def _draw_distributions(figure: Any, simulations: list[tuple[str, Simulation]]) -> None:
    """Draw the distributions of TPOT and waiting, all policies in each."""
    left, right = figure.subplots(1, 2)
    for label, simulation in simulations:
        for axes, values in ((left, simulation.tpot_s * 1e3), (right, simulation.wait_s)):
            shown = np.sort(values[~np.isnan(values)])
            axes.plot(shown, np.arange(1, len(shown) + 1) / len(shown), label=label)
    left.set_xlabel("TPOT (ms)")
    right.set_xlabel("wait (s)")
    left.set_ylabel("share of requests")
    right.legend(loc="lower right")
