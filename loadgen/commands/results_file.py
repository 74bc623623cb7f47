"""Experiments (TOML): runs of ``loadgen simulate``, and the tables that are made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from brproxy.types import InvalidInputError
from brproxy.validation import Disagreement, Section, load_toml, refuse, validate
from loadgen.commands.simulation_plan import SimulationPlan, plan_simulation
from loadgen.report.markdown import FIGURES, KEYS

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
Number = Annotated[float, Field(strict=False)]


@dataclass(frozen=True, slots=True)
class Run:
    """One call of ``loadgen simulate``; None and no policies: as the scenario says."""

    name: str
    scenario: Path
    policies: tuple[str, ...] = ()
    workers: int | None = None
    rate: float | None = None
    requests_per_worker: int | None = None
    seeds: int | None = None
    trace: str = ""

    def plan(self, traces: Path | None) -> SimulationPlan | None:
        """Return what is to be simulated; None: its trace is not in ``traces``. Raises InvalidInputError."""
        trace = self._trace(traces)
        return None if self.trace and trace is None else self.simulation(trace)

    def simulation(self, trace: Path | None = None) -> SimulationPlan:
        """Return what is to be simulated, with the requests of ``trace``; raises InvalidInputError."""
        policies = ",".join(self.policies) or None
        plan = plan_simulation(self.scenario, policies, None, trace, self.workers, self.rate)
        return plan.with_requests(self.requests_per_worker)

    @property
    def source(self) -> str:
        """Return where its requests and its deployment are from, by file names."""
        return f"{self.trace} on {self.scenario.name}" if self.trace else self.scenario.name

    def arguments(self, traces: Path | None) -> list[str]:
        """Return the arguments of ``loadgen simulate`` that do the same, but for where it writes."""
        trace = self._trace(traces)
        options = {
            "scenario": self.scenario,
            "policies": ",".join(self.policies) or None,
            "trace": trace,
            "workers": self.workers,
            "rate": None if self.rate is None else f"{self.rate:g}",
            "requests-per-worker": self.requests_per_worker,
            "seeds": self.seeds,
        }
        given = ((f"--{name}", str(value)) for name, value in options.items() if value is not None)
        return ["simulate", *(part for option in given for part in option)]

    def _trace(self, traces: Path | None) -> Path | None:
        path = traces / self.trace if traces is not None and self.trace else None
        return path if path is not None and path.exists() else None


class RunSection(Section):
    """A run, or one for each of ``workers`` and of ``rates``."""

    name: Name
    scenario: str = Field(description="Scenario file, relative to this one.")
    policies: str = Field(default="", description="One of the lists; left out: the scenario's.")
    workers: list[int] = Field(default_factory=list, description="DP workers; left out: the scenario's.")
    rates: list[Number] = Field(
        default_factory=list, description="Shares of the perfect capacity; left out: the scenario's."
    )
    requests_per_worker: int | None = Field(default=None, ge=1)
    seeds: int | None = Field(default=None, ge=1, le=1000)
    trace: str = Field(default="", description="File or folder in the folder of traces, in place of a law.")

    def runs(self, folder: Path, policies: Sequence[str] = ()) -> Iterator[Run]:
        """Yield its runs with those ``policies``, of scenarios in ``folder``."""
        sizes: list[int | None] = [*self.workers] or [None]
        loads: list[float | None] = [*self.rates] or [None]
        for workers, rate in product(sizes, loads):
            size = "" if workers is None else f"-g{workers}"
            load = "" if rate is None else f"-{rate:g}"
            yield Run(
                *(self.name + size + load, folder / self.scenario, tuple(policies), workers, rate),
                *(self.requests_per_worker, self.seeds, self.trace),
            )


class TableSection(Section):
    """A table; ``layout`` is how it is laid out, as ``loadgen.report.markdown`` has them."""

    name: Name
    runs: list[str] = Field(min_length=1, description="Names of runs, or patterns of them.")
    layout: Literal["policies", "runs", "differences"] = "policies"
    policies: list[str] = Field(default_factory=list, description="Shown, in order; left out: all.")
    keys: list[str] = Field(default_factory=list, description="Of the scenario, to tell runs apart.")
    figures: list[str] = Field(min_length=1)

    def has(self, run: str) -> bool:
        """Tell whether a run is in it."""
        return any(fnmatchcase(run, pattern) for pattern in self.runs)

    def mistakes(self, runs: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yield what is wrong beside those ``runs``: a key and a text."""
        known: tuple[tuple[str, list[str], Mapping[str, object]], ...] = (
            ("figures", self.figures, FIGURES),
            ("keys", self.keys, KEYS),
        )
        for key, names, allowed in known:
            for name in names:
                if name not in allowed:
                    yield key, f"unknown {name!r}; allowed: {', '.join(allowed)}"
        for pattern in self.runs:
            if not any(fnmatchcase(run, pattern) for run in runs):
                yield "runs", f"no run is called {pattern!r}"
        if self.layout == "differences" and len(self.policies) < 2:
            yield "policies", "differences need a policy and others to compare it with"


class PanelsSection(Section):
    """What a row of the picture's panels shows, one for each policy."""

    scenario: str = Field(description="Scenario file, relative to this one.")
    policies: list[str] = Field(min_length=1)
    workers: int = Field(ge=1)
    requests_per_worker: int | None = Field(default=None, ge=1)

    def run(self, folder: Path) -> Run:
        """Return it as a run, of a scenario in ``folder``."""
        return Run(
            *("", folder / self.scenario, tuple(self.policies), self.workers),
            requests_per_worker=self.requests_per_worker,
        )


@dataclass(frozen=True, slots=True)
class Picture:
    """What the rows of the picture's panels show."""

    loads: Run
    prefill: Run


class PictureSection(Section):
    """The picture of why: what workers hold, and who prefills when."""

    loads: PanelsSection
    prefill: PanelsSection

    def picture(self, folder: Path) -> Picture:
        """Return it as runs, of scenarios in ``folder``."""
        return Picture(self.loads.run(folder), self.prefill.run(folder))


class ResultsFile(Section):
    """A whole file of experiments."""

    labels: dict[str, str] = Field(default_factory=dict, description="What tables call policies.")
    policies: dict[str, list[str]] = Field(default_factory=dict, description="Lists of them, by name.")
    run: list[RunSection] = Field(min_length=1)
    table: list[TableSection] = Field(min_length=1)
    picture: PictureSection | None = None

    @model_validator(mode="after")
    def _agree(self) -> ResultsFile:
        refuse(self._disagreements())
        return self

    def _disagreements(self) -> Iterator[Disagreement]:
        for number, section in enumerate(self.run):
            if section.policies and section.policies not in self.policies:
                text = f"unknown list {section.policies!r}; known are {', '.join(self.policies)}"
                yield Disagreement(("run", number, "policies"), text)
        runs = [run.name for section in self.run for run in section.runs(Path())]
        for number, table in enumerate(self.table):
            for key, text in table.mistakes(runs):
                yield Disagreement(("table", number, key), text)
        for kind, names in (("run", runs), ("table", [table.name for table in self.table])):
            for name, times in Counter(names).items():
                if times > 1:
                    yield Disagreement((kind,), f"{times} are called {name!r}")


@dataclass(frozen=True, slots=True)
class Experiments:
    """What a file has, runs one by one; ``chosen`` of them are to be simulated.

    ``labels`` are what tables call policies; ``picture`` None: there is none.
    """

    runs: tuple[Run, ...]
    chosen: tuple[Run, ...]
    tables: tuple[TableSection, ...]
    labels: Mapping[str, str]
    picture: Picture | None = None

    def only(self, names: Sequence[str]) -> Experiments:
        """Choose the tables called ``names`` with all their runs, and runs called so with their tables.

        No names: all. Raises InvalidInputError.
        """
        if not names:
            return self
        known = sorted({run.name for run in self.runs} | {table.name for table in self.tables})
        for name in names:
            if name not in known:
                msg = f"no table or run is called {name!r}; known are {', '.join(known)}"
                raise InvalidInputError(msg)
        named_tables = [table for table in self.tables if table.name in names]
        named_runs = [run for run in self.runs if run.name in names]
        chosen = (
            run
            for run in self.runs
            if run in named_runs or any(table.has(run.name) for table in named_tables)
        )
        tables = (
            table
            for table in self.tables
            if table in named_tables or any(table.has(run.name) for run in named_runs)
        )
        return replace(self, chosen=tuple(chosen), tables=tuple(tables))

    def shortened(self, seeds: int | None, requests_per_worker: int | None) -> Experiments:
        """Return the same with so many seeds and requests in every run; None: as it is."""

        def short(run: Run) -> Run:
            requests = requests_per_worker or run.requests_per_worker
            return replace(run, seeds=seeds or run.seeds, requests_per_worker=requests)

        runs, chosen = (tuple(map(short, some)) for some in (self.runs, self.chosen))
        picture = self.picture and Picture(short(self.picture.loads), short(self.picture.prefill))
        return replace(self, runs=runs, chosen=chosen, picture=picture)


def load_experiments(path: Path) -> Experiments:
    """Read and check a file of experiments; raises ConfigError, a line for each mistake."""
    file = validate(ResultsFile, load_toml(path), str(path))
    runs = tuple(
        run
        for section in file.run
        for run in section.runs(path.parent, file.policies.get(section.policies, ()))
    )
    panels = file.picture
    picture = panels.picture(path.parent) if panels else None
    return Experiments(runs, runs, tuple(file.table), file.labels, picture)
