"""Bars of progress."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loadgen.client import Outcome


class Bars:
    """A progress bar for each policy, on standard error: tables go to standard output."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[lost]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._lost = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def begin(self, name: str, requests: int) -> None:
        """Start the bar of ``name``; later calls of ``finished`` count on it."""
        # Not before the first policy: mistakes in the arguments are reported without an empty display.
        self._progress.start()
        self._lost = 0
        self._task = self._progress.add_task(name, total=requests, lost="")

    def advance(self, _name: str) -> None:
        """Count something that is done."""
        self._progress.update(self._task, advance=1)

    def finished(self, outcome: Outcome) -> None:
        """Count a request."""
        self._lost += outcome.failure is not None
        lost = f"{self._lost} lost" if self._lost else ""
        self._progress.update(self._task, advance=1, lost=lost)
