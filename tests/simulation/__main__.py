"""The command: ``python -m tests.simulation --seed N [--seeds K | --hours H] [--only FAULTS] [--parted]``."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter

from tests.simulation.parted_scenario import PARTED_FAULTS
from tests.simulation.runs import explain, reports
from tests.simulation.scenario import FAULTS


def main() -> int:
    """Run seeds; return 1 if any breaks a promise."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many, one after another")
    parser.add_argument("--hours", type=float, help="instead: until so many hours have been simulated")
    parser.add_argument("--only", help="the faults that may be drawn, by commas; without: all")
    parser.add_argument("--parted", action="store_true", help="with prefill and decode apart")
    parser.add_argument("--no-shrink", action="store_true", help="only say which seeds break what")
    arguments = parser.parse_args()
    allowed = None if arguments.only is None else frozenset(arguments.only.split(","))
    known = PARTED_FAULTS if arguments.parted else FAULTS
    if allowed is not None and allowed - known:
        parser.error(f"there are no faults {sorted(allowed - known)}; allowed: {', '.join(sorted(known))}")
    started_s = time.monotonic()
    done = Counter()
    broken: list[int] = []
    if arguments.hours is None:
        seeds = iter(range(arguments.seed, arguments.seed + arguments.seeds))
    else:
        seeds = itertools.count(arguments.seed)
    for seed, report in reports(seeds, allowed, parted=arguments.parted):
        done.update(seeds=1, events=report.events, requests=report.requests)
        done["seconds"] += report.seconds
        if report.violation is not None:
            broken.append(seed)
            print(f"seed {seed}: {report.violation}", flush=True)
        if arguments.hours is not None and done["seconds"] >= arguments.hours * 3600:
            break
    if broken and not arguments.no_shrink:
        print(explain(broken[0], allowed, parted=arguments.parted))
    print(
        f"{done['seeds']} seeds, {len(broken)} broken: {done['requests']} requests, {done['events']} events, "
        f"{done['seconds'] / 3600:.2f} simulated hours in {time.monotonic() - started_s:.0f} s"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
