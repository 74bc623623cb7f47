"""Folders of clients: drawn with their lengths and bursts, refused in one line."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from brproxy.types import PendingRequest
from loadgen.cli import app
from loadgen.commands.scenario import WorkloadChoice
from loadgen.simulator import pending_request
from loadgen.traces import servegen
from loadgen.traces.servegen import load_servegen
from loadgen.traces.trace_format import TraceError

# A steady client with short requests, and one with long ones that comes in bursts, in the second window only.
STEADY = "0,0.5,1.0,Gamma,1.0,2.0\n600,1.5,1.0,Gamma,1.0,0.67\n1200,0,0,,0,0\n"
BURSTY = "0,0,0,,0,0\n600,0.5,5.0,Weibull,0.3,0.2\n1200,0,0,,0,0\n"
SHORT = {"0": {"input_tokens": "{10: 0.5, 20: 0.5}", "output_tokens": "{5: 1.0}", "reason_ratio": "{}"}}
LONG = {
    "0": {"input_tokens": "{}", "output_tokens": "{}", "reason_ratio": "{}"},
    "300": {"input_tokens": "{0: 0.1, 1000: 0.9}", "output_tokens": "{700: 0.25, 900: 0.75}"},
}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "service"
    path.mkdir()
    for number, trace, dataset in ((0, STEADY, SHORT), (7, BURSTY, LONG)):
        (path / f"chunk-{number}-trace.csv").write_text(trace, encoding="utf-8")
        (path / f"chunk-{number}-dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    (path / "README.md").write_text("not a client", encoding="utf-8")
    return path


def draw(folder, requests=None, seed=0):
    return load_servegen(folder, requests, np.random.default_rng(seed)).workload


def test_each_client_has_its_rate_its_lengths_and_its_name(folder):
    workload = draw(folder)
    assert workload.name == "service"
    users = {user: [r for r in workload.requests if r.user == user] for user in ("client-0", "client-7")}
    assert [len(users["client-0"]), len(users["client-7"])] == [300 + 900, 300]
    assert {r.prompt_tokens for r in users["client-0"]} == {10, 20}
    assert {r.output_tokens for r in users["client-0"]} == {5}
    # No prompt is empty, though the file has some.
    assert {r.prompt_tokens for r in users["client-7"]} == {1000}
    assert np.mean([r.output_tokens == 900 for r in users["client-7"]]) == pytest.approx(0.75, abs=0.07)
    times = np.array([r.arrival_s for r in workload.requests])
    assert times[0] == 0
    assert (np.diff(times) >= 0).all()
    assert min(r.arrival_s for r in users["client-7"]) > 590


def test_bursts_are_as_they_were(folder):
    requests = draw(folder).requests
    spread = {}
    for user in ("client-0", "client-7"):
        times = [r.arrival_s for r in requests if r.user == user and r.arrival_s > 600]
        gaps = np.diff(times)
        spread[user] = gaps.std() / gaps.mean()
    assert spread["client-0"] == pytest.approx(1.0, abs=0.15)
    # Weibull with shape 0.3 has a coefficient of variation of 5.4.
    assert 3 < spread["client-7"] < 9


@pytest.mark.parametrize("requests", [1, 300, 301, 700, 5000])
def test_the_first_so_many_are_those_of_all(folder, requests):
    drawn, all_of_them = draw(folder, requests).requests, draw(folder).requests
    assert drawn == all_of_them[:requests]


def test_the_same_seed_draws_the_same(folder):
    assert draw(folder, 50, seed=3) == draw(folder, 50, seed=3)
    assert draw(folder, 50, seed=3) != draw(folder, 50, seed=4)


def test_the_router_is_told_the_user(folder):
    pending = pending_request(draw(folder, 1).requests[0])
    assert isinstance(pending, PendingRequest)
    assert pending.user == "client-0"


def test_a_folder_is_a_trace_of_the_command(folder, tmp_path):
    out = tmp_path / "out.json"
    scenario = tmp_path / "scenario.toml"
    scenario.write_text('policies = ["br-h"]\n[workload]\nrequests_per_worker = 20\n', encoding="utf-8")
    arguments = ["simulate", "--scenario", scenario, "--trace", folder, "--predictor", "hierarchical"]
    result = CliRunner().invoke(app, [str(a) for a in (*arguments, "--processes", 1, "--out", out)])
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text(encoding="utf-8"))
    assert (document["scenario"]["workload"], document["scenario"]["requests"]) == ("service", 160)
    workload, has_times = WorkloadChoice(trace=folder, requests=None).load(np.random.default_rng(0))
    assert (len(workload.requests), has_times) == (1500, True)


HISTOGRAM = "must be a text like '{12: 0.5, 13: 0.5}'"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("chunk-0-trace.csv", "0,1,1,Gamma,1\n", ":1: must have 6 columns, has 5"),
        (
            "chunk-0-trace.csv",
            "0,1,1,Gamma,1,1\n0,1,1,Gamma,1,1\n",
            ":2: windows must follow one another, 0.0",
        ),
        ("chunk-0-trace.csv", "0,-1,1,Gamma,1,1\n", ":1: rate must be a number, at least 0, got '-1'"),
        ("chunk-0-trace.csv", "x,1,1,Gamma,1,1\n", ":1: start must be a number, at least 0, got 'x'"),
        (
            "chunk-0-trace.csv",
            "0,1,1,Pareto,1,1\n",
            ":1: gaps must be Gamma or Weibull with a shape, got 'Pareto'",
        ),
        (
            "chunk-0-trace.csv",
            "0,1e9,1,Gamma,1,1\n",
            ":1: 1000000000.0 requests a second for 600.0 s are too many",
        ),
        ("chunk-0-trace.csv", b"\xff", ": must be UTF-8 text: byte 0 is not"),
        ("chunk-0-dataset.json", "{", ":1: must be a JSON object"),
        ("chunk-0-dataset.json", "[]", ": must be a JSON object, with a window's start for each key"),
        ("chunk-0-dataset.json", '{"0": {}}', f": input_tokens from 0 s on {HISTOGRAM}"),
        ("chunk-0-dataset.json", '{"0": 5}', f": input_tokens from 0 s on {HISTOGRAM}"),
        ("chunk-0-dataset.json", '{"0": {"input_tokens": "{5}", "output_tokens": "{}"}}', HISTOGRAM),
        ("chunk-0-dataset.json", '{"0": {"input_tokens": "{x: 1}", "output_tokens": "{}"}}', HISTOGRAM),
        (
            "chunk-0-dataset.json",
            '{"0": {"input_tokens": "{5: -1, 6: 2}", "output_tokens": "{5: 1}"}}',
            "must have probabilities that are at least 0",
        ),
        (
            "chunk-0-dataset.json",
            '{"0": {"input_tokens": "{5: 1}", "output_tokens": "{5: nan}"}}',
            "must have probabilities that are at least 0",
        ),
        ("chunk-0-dataset.json", "{}", ": has no lengths for the requests in chunk-0-trace.csv"),
        ("chunk-0-dataset.json", None, ": cannot be read: No such file or directory"),
    ],
)
def test_bad_folders(folder, name, text, words):
    path = folder / name
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TraceError) as error:
        draw(folder)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_limits(folder, monkeypatch, tmp_path):
    with pytest.raises(
        TraceError, match=r"must hold 1 to 10000 files chunk-N-trace\.csv, a client each, has 0"
    ):
        draw(tmp_path)
    with pytest.raises(TraceError, match="cannot be read: No such file or directory"):
        draw(tmp_path / "none")
    monkeypatch.setattr(servegen, "REQUESTS_MAX", 100)
    with pytest.raises(TraceError, match="more than 100 requests are drawn"):
        draw(folder)
    monkeypatch.setattr(servegen, "FILE_BYTES_MAX", 10)
    with pytest.raises(TraceError, match="is larger than 10 bytes"):
        draw(folder)
    (folder / "chunk-0-trace.csv").write_text("0,0,0,,0,0\n", encoding="utf-8")
    (folder / "chunk-7-trace.csv").unlink()
    monkeypatch.undo()
    with pytest.raises(TraceError, match="its clients have no requests"):
        draw(folder)
