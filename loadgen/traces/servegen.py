"""servegen: a service as a folder of its clients (alibaba/ServeGen, arXiv 2505.09999), drawn each time.

Each client has two files. ``chunk-N-trace.csv`` says how its requests arrive, a row for each window of time:
start (s), requests a second, coefficient of variation, and the law of the gaps between them (Gamma or
Weibull, with shape and scale). ``chunk-N-dataset.json`` has for each start of a longer window the
distributions of lengths, ``{"input_tokens": "{tokens: probability, …}", "output_tokens": …}``.
"""

from __future__ import annotations

import csv
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from brproxy.types import TOKENS_MAX
from loadgen.traces.trace_format import LoadedTrace, TraceError
from loadgen.workload import TraceRequest, Workload

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

CLIENTS_MAX = 10_000
FILE_BYTES_MAX = 64 * 2**20
REQUESTS_PER_WINDOW_MAX = 5_000_000
REQUESTS_MAX = 20_000_000
"""More clients, larger files or more requests are no service that a simulation could follow."""

_TRACE_NAME = re.compile(r"chunk-(\d+)-trace\.csv")
_WINDOW_S = 600.0
"""Length of a client's only window."""


@dataclass(frozen=True, slots=True)
class _Window:
    start_s: float
    length_s: float
    requests: float
    law: str
    shape: float

    def arrivals(self, rng: np.random.Generator) -> FloatArray:
        """Draw when the window's requests arrive: as many as there were, with gaps that are as uneven."""
        count = int(self.requests + rng.random())
        if not count:
            return np.empty(0)
        draw = rng.weibull if self.law == "Weibull" else rng.gamma
        # The gap behind the last one ends the window. The law's scale falls out: their sum is the window.
        gaps = np.maximum(draw(self.shape, size=count + 1), np.finfo(np.float64).tiny)
        arrivals: FloatArray = self.start_s + self.length_s * (np.cumsum(gaps)[:-1] / gaps.sum())
        return arrivals


@dataclass(frozen=True, slots=True)
class _Lengths:
    tokens: IntArray
    probabilities: FloatArray

    def draw(self, count: int, rng: np.random.Generator) -> IntArray:
        return rng.choice(self.tokens, count, p=self.probabilities)


@dataclass(frozen=True, slots=True)
class _Client:
    user: str
    windows: tuple[_Window, ...]
    lengths_from_s: tuple[float, ...]
    lengths: tuple[tuple[_Lengths, _Lengths], ...]

    def draw(self, window: _Window, rng: np.random.Generator) -> Iterator[TraceRequest]:
        """Draw the requests of one of its windows."""
        arrivals_s = window.arrivals(rng)
        place = max(0, bisect_right(self.lengths_from_s, window.start_s) - 1)
        prompts, outputs = (law.draw(len(arrivals_s), rng).tolist() for law in self.lengths[place])
        for arrival_s, prompt, output in zip(arrivals_s.tolist(), prompts, outputs, strict=True):
            yield TraceRequest(arrival_s, prompt, output, user=self.user)


def load_servegen(folder: Path, requests: int | None, rng: np.random.Generator) -> LoadedTrace:
    """Draw the first ``requests`` requests (None: all) of a folder's clients, each of them a user.

    Every client draws from a generator of its own, so that it does the same whoever is there beside it.
    Raises TraceError.
    """
    clients = _clients(folder)
    rngs = rng.spawn(len(clients))
    due = sorted(
        ((window.start_s, i, window) for i, client in enumerate(clients) for window in client.windows),
        key=lambda item: item[:2],
    )
    drawn: list[TraceRequest] = []
    for number, (start_s, i, window) in enumerate(due):
        # A window that begins later has nothing earlier.
        if requests is not None and len(drawn) >= requests and start_s > due[number - 1][0]:
            drawn = sorted(drawn, key=_arrival)[:requests]
            if drawn[-1].arrival_s <= start_s:
                break
        drawn += clients[i].draw(window, rngs[i])
        if len(drawn) > REQUESTS_MAX:
            raise TraceError(f"{folder}: more than {REQUESTS_MAX} requests are drawn")
    if not drawn:
        raise TraceError(f"{folder}: its clients have no requests")
    drawn = sorted(drawn, key=_arrival)[:requests]
    first_s = drawn[0].arrival_s
    shifted = tuple(
        TraceRequest(r.arrival_s - first_s, r.prompt_tokens, r.output_tokens, user=r.user) for r in drawn
    )
    return LoadedTrace(Workload(folder.name, shifted), "servegen", has_times=True, rows_skipped=0)


def _arrival(request: TraceRequest) -> float:
    return request.arrival_s


def _clients(folder: Path) -> list[_Client]:
    try:
        names = sorted(
            (int(match[1]), path) for path in folder.iterdir() if (match := _TRACE_NAME.fullmatch(path.name))
        )
    except OSError as error:
        raise TraceError(f"{folder}: cannot be read: {error.strerror}") from error
    if not 0 < len(names) <= CLIENTS_MAX:
        msg = (
            f"{folder}: must hold 1 to {CLIENTS_MAX} files chunk-N-trace.csv, a client each, has {len(names)}"
        )
        raise TraceError(msg)
    return [_client(number, path) for number, path in names]


def _client(number: int, path: Path) -> _Client:
    dataset = path.with_name(f"chunk-{number}-dataset.json")
    windows = tuple(_windows(path))
    lengths = dict(sorted(_lengths(dataset)))
    if windows and not lengths:
        raise TraceError(f"{dataset}: has no lengths for the requests in {path.name}")
    return _Client(f"client-{number}", windows, tuple(lengths), tuple(lengths.values()))


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise TraceError(f"{path}: is larger than {FILE_BYTES_MAX} bytes")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: must be UTF-8 text: byte {error.start} is not") from error


def _windows(path: Path) -> Iterator[_Window]:
    """Yield the windows with requests; raises TraceError."""
    rows: list[tuple[int, float, float, str, float]] = []
    for line, row in enumerate(csv.reader(_text(path).splitlines()), start=1):
        if not row:
            continue
        if len(row) != 6:
            raise TraceError(f"{path}:{line}: must have 6 columns, has {len(row)}")
        start_s, rate = _number(path, line, "start", row[0]), _number(path, line, "rate", row[1])
        if rows and start_s <= rows[-1][1]:
            raise TraceError(f"{path}:{line}: windows must follow one another, {start_s} does not")
        shape = _number(path, line, "shape", row[4])
        if rate and (row[3] not in {"Gamma", "Weibull"} or not shape):
            raise TraceError(f"{path}:{line}: gaps must be Gamma or Weibull with a shape, got {row[3]!r}")
        rows.append((line, start_s, rate, row[3], shape))
    starts = [start_s for _, start_s, *_ in rows]
    lengths_s = [after - before for before, after in pairwise(starts)] or [_WINDOW_S]
    for (line, start_s, rate, law, shape), length_s in zip(rows, [*lengths_s, lengths_s[-1]], strict=False):
        if rate * length_s > REQUESTS_PER_WINDOW_MAX:
            raise TraceError(f"{path}:{line}: {rate} requests a second for {length_s} s are too many")
        if rate:
            yield _Window(start_s, length_s, rate * length_s, law, shape)


def _number(path: Path, line: int, column: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 <= number < float("inf"):
        raise TraceError(f"{path}:{line}: {column} must be a number, at least 0, got {text!r}")
    return number


def _lengths(path: Path) -> Iterator[tuple[float, tuple[_Lengths, _Lengths]]]:
    """Yield from when on which lengths hold, without times at which there were no requests."""
    try:
        document = orjson.loads(_text(path))
    except orjson.JSONDecodeError as error:
        raise TraceError(f"{path}:{error.lineno}: must be a JSON object: {error.msg}") from error
    if not isinstance(document, dict):
        raise TraceError(f"{path}: must be a JSON object, with a window's start for each key")
    for start, laws in document.items():
        prompts, outputs = (_histogram(path, start, laws, key) for key in ("input_tokens", "output_tokens"))
        if prompts is not None and outputs is not None:
            yield _number(path, 1, "a window's start", start), (prompts, outputs)


def _histogram(path: Path, start: str, laws: object, key: str) -> _Lengths | None:
    """Read ``{tokens: probability, …}``, which is Python's notation and no JSON; None: an empty one."""
    text = laws.get(key) if isinstance(laws, dict) else None
    where = f"{path}: {key} from {start} s on"
    if not isinstance(text, str) or not (text.startswith("{") and text.endswith("}")):
        raise TraceError(f"{where} must be a text like '{{12: 0.5, 13: 0.5}}'")
    pairs = [pair.split(":") for pair in text[1:-1].split(",") if pair.strip()]
    try:
        tokens = np.array([int(pair[0]) for pair in pairs], dtype=np.int64)
        weights = np.array([float(pair[1]) for pair in pairs], dtype=np.float64)
    except (ValueError, IndexError, OverflowError) as error:
        raise TraceError(f"{where} must be a text like '{{12: 0.5, 13: 0.5}}'") from error
    # An engine has no request without a prompt or an output.
    weights = np.where((tokens < 1) | (tokens > TOKENS_MAX), 0.0, weights)
    total = float(weights.sum())
    if not pairs or total == 0:
        return None
    if not np.isfinite(total) or weights.min() < 0:
        raise TraceError(f"{where} must have probabilities that are at least 0")
    return _Lengths(tokens, weights / total)
