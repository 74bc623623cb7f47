"""How near the cluster model comes to a real deployment: a run of vLLM replayed, and figures of both.

A run is a folder: ``requests.jsonl`` (a request a line: ``input_toks``, ``output_toks``, and when it was
``queued_ts``, got its ``first_token_ts`` and its ``last_token_ts``, in seconds of one clock), ``meta.json``
(``engine_kwargs`` with ``data_parallel_size``, ``max_num_seqs`` and ``max_num_batched_tokens``) and
``attention.csv`` under any name that begins so: measured times of one layer's attention (``prefill_chunk``,
``kv_prefill``, ``n_decode``, ``kv_decode``, ``time_us``).

What a KV token costs, alone and under prefill, is the attention's; the other costs of a step are fitted to
the first half of the requests: how long each took to decode is a sum over the steps in which it ran. Which
steps those were depends on the costs, so that fitting and simulating take turns. The second half judges.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from brproxy.types import InvalidInputError
from loadgen.cluster_settings import ClusterSettings, FloatArray
from loadgen.simulator import SimulatedPolicy, Simulation, simulate
from loadgen.workload import TraceRequest, Workload

BoolArray = NDArray[np.bool_]

REQUESTS_MAX = 1_000_000
ATTENTION_ROWS_MAX = 1_000_000
ROUNDS = 12
"""So often fitting and simulating take turns: the costs change by less than 0.1 % in the last."""

_BASE_S_MIN = 1e-4
_NOISE_US = 20.0
"""Decodes that take less than so much longer than none say nothing about a factor."""


@dataclass(frozen=True, slots=True)
class RealRun:
    """Requests in order of arrival, and when each had its first and its last token, float64[N]."""

    workload: Workload
    first_s: FloatArray
    last_s: FloatArray
    cluster: ClusterSettings

    @property
    def arrival_s(self) -> FloatArray:
        """Return when each request was queued, float64[N]."""
        return np.array([request.arrival_s for request in self.workload.requests])

    @property
    def outputs(self) -> FloatArray:
        """Return the output tokens of each request, float64[N]."""
        return np.array([request.output_tokens for request in self.workload.requests], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a run: measured, and as it is simulated."""

    name: str
    measured: float
    simulated: float

    @property
    def error(self) -> float:
        """Return the simulated figure's relative error."""
        return self.simulated / self.measured - 1


def read_run(folder: Path, layers: int) -> RealRun:
    """Read a run; ``layers`` of attention make a step of the model. Raises InvalidInputError."""
    s_per_kv_token, factor = attention_costs(_attention_file(folder), layers)
    workload, first_s, last_s = _requests(folder / "requests.jsonl")
    engine = _engine(folder / "meta.json")
    cluster = ClusterSettings(
        workers=engine["data_parallel_size"],
        slots=engine["max_num_seqs"],
        step_s_per_kv_token=s_per_kv_token,
        prefill_tokens_max=engine["max_num_batched_tokens"],
        decode_factor_under_prefill=factor,
    )
    return RealRun(workload, first_s, last_s, cluster)


def attention_costs(path: Path, layers: int) -> tuple[float, float]:
    """Return what a KV token costs a step (s), and how many times as much beside a prefill.

    The first is the slope over decodes alone; the second the median over what a decode adds to each prefill,
    by what it takes alone. Raises InvalidInputError.
    """
    alone: dict[tuple[int, int], float] = {}
    prefill: dict[tuple[int, int], float] = {}
    both: list[tuple[tuple[int, int], tuple[int, int], float]] = []
    for chunk, before, count, each, time_us in _attention_rows(path):
        if not chunk:
            alone[count, each] = time_us
        elif not count:
            prefill[chunk, before] = time_us
        else:
            both.append(((chunk, before), (count, each), time_us))
    kv_tokens = np.array([count * each for count, each in alone], dtype=np.float64)
    if len(set(kv_tokens.tolist())) < 2:
        raise InvalidInputError(f"{path}: must have decodes of two sizes without a prefill beside them")
    slope_us, none_us = np.polyfit(kv_tokens, list(alone.values()), 1).tolist()
    ratios = [
        (time_us - prefill[before]) / (alone[decode] - none_us)
        for before, decode, time_us in both
        if before in prefill and decode in alone and alone[decode] - none_us > _NOISE_US
    ]
    factor = float(np.median(ratios)) if ratios else 1.0
    if slope_us <= 0:
        raise InvalidInputError(f"{path}: more KV tokens must take longer, a token takes {slope_us} µs")
    return layers * slope_us / 1e6, max(1.0, factor)


def replay(run: RealRun, policy: SimulatedPolicy, cluster: ClusterSettings) -> Simulation:
    """Simulate the run's requests, at their own times."""
    return simulate(run.workload, cluster, policy, seed=0, keep_loads=True)


def fitted(run: RealRun, policy: SimulatedPolicy) -> ClusterSettings:
    """Return the run's deployment with the costs that fit the first half of its requests best."""
    cluster = run.cluster
    half = halves(run)[0]
    for _ in range(ROUNDS):
        costs = _fit(run, replay(run, policy, cluster), cluster, half)
        base_s, per_prefill_s, per_request_s = np.maximum(costs, (_BASE_S_MIN, 0.0, 0.0)).tolist()
        # Half of the way each time: a whole one overshoots, as longer steps hold more requests.
        cluster = replace(
            cluster,
            step_base_s=(cluster.step_base_s + base_s) / 2,
            prefill_s_per_token=(cluster.prefill_s_per_token + per_prefill_s) / 2,
            step_s_per_request=(cluster.step_s_per_request + per_request_s) / 2,
        )
    return cluster


def halves(run: RealRun) -> tuple[BoolArray, BoolArray]:
    """Return which requests are fitted and which judge, bool[N]: the first and the second half to arrive."""
    first = np.arange(len(run.first_s)) < len(run.first_s) // 2
    return first, ~first


def judge(run: RealRun, simulation: Simulation, which: BoolArray) -> list[Figure]:
    """Return the figures of ``which`` requests, measured and simulated; rates are of the whole run."""
    several = which & (run.outputs > 1)
    measured_tpot_s = ((run.last_s - run.first_s)[several]) / (run.outputs[several] - 1)
    latencies = (
        ("TTFT", (run.first_s - run.arrival_s)[which], simulation.ttft_s[which]),
        ("TPOT", measured_tpot_s, simulation.tpot_s[several]),
    )
    figures = []
    for name, measured_s, simulated_s in latencies:
        figures.append(Figure(f"{name} mean (ms)", *_ms(measured_s.mean(), simulated_s.mean())))
        for percent in (50, 95):
            pair = (np.percentile(values, percent) for values in (measured_s, simulated_s))
            figures.append(Figure(f"{name} P{percent} (ms)", *_ms(*pair)))
    simulated_last_s = _last_s(run, simulation)
    for name, share in (("to the end", 1.0), ("to 90 % done", 0.9)):
        rates = (_tokens_per_s(run, last_s, share) for last_s in (run.last_s, simulated_last_s))
        figures.append(Figure(f"tokens/s {name}", *rates))
    return figures


def _fit(run: RealRun, simulation: Simulation, cluster: ClusterSettings, which: BoolArray) -> FloatArray:
    """Return the costs of a step, of a prefill token and of a request that explain the decodes best."""
    loads = simulation.loads
    work = [cluster.work(*step).max() for step in zip(loads.kv_tokens, loads.prefill_tokens, strict=True)]
    requests = [cluster.bucket(int(count)) for count in loads.requests.max(axis=1)]
    steps = np.column_stack(
        (np.ones(len(work)), loads.prefill_tokens.max(axis=1), np.array(requests), np.array(work))
    )
    sums = np.vstack((np.zeros(4), np.cumsum(steps, axis=0)))
    # A token comes with the end of a step, in which the next one begins.
    first, last = (
        np.searchsorted(loads.start_s, times_s - 1e-9)
        for times_s in (run.arrival_s + simulation.ttft_s, _last_s(run, simulation))
    )
    between = sums[last] - sums[first]
    took_s = run.last_s - run.first_s
    rows = which & (took_s > 0)
    known_s = cluster.step_s_per_kv_token * between[:, 3]
    # Relative errors: long answers have more steps and no better clock.
    weights = 1 / took_s[rows]
    matrix = between[rows, :3] * weights[:, None]
    costs: FloatArray = np.linalg.lstsq(matrix, (took_s - known_s)[rows] * weights, rcond=None)[0]
    return costs


def _last_s(run: RealRun, simulation: Simulation) -> FloatArray:
    more: FloatArray = np.nan_to_num(simulation.tpot_s) * (run.outputs - 1)
    return run.arrival_s + simulation.ttft_s + more


def _tokens_per_s(run: RealRun, last_s: FloatArray, share: float) -> float:
    """Return the rate at which the answers came that were done when ``share`` of the requests were."""
    end_s = float(np.quantile(last_s, share, method="higher"))
    return float(run.outputs[last_s <= end_s].sum()) / (end_s - float(run.arrival_s[0]))


def _ms(*seconds: float) -> tuple[float, ...]:
    return tuple(float(value) * 1e3 for value in seconds)


def _attention_file(folder: Path) -> Path:
    found = sorted(folder.glob("attention*.csv"))
    if len(found) != 1:
        raise InvalidInputError(f"{folder}: must hold one file attention*.csv, holds {len(found)}")
    return found[0]


def _attention_rows(path: Path) -> Iterator[tuple[int, int, int, int, float]]:
    columns = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
    with _opened(path) as file:
        rows = csv.DictReader(file)
        for row in rows:
            if rows.line_num > ATTENTION_ROWS_MAX:
                raise InvalidInputError(f"{path}: has more than {ATTENTION_ROWS_MAX} rows")
            try:
                *sizes, time_us = (float(row[column]) for column in columns)
            except (KeyError, TypeError, ValueError) as error:
                msg = f"{path}:{rows.line_num}: must have numbers for {', '.join(columns)}"
                raise InvalidInputError(msg) from error
            chunk, before, count, each = (int(size) for size in sizes)
            yield chunk, before, count, each, time_us


def _requests(path: Path) -> tuple[Workload, FloatArray, FloatArray]:
    keys = ("queued_ts", "first_token_ts", "last_token_ts", "input_toks", "output_toks")
    rows: list[tuple[float, ...]] = []
    with _opened(path) as file:
        for line, text in enumerate(file, start=1):
            if line > REQUESTS_MAX:
                raise InvalidInputError(f"{path}: has more than {REQUESTS_MAX} requests")
            try:
                row = orjson.loads(text)
                values = tuple(float(row[key]) for key in keys)
            except (KeyError, TypeError, ValueError) as error:
                raise InvalidInputError(f"{path}:{line}: must be an object with {', '.join(keys)}") from error
            if not values[0] < values[1] <= values[2]:
                raise InvalidInputError(f"{path}:{line}: tokens must come after the request, in order")
            rows.append(values)
    if len(rows) < 2:
        raise InvalidInputError(f"{path}: must have at least 2 requests, one to fit and one to judge")
    rows.sort()
    queued_s, first_s, last_s, prompts, outputs = np.array(rows).T
    requests = zip((queued_s - queued_s[0]).tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    workload = Workload(
        path.parent.name,
        tuple(TraceRequest(at_s, int(prompt), int(output)) for at_s, prompt, output in requests),
    )
    return workload, first_s - queued_s[0], last_s - queued_s[0]


def _engine(path: Path) -> dict[str, int]:
    keys = ("data_parallel_size", "max_num_seqs", "max_num_batched_tokens")
    with _opened(path) as file:
        try:
            document: dict[str, Any] = orjson.loads(file.read())
            return {key: int(document["engine_kwargs"][key]) for key in keys}
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInputError(f"{path}: must have engine_kwargs with {', '.join(keys)}") from error


def _opened(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8", newline="")
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read: {error.strerror}") from error
