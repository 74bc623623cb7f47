"""Many scenarios one after another, and the words for one that fails."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tests.simulation.actions import Scenario, describe
from tests.simulation.parted_scenario import PARTED_FAULTS, draw_parted
from tests.simulation.scenario import FAULTS, draw
from tests.simulation.shrink import shrink
from tests.simulation.world import Report, World


@contextmanager
def still_memory() -> Iterator[None]:
    """Have the collector pass over what exists already: within the block it looks at a run's own only."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def run(scenario: Scenario) -> Report:
    """Run one scenario, and leave nothing of it in memory."""
    report = World(scenario).run()
    if report.violation is not None:
        # Its frames are the whole run.
        report.violation.__traceback__ = None
    # The run has been looked through once already, so that what is left of it is no longer young.
    gc.collect(1)
    return report


def drawn(seed: int, allowed: frozenset[str] | None = None, *, parted: bool = False) -> Scenario:
    """Return the scenario of ``seed``, of faults that are ``allowed`` (None: all); ``parted``: see Parted."""
    if parted:
        return draw_parted(seed, PARTED_FAULTS if allowed is None else allowed)
    return draw(seed, FAULTS if allowed is None else allowed)


def reports(
    seeds: Iterable[int], allowed: frozenset[str] | None = None, *, parted: bool = False
) -> Iterator[tuple[int, Report]]:
    """Run the scenarios of ``seeds``, in which only faults that are ``allowed`` are drawn."""
    with still_memory():
        for seed in seeds:
            yield seed, run(drawn(seed, allowed, parted=parted))


def explain(seed: int, allowed: frozenset[str] | None = None, *, parted: bool = False) -> str:
    """Return what broke in the run of ``seed``, the shortest script that breaks it, and how to repeat it."""
    scenario = drawn(seed, allowed, parted=parted)
    violation = run(scenario).violation
    assert violation is not None
    promise = violation.promise

    def breaks(other: Scenario) -> bool:
        found = run(other).violation
        return found is not None and found.promise == promise

    shrunk = shrink(scenario, breaks)
    said = [f"seed {seed} breaks {violation}", f"shrunk, {run(shrunk).violation}:"]
    said += [f"  {describe(action)}" for action in shrunk.actions]
    said += [f"  workers {shrunk.workers}, {shrunk.settings}"]
    said += [f"  {shrunk.parted}"] if parted else []
    options = " --parted" if parted else ""
    options += f" --only {','.join(sorted(allowed))}" if allowed is not None else ""
    said.append(f"again: python -m tests.simulation --seed {seed}{options}")
    return "\n".join(said)
