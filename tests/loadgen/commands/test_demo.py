"""The demonstration: what it runs, what that shows as simulated, and that it says so when it does not."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.commands import demo
from loadgen.commands.beside import simulated_result
from loadgen.commands.scenario_file import load_scenario
from loadgen.report.schema import LearntCosts, PolicyResult, Report

SCENARIOS = Path(__file__).parents[3] / "config" / "scenarios"
BASELINES = ("round-robin", "join-shortest-queue", "least-kv")


def result(policy, tokens_per_s=1000.0, prefill_balance=0.2, lost=0, warnings=()):
    return PolicyResult(
        policy=policy,
        imbalance_kv_tokens=100.0,
        idle_fraction=0.314,
        throughput_of_perfect=0.9,
        output_tokens_per_s=tokens_per_s,
        tpot_ms_p95=1.0,
        ttft_ms_p95=1.0,
        wait_ms_p99=None,
        requests=10,
        lost=lost,
        prefill_balance=prefill_balance,
        warnings=list(warnings),
    )


def report_of(balanced, *baselines):
    return Report(scenario={}, policies=[*(baselines or (result("least-kv"),)), balanced])


@given(
    st.lists(st.floats(500.0, 2000.0), min_size=3, max_size=3),
    st.floats(500.0, 3000.0),
    st.floats(0.1, 1.0),
    st.sampled_from([0, 0, 3]),
    st.sampled_from([(), (), ("the machine is slow",)]),
)
def test_it_is_honest(outputs, output, prefill_balance, lost, warnings):
    baselines = [result(name, tokens) for name, tokens in zip(BASELINES, outputs, strict=True)]
    balanced = result("br-0", output, prefill_balance, lost, warnings)
    text = demo.verdict(report_of(balanced, *baselines))
    strongest = max(baselines, key=lambda baseline: baseline.output_tokens_per_s)
    ratio = output / strongest.output_tokens_per_s
    assert text.startswith(f"br-0 put out {ratio:.2f} × the tokens of {strongest.policy}.")
    shows = ratio >= demo.THROUGHPUT_RATIO_MIN and prefill_balance > 0.2 and not lost and not warnings
    assert ("This run does not show what it should:\n" in text) == (not shows)


@pytest.mark.parametrize(
    ("balanced", "doubt"),
    [
        (result("br-0", 1190.0, 0.7), "at least 1.2 × the tokens were expected"),
        (result("br-0", 1300.0, 0.2), "prompts were not prefilled in step"),
        (result("br-0", 1300.0, 0.7, lost=2), "2 requests were lost"),
        (result("br-0", 1300.0, 0.7, warnings=["the machine is slow"]), "br-0: the machine is slow"),
    ],
)
def test_each_doubt_is_named(balanced, doubt):
    assert demo.verdict(report_of(balanced)).endswith(f"This run does not show what it should:\n  - {doubt}")


def test_what_the_proxy_learnt_stands_beside_what_is_emulated():
    balanced = result("br-0", 1300.0, 0.7)
    assert "The proxy learnt nothing of what a step costs." in demo.verdict(report_of(balanced))
    balanced.learnt = LearntCosts(
        step_base_ms=29.6, step_ns_per_kv_token=681.0, prefill_us_per_token=18.9, prefill_tokens_max=None
    )
    text = demo.verdict(report_of(balanced))
    for words in (
        "30 ms (30)",
        "681 ns a KV token\n(660)",
        "19 µs a prompt token (20)",
        "whole prompts (2048)",
    ):
        assert words in text
    balanced.learnt.prefill_tokens_max = 1024
    assert "chunks of 1024 (2048)" in demo.verdict(report_of(balanced))


@pytest.mark.parametrize(
    "report",
    [
        report_of(result("br-0", None)),
        report_of(result("br-0"), result("least-kv", None)),
    ],
)
def test_without_figures(report):
    assert demo.verdict(report) == "This run was too short to say anything."


def test_it_is_what_most_people_have_and_the_proxy_is_told_no_costs():
    cluster = demo.SCENARIO.cluster
    assert cluster.prefill_s_per_token > 0
    assert cluster.prefill_tokens_max is not None
    assert set(demo.SETTINGS.policies) == {*BASELINES, demo.BALANCED}
    assert "learns" in demo.introduction(3.0)


def test_it_is_a_scenario_that_can_be_compared_by_other_policies():
    file = load_scenario(SCENARIOS / "aggregated-short.toml")
    assert file.scenario(SCENARIOS, demo.SCENARIO.seed, None, None) == demo.SCENARIO


@pytest.mark.long_simulation
def test_as_simulated_it_shows_what_it_should_within_three_minutes():
    workload, capacity = demo.SCENARIO.draw()
    speed = demo.SETTINGS.speed
    results = [
        simulated_result(policy, workload, capacity, demo.SCENARIO, speed)
        for policy in demo.SETTINGS.policies
    ]
    assert sum(result.makespan_s for result in results) / speed < 175
    text = demo.verdict(Report(scenario={}, policies=results))
    assert "does not show" not in text, text
