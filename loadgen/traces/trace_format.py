"""The interface of a trace format, and loading a file in whichever format it is in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import ClassVar, TextIO, TypeVar

from brproxy.registry import Registry
from brproxy.types import InvalidInputError
from loadgen.workload import TraceRequest, Workload

HEAD_CHARS = 4096
"""How much of a file a format may look at to recognise it."""


class TraceError(InvalidInputError):
    """A trace that cannot be used; the text names file and line."""


class RowError(InvalidInputError):
    """One row that is not what the format says; ``line`` counts from 1."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


class TraceFormat(ABC):
    """Reads one format. ``HAS_TIMES``: its rows say when they arrived."""

    HAS_TIMES: ClassVar[bool]

    @abstractmethod
    def recognises(self, head: str) -> bool:
        """Tell from the first HEAD_CHARS characters of a file whether it is in this format."""

    @abstractmethod
    def read(self, file: TextIO) -> Iterator[TraceRequest | None]:
        """Yield a request for each row, None for one without a prompt or an output (a failed request).

        ``arrival_s`` may count from any origin. Raises RowError.
        """


FORMATS: Registry[type[TraceFormat]] = Registry("trace format", "loadgen.traces.formats")

F = TypeVar("F", bound=TraceFormat)


def register_format(name: str) -> Callable[[type[F]], type[F]]:
    """Return a class decorator that files a format under ``name``."""

    def add(trace_format: type[F]) -> type[F]:
        FORMATS.register(name)(trace_format)
        return trace_format

    return add


@dataclass(frozen=True, slots=True)
class LoadedTrace:
    """A trace as a workload; ``rows_skipped`` had no prompt or no output."""

    workload: Workload
    format: str
    has_times: bool
    rows_skipped: int


def load_trace(path: Path, limit: int | None = None) -> LoadedTrace:
    """Read the first ``limit`` usable rows of a trace (None: all); raises TraceError.

    The format is told from the content, not from the file's name. Requests are sorted by arrival and their
    times count from the first one.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            head = file.read(HEAD_CHARS)
            name = _recognise(path, head)
            file.seek(0)
            trace_format = FORMATS.get(name)()
            return _load(path, file, name, trace_format, limit)
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise TraceError(msg) from error
    except UnicodeDecodeError as error:
        msg = f"{path}: must be UTF-8 text: byte {error.start} is not"
        raise TraceError(msg) from error


def _recognise(path: Path, head: str) -> str:
    if not head.strip():
        msg = f"{path}: is empty; a trace needs at least one request"
        raise TraceError(msg)
    for name in FORMATS.names():
        if FORMATS.get(name)().recognises(head):
            return name
    msg = f"{path}:1: not a trace in a known format; known are {', '.join(FORMATS.names())}"
    raise TraceError(msg)


def _load(path: Path, file: TextIO, name: str, trace_format: TraceFormat, limit: int | None) -> LoadedTrace:
    requests: list[TraceRequest] = []
    skipped = 0
    try:
        for request in trace_format.read(file):
            if request is None:
                skipped += 1
                continue
            requests.append(request)
            if len(requests) == limit:
                break
    except RowError as error:
        msg = f"{path}:{error.line}: {error}"
        raise TraceError(msg) from error
    if not requests:
        msg = f"{path}: has no request with a prompt and an output; {skipped} rows were skipped"
        raise TraceError(msg)
    first_s = min(request.arrival_s for request in requests)
    shifted = (replace(request, arrival_s=request.arrival_s - first_s) for request in requests)
    in_order = tuple(sorted(shifted, key=lambda request: request.arrival_s))
    return LoadedTrace(Workload(path.stem, in_order), name, trace_format.HAS_TIMES, skipped)


def count_field(line: int, field: str, text: object) -> int:
    """Return a token count; raises RowError naming the field."""
    try:
        number = float(text) if isinstance(text, str | int | float) else float("nan")
    except ValueError:
        number = float("nan")
    if not number.is_integer() or number < 0:
        raise RowError(line, f"{field} must be a whole number of tokens, at least 0, got {text!r}")
    return int(number)


def make_request(
    line: int, arrival_s: float, prompt_tokens: int, output_tokens: int, prompt_key: int | None = None
) -> TraceRequest | None:
    """Return the request, None when it has no prompt or no output; raises RowError."""
    if prompt_tokens == 0 or output_tokens == 0:
        return None
    try:
        return TraceRequest(arrival_s, prompt_tokens, output_tokens, prompt_key)
    except InvalidInputError as error:
        raise RowError(line, str(error)) from error


def head_lines(head: str, lines: int) -> list[str]:
    """Return the first complete ``lines`` lines of a file's head."""
    return list(islice(head.splitlines(), lines))
