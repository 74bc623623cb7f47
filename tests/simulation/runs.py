"""Many scenarios one after another, and the words for one that fails."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tests.simulation.actions import Scenario, describe
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


def reports(seeds: Iterable[int], allowed: frozenset[str] = FAULTS) -> Iterator[tuple[int, Report]]:
    """Run the scenarios of ``seeds``, in which only faults that are ``allowed`` are drawn."""
    with still_memory():
        for seed in seeds:
            yield seed, run(draw(seed, allowed))


def explain(seed: int, allowed: frozenset[str] = FAULTS) -> str:
    """Return what broke in the run of ``seed``, the shortest script that breaks it, and how to repeat it."""
    scenario = draw(seed, allowed)
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
    only = f" --only {','.join(sorted(allowed))}" if allowed != FAULTS else ""
    said.append(f"again: python -m tests.simulation --seed {seed}{only}")
    return "\n".join(said)
