"""``loadgen simulate``: scenario files, policy texts, reports."""

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from brproxy.types import InvalidInputError
from brproxy.validation import ConfigError
from loadgen.capacity import perfect_capacity
from loadgen.cli import app
from loadgen.commands.comparison_plan import plan_from_file
from loadgen.commands.policy_spec import parse_policies, parse_policy
from loadgen.commands.scenario_file import load_scenario
from loadgen.commands.simulate import mean_of
from loadgen.commands.simulation_plan import plan_simulation
from loadgen.report.plots import draw_simulations
from loadgen.report.schema import PolicyResult
from loadgen.report.tables import BEST_BASELINE

FOLDER = Path(__file__).parents[3] / "config" / "scenarios"
SMALL = """
policies = ["join-shortest-queue", "br-0:beta_per_worker=1,aim=1"]
seeds = 2
[workload]
name = "short"
requests_per_worker = 40
[cluster]
workers = 3
slots = 4
[[paper]]
policy = "br-0:beta_per_worker=1,aim=1"
imbalance_kv_tokens = 51927
tpot_ms_p95 = 79.3
output_tokens_per_s = 943
"""


@pytest.fixture
def scenario(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL, encoding="utf-8")
    return path


def invoke(*arguments):
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)], terminal_width=120)


APART = FOLDER / "4p1d.toml"
"""Prefill and decode apart, which only ``loadgen compare`` takes."""


@pytest.mark.parametrize("path", sorted({*FOLDER.glob("*.toml")} - {APART}), ids=lambda path: path.name)
def test_every_shipped_scenario_is_valid(path):
    plan = plan_simulation(path, None, None, None, None, None)
    assert plan.policies
    paper = {row.policy for row in load_scenario(path).paper}
    assert set(plan.published) == paper, "a published row is shown beside a policy"
    assert paper <= {*plan.policies, BEST_BASELINE}
    drawn = plan.scenario(1)
    # For each worker, so that more of them with --workers meet as much.
    fewer = {"rollouts": 256, "rollouts-again": 256, "aggregated-short": 200}
    per_worker = fewer.get(path.stem, 1500)
    assert len(drawn.draw()[0].requests) == per_worker * drawn.cluster.workers
    assert plan_simulation(path, None, None, None, None, 0.5).scenario(1).arrivals.rate == 0.5


def shipped(name):
    return plan_simulation(FOLDER / f"{name}.toml", None, None, None, None, None).scenario(1)


@pytest.mark.parametrize(("name", "us"), [("aggregated", 20), ("aggregated-100us", 100)])
def test_aggregated_workers_prefill_in_chunks(name, us):
    cluster = shipped(name).cluster
    assert (cluster.workers, cluster.prefill_tokens_max) == (8, 2048)
    assert cluster.prefill_s_per_token == pytest.approx(us * 1e-6)


def test_what_shipped_scenarios_are_about():
    kv_bound, unequal, rollouts = shipped("kv-bound"), shipped("unequal"), shipped("rollouts")
    assert (kv_bound.cluster.slots, kv_bound.cluster.kv_capacity_tokens) == (512, 300_000)
    # The slots are not what limits it.
    assert perfect_capacity(kv_bound.draw()[0], kv_bound.cluster).kv_tokens_per_worker == 300_000
    assert unequal.cluster.slowness == (1.25, 1.25, *(1.0,) * 6)
    requests = rollouts.draw()[0].requests
    assert {r.arrival_s for r in requests} == {0.0}
    keys = [r.prompt_key for r in requests]
    assert [keys.count(key) for key in range(512)] == [8] * 512
    assert rollouts.cluster.workers == 16


def test_a_closed_batch_is_told_by_its_makespan(tmp_path):
    path, out = tmp_path / "batch.toml", tmp_path / "out.json"
    text = SMALL.replace('"short"', '"rollouts"').replace(
        "[cluster]", "[arrivals]\nat_once = true\n[cluster]"
    )
    path.write_text(text.split("[[paper]]")[0].replace("slots = 4", "slots = 16"), encoding="utf-8")
    result = invoke("--scenario", path, "--seeds", 2, "--out", out)
    assert result.exit_code == 0, result.output
    assert "span s" in result.output
    assert "all at once (packed: " in result.output
    document = json.loads(out.read_text(encoding="utf-8"))
    for policy in document["policies"]:
        assert policy["makespan_s"] > 0.95 * document["scenario"]["packed_makespan_s"]
        assert policy["makespan_of_packed"] > 0.95
        assert policy["intervals"]["makespan_s"] > 0
        assert policy["idle_fraction"] > 0
        assert policy["ttft_ms_p50"] > 0


def test_prefill_workers_are_not_simulated():
    with pytest.raises(InvalidInputError, match=r"4p1d.toml: \[prefill\] is for loadgen compare"):
        plan_simulation(APART, None, None, None, None, None)


def test_a_run_prints_a_table_and_writes_the_document(scenario, tmp_path):
    out = tmp_path / "out.json"
    result = invoke("--scenario", scenario, "--processes", 1, "--out", out)
    assert result.exit_code == 0, result.output
    assert "±" in result.output
    assert "51,927" in result.output
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["scenario"]["seeds"] == 2
    for policy in document["policies"]:
        assert policy["wait_ms_p99"] > 0
        assert policy["lost"] == 0
        assert policy["requests"] == 2 * 3 * 40
        assert policy["intervals"].keys() >= {"idle_fraction", "throughput_of_perfect", "mean_kv_tokens"}
        assert policy["preemptions"] == 0
        assert policy["prefill_balance"] > 0
    assert "prefill" not in result.output, "prefill costs nothing"
    assert "empted" not in result.output, "nothing was preempted"


def test_the_command_line_replaces_what_the_file_says(scenario, tmp_path):
    out = tmp_path / "out.json"
    result = invoke(
        *("--scenario", scenario, "--policies", "br-h@oracle,least-kv+late", "--workers", 2),
        *("--rate", 0.7, "--seeds", 1, "--seed", 9, "--out", out),
    )
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text(encoding="utf-8"))
    assert [policy["policy"] for policy in document["policies"]] == ["br-h@oracle", "least-kv+late"]
    assert (document["scenario"]["workers"], document["scenario"]["rate"]) == (2, 0.7)
    assert document["scenario"]["seed"] == 9
    assert document["policies"][0]["intervals"] == {}


def test_the_bubble_is_in_the_file_and_on_the_command_line(scenario, tmp_path):
    out = tmp_path / "out.json"
    found = []
    for options in ([], ["--dispatch-steps", 0]):
        assert invoke("--scenario", scenario, "--seeds", 1, *options, "--out", out).exit_code == 0
        found.append(json.loads(out.read_text(encoding="utf-8")))
    assert [document["scenario"]["dispatch_steps"] for document in found] == [1, 0]
    with_it, without = (document["policies"][1]["output_tokens_per_s"] for document in found)
    assert with_it < without
    scenario.write_text(SMALL.replace("slots = 4", "slots = 4\ndispatch_steps = 7"), encoding="utf-8")
    plan = plan_simulation(scenario, None, None, None, None, None)
    assert plan.scenario(1).cluster.dispatch_steps == 7


BEYOND = {
    "workload": {"abort_fraction": 0.25},
    "cluster": {
        "prefill_tokens_max": 512,
        "decode_factor_under_prefill": 3.0,
        "step_us_per_request": 50.0,
        "batch_buckets": [1, 2, 4],
        "tokens_per_step": 1.5,
        "slots_each": [4, 2, 4],
        "slowness": [1.0, 1.25, 1.0],
    },
}


def test_what_is_beyond_the_basics_is_in_the_file(tmp_path):
    lines = ['policies = ["br-0"]', "[workload]", "requests_per_worker = 40", 'name = "short"']
    for section, keys in BEYOND.items():
        lines += [f"{key} = {value}" for key, value in keys.items() if section == "workload"]
    lines += ["[cluster]", "workers = 3", "slots = 4", "kv_capacity_tokens = 50000"]
    lines += [f"{key} = {value}" for key, value in BEYOND["cluster"].items()]
    path, out = tmp_path / "beyond.toml", tmp_path / "out.json"
    path.write_text("\n".join(lines), encoding="utf-8")
    scenario = plan_simulation(path, None, None, None, None, None).scenario(1)
    assert scenario.workload.abort_fraction == 0.25
    cluster = scenario.cluster
    assert (cluster.prefill_tokens_max, cluster.decode_factor_under_prefill) == (512, 3.0)
    assert (cluster.step_s_per_request, cluster.batch_buckets) == (50e-6, (1, 2, 4))
    assert (cluster.tokens_per_step, cluster.slots_each, cluster.slowness) == (1.5, (4, 2, 4), (1, 1.25, 1))
    result = invoke("--scenario", path, "--seeds", 1, "--out", out)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["scenario"]["slowness"] == "1.0 1.25 1.0"
    assert document["policies"][0]["lost"] == 0
    with pytest.raises(
        InvalidInputError, match=r"abort_fraction, .*slowness: only loadgen simulate knows that"
    ):
        plan_from_file(path, [], (), None, None, 1)


@pytest.mark.parametrize(
    ("workers", "rate", "shown"), [(None, None, True), (3, 1.1, True), (2, None, False), (None, 0.5, False)]
)
def test_published_figures_belong_to_the_deployment_of_the_file(scenario, workers, rate, shown):
    plan = plan_simulation(scenario, None, None, None, workers, rate)
    assert bool(plan.published) == shown
    assert plan_simulation(scenario, None, None, scenario, workers, rate).published == {}


def test_published_figures_belong_to_a_policy_with_its_predictor():
    def published(policies, predictor=None):
        path = FOLDER / "proprietary.toml"
        plan = plan_simulation(path, policies, predictor, None, None, None)
        return {label: row.output_tokens_per_s for label, row in plan.published.items()}

    assert published("br-h,random") == {"br-h": 979, "random": 811}
    assert published("br-h,random", "oracle") == {"br-h": 1029, "random": 811}
    assert published("br-h,br-h@survival", "exact-match") == {"br-h@survival": 979}
    assert published("br-0," + (paper := 'br-0:aim=1.0,order="slots",beta_per_worker=1')) == {paper: 943}


def test_several_scenarios_in_one_command(scenario, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text(SMALL.replace("workers = 3", "workers = 2"), encoding="utf-8")
    result = invoke("--scenario", scenario, "--scenario", other, "--seeds", 1, "--processes", 1)
    assert result.exit_code == 0, result.output
    assert result.output.count("short, 3 workers, 1.1 × capacity, 120 requests, seeds: 1") == 1
    assert result.output.count("short, 2 workers, 1.1 × capacity, 80 requests, seeds: 1") == 1
    assert result.output.count("51,927") == 2
    refused = invoke("--scenario", scenario, "--scenario", other, "--out", tmp_path / "out.json")
    assert str(refused.exception) == "--out and --plot take one --scenario at a time"


def test_a_trace_comes_with_its_own_times(scenario, tmp_path):
    trace = tmp_path / "trace.csv"
    rows = "".join(f"2024-05-12 00:00:{i:02}+00:00,100,5\n" for i in range(40))
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows, encoding="utf-8")
    plan = plan_simulation(scenario, None, None, trace, None, None)
    assert plan.scenario(1).draw()[0].requests[-1].arrival_s == 39
    faster = plan_simulation(scenario, None, None, trace, None, 1.0)
    assert faster.scenario(1).draw()[0].requests[-1].arrival_s < 39


def test_pictures_are_drawn(scenario, tmp_path):
    for name in ("picture.png", "picture.svg"):
        path = tmp_path / name
        result = invoke("--scenario", scenario, "--seeds", 1, "--plot", path)
        assert result.exit_code == 0, result.output
        assert path.stat().st_size > 10_000


@pytest.mark.parametrize("prefill_us", [0, 20])
@pytest.mark.parametrize("policies", ["br-0", "br-0,br-h,least-kv,join-shortest-queue+late,random"])
def test_every_text_of_a_picture_can_be_read(policies, prefill_us, scenario):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    text = SMALL.replace("slots = 4", f"slots = 4\nprefill_us_per_token = {prefill_us}")
    scenario.write_text(text, encoding="utf-8")
    plan = plan_simulation(scenario, policies, None, None, None, None)
    figure = draw_simulations(pyplot, plan.scenario(1), plan.policies)
    figure.canvas.draw()
    texts = [
        text
        for axes in figure.axes
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label)
        if text.get_text()
    ]
    boxes = [text.get_window_extent() for text in texts]
    assert len({t.get_text() for t in texts}) >= 7
    assert any("prefill balance" in t.get_text() for t in texts) == bool(prefill_us)
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, texts[i]
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, texts[i]
        assert not any(box.overlaps(other) for other in boxes[:i]), texts[i]
    pyplot.close(figure)


def test_without_matplotlib_it_says_what_to_install(scenario, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke("--scenario", scenario, "--seeds", 1, "--plot", tmp_path / "x.png")
    assert isinstance(result.exception, InvalidInputError)
    assert str(result.exception) == "--plot needs matplotlib: pip install 'brproxy[plots]'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policies = []\n", r"policies: List should have at least 1 item"),
        ('policies = ["br-0"]\nseedz = 1\n', r"seedz: unknown key; did you mean 'seeds'\?"),
        ('policies = ["br-0"]\n[cluster]\nslots = 0\n', r"cluster.slots: must be at least 1, got 0"),
        ('policies = ["br-0"]\n[[paper]]\npolicy = "x"\n', r"paper\[0\].output_tokens_per_s: is missing"),
    ],
)
def test_bad_scenarios(text, message, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"bad.toml: {message}"):
        load_scenario(path)


HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (HEADER, "has no request with a prompt and an output"),
        ("", "is empty; a trace needs at least one request"),
        (HEADER + "2024-05-12 00:00:01+00:00,-5,5\n", "ContextTokens must be a whole number of tokens"),
        (
            HEADER + "2024-05-12 00:00:01+00:00,5,5\n2024-05-12 00:00:02+00:00,900,101\n",
            "request 2 of 'trace' grows to 900 + 101 tokens, more than a worker's KV capacity of 1000",
        ),
    ],
)
def test_bad_traces(rows, message, tmp_path):
    scenario, trace = tmp_path / "scenario.toml", tmp_path / "trace.csv"
    scenario.write_text('policies = ["br-0"]\n[cluster]\nkv_capacity_tokens = 1000\n', encoding="utf-8")
    trace.write_text(rows, encoding="utf-8")
    refused = invoke("--scenario", scenario, "--trace", trace, "--processes", 1).exception
    assert isinstance(refused, InvalidInputError)
    assert message in str(refused)


@pytest.mark.parametrize("option", ["--workers", "--seeds", "--processes"])
def test_at_least_one_of_everything(option):
    refused = invoke(option, 0)
    assert refused.exit_code == 2
    assert f"Invalid value for '{option}'" in refused.output
    assert invoke("--seed", -1).exit_code == 2


def test_a_policy_text():
    choice = parse_policy("br-h:gamma=0.9,horizon_steps=80+early@oracle")
    assert (choice.policy, choice.predictor) == ("br-h", "oracle")
    params = choice.policy_params
    assert (params.gamma, params.horizon_steps, params.late_binding) == (0.9, 80, False)
    assert parse_policy("least-kv+late").policy_params.late_binding
    assert parse_policy("br-h", "exact-match").predictor == "exact-match"
    in_order = parse_policy("br-0+learnt+fifo@oracle")
    assert (in_order.takes_batches, in_order.learns_costs, in_order.predictor) == (False, True, "oracle")
    assert parse_policy("br-0+learnt").takes_batches
    learning = parse_policy("br-0+late+learnt@oracle")
    assert (learning.policy, learning.predictor, learning.learns_costs) == ("br-0", "oracle", True)
    assert learning.policy_params.late_binding
    assert not choice.learns_costs


def test_a_list_of_policy_texts():
    chosen = parse_policies("br-h:gamma=0.9,horizon_steps=80@oracle, br-0,random")
    assert list(chosen) == ["br-h:gamma=0.9,horizon_steps=80@oracle", "br-0", "random"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("br-9", "unknown policy 'br-9'; allowed: "),
        ("br-h@nobody", "unknown predictor 'nobody'; allowed: exact-match, hierarchical, oracle, survival"),
        ("br-0:windw=3", "policy 'br-0:windw=3': windw: unknown key; did you mean 'window'"),
        ("br-0:window=0", "policy 'br-0:window=0': window: must be at least 1, got 0"),
        ("br-0:window=x", "policy 'br-0:window=x': 'x' is not a TOML value"),
        (" , ", "no policy is named"),
    ],
)
def test_bad_policy_texts(text, message):
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        parse_policies(text)


def result(idle):
    return PolicyResult(
        policy="br-0",
        imbalance_kv_tokens=1.0,
        idle_fraction=idle,
        throughput_of_perfect=None,
        output_tokens_per_s=1.0,
        tpot_ms_p95=1.0,
        ttft_ms_p95=1.0,
        wait_ms_p99=1.0,
        requests=10,
        lost=1,
    )


def test_means_and_intervals_over_seeds():
    mean = mean_of([result(0.1), result(0.2), result(0.3)])
    assert mean.idle_fraction == pytest.approx(0.2)
    # Student's t for two degrees of freedom, 4.303, times 0.1 / √3.
    assert mean.intervals["idle_fraction"] == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert mean.by_seed["idle_fraction"] == [0.1, 0.2, 0.3]
    assert "throughput_of_perfect" not in mean.intervals
    assert (mean.requests, mean.lost) == (30, 3)
    assert mean_of([result(0.1)]).intervals == {}
