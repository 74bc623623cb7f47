"""A run that the model itself made is understood: its costs come back, and its figures."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from brproxy.types import InvalidInputError
from loadgen.arrivals import with_gamma_arrivals
from loadgen.cli import app
from loadgen.cluster_settings import ClusterSettings
from loadgen.real_run import attention_costs, fitted, halves, judge, read_run, replay
from loadgen.simulator import SimulatedPolicy, simulate
from loadgen.workload import TraceRequest, Workload

LAYERS = 10
TRUE = ClusterSettings(
    workers=2,
    slots=16,
    step_base_s=0.017,
    step_s_per_kv_token=80e-9,
    prefill_s_per_token=25e-6,
    prefill_tokens_max=512,
    decode_factor_under_prefill=2.5,
    step_s_per_request=200e-6,
)
ROUTER = SimulatedPolicy("vllm-queue")


def attention():
    """Return measured times as the true costs have them, of one layer, with an intercept."""
    rows = ["prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"]
    per_token_us = TRUE.step_s_per_kv_token * 1e6 / LAYERS
    for count in (1, 8, 64):
        for each in (16, 1024, 16384):
            decode_us = per_token_us * count * each
            rows.append(f"0,0,{count},{each},{23 + decode_us}")
            rows += [f"{chunk},64,{count},{each},{chunk / 8 + 2.5 * decode_us}" for chunk in (256, 512)]
    rows += [f"{chunk},64,0,0,{chunk / 8}" for chunk in (256, 512)]
    return "\n".join(rows)


@pytest.fixture
def real(tmp_path):
    """Write a run that the model made, in the order of ids and not of arrivals."""
    rng = np.random.default_rng(5)
    sizes = zip(rng.integers(50, 2000, 160).tolist(), rng.integers(20, 250, 160).tolist(), strict=True)
    drawn = Workload("run", tuple(TraceRequest(0.0, prompt, output) for prompt, output in sizes))
    workload = with_gamma_arrivals(drawn, 6.0, 1.0, rng)
    run = simulate(workload, TRUE, ROUTER, 0)
    rows = []
    for i, request in enumerate(workload.requests):
        queued = 1000 + request.arrival_s
        first = queued + run.ttft_s[i]
        last = first + run.tpot_s[i] * (request.output_tokens - 1)
        row = {"input_toks": request.prompt_tokens, "output_toks": request.output_tokens}
        rows.append(row | {"queued_ts": queued, "first_token_ts": first, "last_token_ts": last})
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, rows[::-1])), encoding="utf-8")
    engine = {"data_parallel_size": 2, "max_num_seqs": 16, "max_num_batched_tokens": 512}
    (tmp_path / "meta.json").write_text(json.dumps({"engine_kwargs": engine}), encoding="utf-8")
    (tmp_path / "attention-tp1.csv").write_text(attention(), encoding="utf-8")
    return tmp_path


def test_the_costs_come_back(real):
    run = read_run(real, LAYERS)
    assert run.cluster.step_s_per_kv_token == pytest.approx(80e-9)
    assert run.cluster.decode_factor_under_prefill == pytest.approx(2.5)
    assert (run.cluster.workers, run.cluster.slots, run.cluster.prefill_tokens_max) == (2, 16, 512)
    cluster = fitted(run, ROUTER)
    assert cluster.step_base_s == pytest.approx(0.017, rel=0.05)
    assert cluster.prefill_s_per_token == pytest.approx(25e-6, rel=0.05)
    assert cluster.step_s_per_request == pytest.approx(200e-6, rel=0.1)
    first, second = halves(run)
    assert (first.sum(), second.sum(), (first & second).sum()) == (80, 80, 0)
    for figure in judge(run, replay(run, ROUTER, cluster), second):
        assert abs(figure.error) < 0.02, figure


def test_errors_are_errors(real):
    run = read_run(real, LAYERS)
    slow = replay(run, ROUTER, replace(TRUE, step_base_s=0.034))
    errors = {figure.name: figure.error for figure in judge(run, slow, halves(run)[1])}
    assert errors["TPOT mean (ms)"] > 0.5
    assert errors["TTFT P95 (ms)"] > 0.5
    assert errors["tokens/s to the end"] < -0.1
    assert all(abs(figure.error) < 1e-9 for figure in judge(run, replay(run, ROUTER, TRUE), halves(run)[0]))


def test_the_command(real):
    result = CliRunner().invoke(app, ["validate", str(real), "--layers", str(LAYERS)])
    assert result.exit_code == 0, result.output
    assert "80.0 ns a KV token, 2.50 times as much beside a prefill" in result.output
    assert "second half, held out" in result.output
    assert result.output.count("tokens/s to the end") == 2


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("requests.jsonl", "{}", "requests.jsonl:1: must be an object with queued_ts"),
        ("requests.jsonl", "[", "requests.jsonl:1: must be an object with queued_ts"),
        ("requests.jsonl", "", "requests.jsonl: must have at least 2 requests"),
        (
            "requests.jsonl",
            '{"queued_ts": 2, "first_token_ts": 1, "last_token_ts": 3, "input_toks": 1, "output_toks": 1}',
            "requests.jsonl:1: tokens must come after the request, in order",
        ),
        ("requests.jsonl", None, "requests.jsonl: cannot be read: No such file"),
        ("meta.json", "{}", "meta.json: must have engine_kwargs with data_parallel_size, max_num_seqs"),
        ("attention-tp1.csv", "time_us\n5\n", "attention-tp1.csv:2: must have numbers for prefill_chunk"),
        ("attention-tp1.csv", "", "attention-tp1.csv: must have decodes of two sizes"),
        ("attention-tp1.csv", None, "must hold one file attention*.csv, holds 0"),
    ],
)
def test_bad_runs(real, name, text, words):
    (real / name).unlink()
    if text is not None:
        (real / name).write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInputError) as error:
        read_run(real, LAYERS)
    assert words in str(error.value)


def test_more_kv_must_take_longer(tmp_path):
    path = tmp_path / "attention.csv"
    header = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n"
    path.write_text(header + "0,0,1,10,9\n0,0,1,20,8\n", encoding="utf-8")
    with pytest.raises(InvalidInputError, match="more KV tokens must take longer"):
        attention_costs(path, 1)
