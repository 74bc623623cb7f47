"""What ``loadgen compare`` is asked to do: a deployment by options, or a scenario file."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import typer

from brproxy.types import InvalidInputError
from loadgen.commands.scenario import Scenario
from loadgen.commands.scenario_file import load_scenario

BESIDE_FILE = frozenset(
    {"scenario_file", "policies", "workers", "rate", "seed", "speed", "beside_simulator", "out"}
)
"""Options of the command that go with a scenario file; it says all else."""


DEFAULT_POLICIES = ("join-shortest-queue", "least-kv", "br-0", "br-h")


@dataclass(frozen=True, slots=True)
class ComparisonPlan:
    """A scenario, and the policies that are compared on it."""

    scenario: Scenario
    policies: tuple[str, ...]


def options_given(context: typer.Context) -> list[str]:
    """Return the names of the options that the command line has."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def plan_from_file(
    path: Path,
    given: Collection[str],
    policies: tuple[str, ...],
    workers: int | None,
    rate: float | None,
    seed: int,
) -> ComparisonPlan:
    """Return what the file says, with the command line's choices; ``given`` are its options by name.

    Without ``policies`` they are the file's. Raises ConfigError, and InvalidInputError for an
    option that the file would overrule.
    """
    others = sorted(set(given) - BESIDE_FILE)
    if others:
        names = ", ".join("--" + name.replace("_", "-") for name in others)
        raise InvalidInputError(f"{names}: the scenario file says that; change it there")
    file = load_scenario(path)
    scenario = file.scenario(path.parent, seed, workers, rate)
    scenario.must_be_emulated()
    return ComparisonPlan(scenario, policies or tuple(file.policies))
