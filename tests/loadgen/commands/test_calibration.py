"""Simulations of a deployment as the metrics of its proxy show it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from brproxy.types import InvalidInputError
from loadgen.cli import app
from loadgen.commands.calibration import calibrated_from
from loadgen.commands.simulation_plan import plan_simulation

WORKERS = (("a", 8, 50_000), ("b", 8, 40_000))


def page(group="default", workers=WORKERS, slowness=(), **steps):
    """Return a page of metrics as brproxy has it, of one group."""
    costs = {"windows": 100, "base_seconds": 0.025, "seconds_per_kv_token": 2e-7} | steps
    lines = [f'brproxy_step_{name}{{group="{group}"}} {value}' for name, value in costs.items()]
    for name, slots, capacity in workers:
        labels = f'{{group="{group}",worker="{name}"}}'
        lines += [
            f"brproxy_worker_slots{labels} {slots}",
            f"brproxy_worker_kv_capacity_tokens{labels} {capacity}",
        ]
    for (name, *_), factor in zip(workers, slowness, strict=False):
        labels = f'{{group="{group}",worker="{name}"}}'
        lines += [f"brproxy_step_slowness{labels} {factor}", f"brproxy_step_slowness_measurable{labels} 1"]
    return "\n".join(lines) + "\n"


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves pages as one file and returns its name."""

    def save(*pages):
        path = tmp_path / "metrics.txt"
        path.write_text("".join(pages), encoding="utf-8")
        return str(path)

    return save


def test_a_page_is_a_deployment(saved):
    cluster = calibrated_from(saved(page())).cluster
    assert (cluster.workers, cluster.slots, cluster.slots_each) == (2, 8, ())
    assert cluster.kv_capacity_tokens == 40_000
    assert (cluster.step_base_s, cluster.step_s_per_kv_token) == (0.025, 2e-7)
    assert (cluster.prefill_s_per_token, cluster.prefill_tokens_max, cluster.slowness) == (0.0, None, ())


def test_prefill_counts_where_it_is_more_than_its_error(saved):
    prefill = {"seconds_per_prefill_token": 2e-5, "prefill_tokens_max": 2048}
    known = calibrated_from(saved(page(**prefill, seconds_per_prefill_token_error=1e-6))).cluster
    assert (known.prefill_s_per_token, known.prefill_tokens_max) == (2e-5, 2048)
    unknown = calibrated_from(saved(page(**prefill, seconds_per_prefill_token_error=2e-5))).cluster
    assert (unknown.prefill_s_per_token, unknown.prefill_tokens_max) == (0.0, None)


def test_unequal_workers(saved):
    workers = (("a", 8, 50_000), ("b", 4, 40_000))
    cluster = calibrated_from(saved(page(workers=workers, slowness=(0.9, 1.1)))).cluster
    assert (cluster.slots_each, cluster.slowness) == ((8, 4), (0.9, 1.1))


def test_one_of_several_groups(saved):
    both = page("one"), page("two", base_seconds=0.05), page("two/prefill")
    assert calibrated_from(saved(*both), "two").cluster.step_base_s == 0.05
    with pytest.raises(InvalidInputError, match="several groups, say which by --group: one, two"):
        calibrated_from(saved(*both))
    with pytest.raises(InvalidInputError, match="has no group 'three'; it has: one, two"):
        calibrated_from(saved(*both), "three")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no brproxy_step_"),
        ("<html>", "is no page of metrics"),
        ('brproxy_step_windows{group="default"} 3\n', r"has not learnt .* yet \(3 windows of steps\)"),
    ],
)
def test_a_page_that_does_not_say_it(saved, text, message):
    with pytest.raises(InvalidInputError, match=message):
        calibrated_from(saved(text))


def test_a_file_or_a_server_that_is_not_there(tmp_path, unused_tcp_port):
    with pytest.raises(InvalidInputError, match="cannot be read"):
        calibrated_from(str(tmp_path / "none"))
    with pytest.raises(InvalidInputError, match=r"/metrics cannot be read"):
        calibrated_from(f"http://127.0.0.1:{unused_tcp_port}/")


def test_it_is_simulated(saved, tmp_path):
    out = tmp_path / "report.json"
    arguments = ["--calibrated-from", saved(page()), "--policies", "br-0", "--seeds", "1", "--out", str(out)]
    scenario = tmp_path / "s.toml"
    scenario.write_text(
        'policies = ["br-0"]\n[workload]\nname = "short"\nrequests_per_worker = 30\n', encoding="utf-8"
    )
    run = CliRunner().invoke(app, ["simulate", "--scenario", str(scenario), "--processes", "1", *arguments])
    assert run.exit_code == 0, run.output
    described = json.loads(out.read_text(encoding="utf-8"))["scenario"]
    assert (described["workers"], described["slots"], described["requests"]) == (2, 8, 60)
    assert (described["step_base_ms"], described["step_ns_per_kv_token"]) == (25.0, pytest.approx(200.0))


def test_what_a_scenario_says_of_each_of_its_workers_is_of_others(saved):
    calibration = calibrated_from(saved(page()))
    file = Path(__file__).parents[3] / "config" / "scenarios" / "unequal.toml"
    cluster = plan_simulation(file, None, None, None, None, None, calibration=calibration).scenario(1).cluster
    assert (cluster.workers, cluster.slowness) == (2, ())


def test_its_rate_is_simulated_unless_another_is_named(saved):
    calibration = calibrated_from(saved(page()))
    seen = type(calibration)(calibration.cluster, 3.5)
    plan = plan_simulation(None, None, None, None, None, None, calibration=seen)
    assert plan.scenario(1).arrivals.requests_per_s == 3.5
    plan = plan_simulation(None, None, None, None, None, 0.8, calibration=seen)
    assert (plan.scenario(1).arrivals.requests_per_s, plan.scenario(1).arrivals.rate) == (None, 0.8)
    with pytest.raises(InvalidInputError, match="--workers and --calibrated-from"):
        plan_simulation(None, None, None, None, 4, None, calibration=seen)
