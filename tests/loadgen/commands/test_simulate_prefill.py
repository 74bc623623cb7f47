"""The prefill side of a deployment, whose workers share a barrier, in virtual time."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from brproxy.types import InvalidInputError
from loadgen.cli import app
from loadgen.commands.scenario_file import load_scenario
from loadgen.commands.simulate import simulate_all
from loadgen.commands.simulation_plan import plan_simulation

SHIPPED = Path(__file__).parents[3] / "config" / "scenarios" / "prefill-group.toml"
SMALL = """
policies = ["least-prefill", "prefill-in-step"]
[workload]
name = "short"
requests_per_worker = 100
[arrivals]
rate = {}
[cluster]
workers = 4
prefill_us_per_token = 50
{}
[prefill]
workers = 4
slots = 32
shares_barrier = true
transfer_ms_per_ktoken = 5
"""


def results(tmp_path, rate, cluster=""):
    path, out = tmp_path / "group.toml", tmp_path / "out.json"
    path.write_text(SMALL.format(rate, cluster), encoding="utf-8")
    result = CliRunner().invoke(
        app, ["simulate", "--scenario", str(path), "--seed", "1", "--processes", "1", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert "TTFT" in result.output
    assert "TPOT" not in result.output
    document = json.loads(out.read_text(encoding="utf-8"))
    return document["scenario"], {policy["policy"]: policy for policy in document["policies"]}


def test_prompts_that_go_in_step_are_there_sooner(tmp_path):
    scenario, found = results(tmp_path, 0.8)
    assert (scenario["workers"], scenario["transfer_ms_per_ktoken"]) == (4, 5.0)
    before, in_step = found["least-prefill"], found["prefill-in-step"]
    assert in_step["ttft_ms"]["mean"] < 0.6 * before["ttft_ms"]["mean"]
    assert in_step["ttft_ms"]["p95"] < before["ttft_ms"]["p95"]
    assert in_step["prefill_balance"] > before["prefill_balance"]
    assert in_step["lost"] == before["lost"] == 0


@pytest.mark.parametrize(("rate", "cluster"), [(0.001, ""), (0.8, "prefill_tokens_max = 512")])
def test_nobody_waits_where_that_would_be_of_no_use(rate, cluster, tmp_path):
    _, found = results(tmp_path, rate, cluster)
    before, in_step = found["least-prefill"], found["prefill-in-step"]
    assert in_step["ttft_ms"] == before["ttft_ms"]


def test_the_time_to_the_first_token_ends_with_the_transfer():
    file = load_scenario(SHIPPED)
    scenario = replace(file.scenario(SHIPPED.parent, 1, 2, 0.5)).prefill_side()
    scenario = replace(scenario, workload=replace(scenario.workload, requests=60))
    policies = plan_simulation(SHIPPED, "least-prefill", None, None, None, None).policies

    def ttft_ms(transfer_s_per_token):
        own = replace(scenario, transfer_s_per_token=transfer_s_per_token)
        (result,) = simulate_all(lambda _: own, policies, [1], lambda _: None, 1).policies
        return result.ttft_ms.mean

    requests = scenario.draw()[0].requests
    sent_ms = np.mean([request.prompt_tokens for request in requests[15:57]]) * 5e-6 * 1e3
    assert {request.output_tokens for request in requests} == {1}
    assert ttft_ms(5e-6) - ttft_ms(0.0) == pytest.approx(sent_ms)


def test_a_group_is_simulated_and_not_emulated():
    scenario = load_scenario(SHIPPED).scenario(SHIPPED.parent, 1, None, None)
    with pytest.raises(InvalidInputError, match="shares_barrier: only loadgen simulate knows that"):
        scenario.must_be_emulated()
    own = scenario.prefill_side()
    assert (own.cluster.workers, own.cluster.slots, own.cluster.step_s_per_kv_token) == (8, 64, 0.0)
    assert own.prefill_side() is own
