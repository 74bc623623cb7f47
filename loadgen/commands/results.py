"""``loadgen results``: runs that are kept as they end, and the tables that are made of what is kept.

What is kept of a run is what ``loadgen simulate --out`` writes, so either may make it, here or elsewhere.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from brproxy.types import InvalidInputError
from loadgen.commands.results_file import Experiments, Run, TableSection
from loadgen.commands.simulate import describe, simulate_all
from loadgen.commands.simulation_plan import SimulationPlan
from loadgen.report.markdown import (
    FIGURES,
    differences_header,
    differences_rows,
    markdown_table,
    policies_header,
    policies_rows,
    runs_header,
    runs_rows,
)
from loadgen.report.schema import Report

FIRST_SEED = 1

_MEASURED = {"seeds", "perfect_output_tokens_per_s", "perfect_requests_per_s", "packed_makespan_s"}
"""What a report says of its scenario that does not make it another one."""

_LISTED_MAX = 8
"""More runs than that are told by how many they are, and their numbers by the least and the most."""


class Kept:
    """The reports in ``folder``, one for each run; ``traces`` has what runs replay."""

    def __init__(self, folder: Path, traces: Path | None) -> None:
        self._folder = folder
        self._traces = traces

    def path(self, run: Run) -> Path:
        """Return where a run is kept."""
        return self._folder / f"{run.name}.json"

    def plan(self, run: Run) -> SimulationPlan | None:
        """Return what a run simulates; None: its trace is not there. Raises InvalidInputError."""
        return run.plan(self._traces)

    def command_line(self, run: Run) -> str:
        """Return the ``loadgen simulate`` that writes what is kept of a run."""
        return shlex.join(["loadgen", *run.arguments(self._traces), "--out", str(self.path(run))])

    def checked(self, run: Run) -> Report | None:
        """Return what is kept of a run, None if nothing is; of its scenario, as far as that can be told.

        Raises InvalidInputError.
        """
        report, plan = self.report(run), self.plan(run)
        if report is not None and plan is not None:
            self._check(run, plan, report)
        return report

    def report(self, run: Run) -> Report | None:
        """Return what is kept of a run, None if nothing is; raises InvalidInputError."""
        path = self.path(run)
        try:
            return Report.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            msg = f"{path}: is no report of loadgen simulate; delete it to have it made"
            raise InvalidInputError(msg) from error

    def missing(self, run: Run, plan: SimulationPlan) -> tuple[Report | None, list[str]]:
        """Return what is kept of a run and may stay, and the policies that have yet to be simulated.

        Raises InvalidInputError where another scenario is kept under its name.
        """
        report = self.report(run)
        if report is None:
            return None, [*plan.policies]
        self._check(run, plan, report)
        if _kept_seeds(report) < _seeds(run, plan):
            return None, [*plan.policies]
        there = {result.policy for result in report.policies}
        return report, [policy for policy in plan.policies if policy not in there]

    def renew(
        self, run: Run, plan: SimulationPlan, on_done: Callable[[str], None], processes: int | None
    ) -> None:
        """Simulate what is missing of a run, and keep each policy as soon as it is done."""
        report, missing = self.missing(run, plan)
        seeds = _seeds(run, plan) if report is None else _kept_seeds(report)
        for policy in missing:
            chosen = {policy: plan.policies[policy]}
            last = FIRST_SEED + seeds
            more = simulate_all(plan.scenario, chosen, range(FIRST_SEED, last), on_done, processes)
            report = _with(report, more, plan)
            self._keep(run, report)

    def _check(self, run: Run, plan: SimulationPlan, report: Report) -> None:
        """Raise InvalidInputError for the report of another scenario."""
        wanted = describe(plan.scenario(FIRST_SEED), _seeds(run, plan))
        for key in sorted({*wanted, *report.scenario} - _MEASURED):
            kept_value, value = report.scenario.get(key), wanted.get(key)
            if kept_value != value:
                msg = f"{self.path(run)}: has another scenario, with {key} {kept_value}, not {value}"
                raise InvalidInputError(f"{msg}; delete it, or give another --out")

    def _keep(self, run: Run, report: Report) -> None:
        """Write a report so that an end at any moment leaves the old one or the new one."""
        path = self.path(run)
        unfinished = path.with_suffix(".part")
        report.write(unfinished)
        unfinished.replace(path)


def _seeds(run: Run, plan: SimulationPlan) -> int:
    return plan.seeds if run.seeds is None else run.seeds


def _kept_seeds(report: Report) -> int:
    return int(report.scenario.get("seeds") or 0)


def _with(report: Report | None, more: Report, plan: SimulationPlan) -> Report:
    """Return both, policies in the plan's order; others that are kept stay behind them."""
    if report is None:
        return more
    by_policy = {result.policy: result for result in (*report.policies, *more.policies)}
    order = [*plan.policies, *(name for name in by_policy if name not in plan.policies)]
    return Report(scenario=report.scenario, policies=[by_policy[name] for name in order if name in by_policy])


def run_all(
    experiments: Experiments,
    kept: Kept,
    begin: Callable[[str, int], None],
    on_done: Callable[[str], None],
    processes: int | None = None,
) -> None:
    """Simulate what is chosen and not kept yet.

    ``begin`` is told a run's name and how many simulations it is, ``on_done`` of each that has ended. Raises
    InvalidInputError, for any run before the first is simulated.
    """
    plans = [(run, plan) for run in experiments.chosen if (plan := kept.plan(run)) is not None]
    todo = [(run, plan, missing) for run, plan in plans if (missing := kept.missing(run, plan)[1])]
    for run, plan, missing in todo:
        begin(run.name, len(missing) * _seeds(run, plan))
        kept.renew(run, plan, on_done, processes)


def without_trace(experiments: Experiments, kept: Kept) -> list[str]:
    """Return a line for each chosen run that is left out, as its trace is not there."""
    runs = (run for run in experiments.chosen if kept.plan(run) is None)
    return [f"{run.name} is left out: no folder given with --traces has {run.trace}" for run in runs]


def command_lines(experiments: Experiments, kept: Kept) -> list[str]:
    """Return the ``loadgen simulate`` of each chosen run that is not all kept."""
    plans = [(run, plan) for run in experiments.chosen if (plan := kept.plan(run)) is not None]
    return [kept.command_line(run) for run, plan in plans if kept.missing(run, plan)[1]]


def tables(experiments: Experiments, kept: Kept) -> dict[str, str]:
    """Return the tables, by name, of what is kept; one of which nothing is kept is left out.

    Raises InvalidInputError where what is kept is of another scenario.
    """
    made = {}
    for table in experiments.tables:
        runs = [run for run in experiments.runs if table.has(run.name)]
        reports = {run: report for run in runs if (report := kept.checked(run)) is not None}
        if reports:
            body = _body(table, list(reports.values()), experiments.labels)
            made[table.name] = f"{body}\n{_source(table, runs, reports)}\n"
    return made


def header(table: TableSection, policies: Sequence[str], labels: Mapping[str, str]) -> list[str]:
    """Return a table's headings, where its runs have ``policies``."""
    shown = table.policies or policies
    if table.layout == "policies":
        return policies_header(table.keys, table.figures)
    if table.layout == "runs":
        return runs_header(table.keys, shown, labels)
    return differences_header(table.keys, table.figures, shown, labels)


def _body(table: TableSection, reports: Sequence[Report], labels: Mapping[str, str]) -> str:
    all_policies = [*dict.fromkeys(result.policy for report in reports for result in report.policies)]
    shown = table.policies or all_policies
    if table.layout == "policies":
        rows = policies_rows(reports, table.keys, table.figures, shown, labels)
    elif table.layout == "runs":
        rows = runs_rows(reports, table.keys, table.figures, shown)
    else:
        rows = differences_rows(reports, table.keys, table.figures, shown, labels)
    return markdown_table(header(table, shown, labels), rows)


def _source(table: TableSection, runs: Sequence[Run], reports: Mapping[Run, Report]) -> str:
    """Return what a table is of: figures, scenarios, requests and seeds; and what it lacks."""
    sources = ", ".join(dict.fromkeys(run.source for run in reports))
    requests, seeds = (_each(reports.values(), key) for key in ("requests", "seeds"))
    text = f"`loadgen results --only {table.name}`: {sources}; {requests} requests a seed, seeds: {seeds}."
    if table.layout == "runs":
        text += f" In each cell: {' / '.join(FIGURES[name].heading for name in table.figures)}."
    lacking = [run.name for run in runs if run not in reports]
    if not lacking:
        return text
    many = f"{len(lacking)} of {len(runs)} runs"
    return f"{text} Not there: {', '.join(lacking) if len(lacking) <= _LISTED_MAX else many}."


def _each(reports: Iterable[Report], key: str) -> str:
    """Return a number of each report, or from which to which they are where they are many."""
    values = [int(report.scenario.get(key) or 0) for report in reports]
    if min(values) == max(values):
        return f"{values[0]:,}"
    if len(values) > _LISTED_MAX:
        return f"{min(values):,} to {max(values):,}"
    return " / ".join(f"{value:,}" for value in values)
