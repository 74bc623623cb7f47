"""Figures, tables and the JSON document."""

import json
from array import array

import pytest
from rich.console import Console

from brproxy.types import InvalidInputError
from loadgen.client import Failure, Outcome
from loadgen.report.schema import PolicyResult, Report
from loadgen.report.statistics import (
    LATE_SHARE_MAX,
    Slo,
    Window,
    client_warnings,
    emulator_warnings,
    failures,
    goodput_requests_per_s,
    latencies,
    percentiles,
    run_length_s,
    steady_window,
    within,
)
from loadgen.report.tables import (
    BEST_BASELINE,
    PublishedFigures,
    comparison_table,
    comparison_tables,
    latency_table,
    outcome_table,
    published_table,
    simulation_table,
    strongest_baseline,
)
from loadgen.workload import TraceRequest


def outcome(due_s=0.0, ttft_s=0.5, tpot_s=0.1, tokens=11, failure=None, late_s=0.0):
    first_s = due_s + ttft_s
    last_s = first_s + tpot_s * (tokens - 1)
    return Outcome(
        TraceRequest(due_s, 1, tokens),
        due_s,
        sent_s=due_s + late_s,
        first_token_s=first_s,
        last_token_s=last_s,
        finished_s=last_s,
        output_tokens=tokens,
        gaps_s=array("f", [tpot_s] * (tokens - 1)),
        failure=failure,
    )


def result(policy, tokens_per_s=1000.0, imbalance=100_000.0, idle=0.2, **more):
    return PolicyResult(
        policy=policy,
        imbalance_kv_tokens=imbalance,
        idle_fraction=idle,
        throughput_of_perfect=0.9,
        output_tokens_per_s=tokens_per_s,
        tpot_ms_p95=70.0,
        ttft_ms_p95=900.0,
        wait_ms_p99=None,
        requests=10,
        lost=0,
        **more,
    )


def shown(*tables, width=80):
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(*tables)
    return capture.get()


def test_percentiles():
    values = percentiles([i / 1000 for i in range(101)])
    assert (values.mean, values.p50, values.p95, values.p99) == pytest.approx((50, 50, 95, 99))
    assert percentiles([]) is None


def test_latencies_count_from_when_a_request_was_due():
    summary = latencies([outcome(late_s=0.4), outcome(failure=Failure.RESET, ttft_s=9.0)])
    assert summary.ttft_ms.p50 == pytest.approx(500)
    assert summary.tpot_ms.p95 == pytest.approx(100)
    assert summary.itl_ms.mean == pytest.approx(100)
    assert summary.e2e_ms.p99 == pytest.approx(1500)


def test_a_single_token_has_no_time_per_token():
    summary = latencies([outcome(tokens=1)])
    assert summary.tpot_ms is None
    assert summary.itl_ms is None


def test_the_steady_part():
    outcomes = [outcome(due_s=float(i)) for i in range(100)]
    window = steady_window(outcomes)
    assert window == Window(25.0, 95.0)
    assert [o.due_s for o in within(outcomes, window)] == [float(i) for i in range(25, 95)]


def test_failures_goodput_and_length():
    outcomes = [
        outcome(),
        outcome(due_s=1.0, ttft_s=3.0),
        outcome(due_s=2.0, failure=Failure.RESET),
        outcome(due_s=8.0, tpot_s=0.2, ttft_s=0.0),
    ]
    assert failures(outcomes) == {"reset": 1}
    assert run_length_s(outcomes) == pytest.approx(10.0)
    assert goodput_requests_per_s(outcomes, Slo()) is None
    assert goodput_requests_per_s(outcomes, Slo(ttft_ms=1000)) == pytest.approx(0.2)
    assert goodput_requests_per_s(outcomes, Slo(tpot_ms=150)) == pytest.approx(0.2)
    assert goodput_requests_per_s(outcomes, Slo(ttft_ms=1000, tpot_ms=150, e2e_ms=2000)) == pytest.approx(0.1)


def test_a_late_client_says_so():
    assert client_warnings([outcome(late_s=0.1)], speed=1.0) == []
    (warning,) = client_warnings([outcome(late_s=6.0)], speed=4.0)
    assert warning.startswith("the client sent requests up to 1.5 s late")


def test_an_emulator_that_is_late_says_so():
    assert emulator_warnings(0.0, LATE_SHARE_MAX) == []
    (warning,) = emulator_warnings(0.0, 0.4)
    assert warning.startswith("steps ended late by 40% of a step")
    (warning,) = emulator_warnings(2.5, 0.4)
    assert warning.startswith("the emulator fell 2.5 s behind")


def test_the_strongest_baseline_is_the_one_with_the_highest_throughput():
    results = [result("round-robin", 900.0), result("least-kv", 950.0), result("br-0", 1100.0)]
    assert strongest_baseline(Report(scenario={}, policies=results)).policy == "least-kv"
    assert strongest_baseline(Report(scenario={}, policies=[result("br-0")])) is None


def test_the_comparison_fits_eighty_columns_and_names_its_baseline():
    results = [result("join-shortest-queue"), result("br-0", 1234.0, 31_000.0, 0.031)]
    text = shown(comparison_table(Report(scenario={}, policies=results)))
    assert "…" not in text
    for words in (
        "join-shortest-queue",
        "31,000",
        "×0.31",
        "3.1%",
        "1,234",
        "×1.23",
        "the strongest baseline",
    ):
        assert words in text


@pytest.mark.parametrize("lost", [0, 12])
def test_where_workers_prefill_the_comparison_says_how_well_they_do_it_together(lost):
    more = {"prefill_balance": 0.135, "lost": lost, "ttft_ms_p95": 110_848.0}
    plain = result("join-shortest-queue", 10_000.0).model_copy(update=more)
    report = Report(scenario={"prefill_us_per_token": 20.0}, policies=[plain])
    text = shown(comparison_table(report))
    assert "…" not in text
    assert "14%" in text
    assert ("lost: join-shortest-queue 12" if lost else "lost: nothing") in " ".join(text.split())


def test_what_the_simulator_says_stands_beside_with_the_points_between():
    measured = [result("join-shortest-queue", 1000.0), result("br-0", 1400.0)]
    simulated = [result("join-shortest-queue", 900.0), result("br-0", 1305.0)]
    simulated[1].throughput_of_perfect = 0.921
    _, table = comparison_tables(Report(scenario={}, policies=measured, simulated=simulated))
    text = shown(table)
    assert "…" not in text
    rows = [line.split() for line in text.splitlines()]
    assert ["join-shortest-queue", "90.0", "90.0", "+0.0", "100.0", "100.0", "+0.0"] in rows
    assert ["br-0", "90.0", "92.1", "-2.1", "140.0", "145.0", "-5.0"] in rows


def test_what_the_simulator_says_without_a_baseline_or_figures():
    unknown = result("br-0").model_copy(update={"throughput_of_perfect": None})
    _, table = comparison_tables(Report(scenario={}, policies=[unknown], simulated=[unknown]))
    assert ["br-0", "-", "-", "-"] in [line.split() for line in shown(table).splitlines()]


def test_a_simulation_fits_eighty_columns_and_shows_what_there_is():
    # Of the largest deployment, with intervals, and with all that there may be.
    more = {"wait_ms_p99": 1_234_567.0, "mean_kv_tokens": 3_000_000.0}
    rare = {"prefill_balance": 0.135, "preemptions": 1590.0}
    interval = dict.fromkeys(("idle_fraction", "imbalance_kv_tokens"), 0.01)
    plain = result("br-0", intervals=interval).model_copy(update=more)
    text = shown(simulation_table(Report(scenario={}, policies=[plain])))
    assert "…" not in text
    assert "3,000" in text
    assert "pre" not in text
    report = Report(scenario={"prefill_us_per_token": 20.0}, policies=[plain.model_copy(update=rare)])
    text = shown(simulation_table(report))
    assert "…" not in text
    assert "1,590" in text
    assert "13.5" in text


def test_published_figures_stand_beside_ours_relative_to_each_strongest_baseline():
    results = [result("random", 990.0), result("least-kv"), result("br-0", 1100.0, 20_000.0), result("br-h")]
    published = {
        "random": PublishedFigures(800, 200_000, 80.0),
        "least-kv": PublishedFigures(700, 400_000, 90.0),
        "br-0": PublishedFigures(1000, 50_000, 76.0),
    }
    text = shown(published_table(Report(scenario={}, policies=results), published))
    assert "strongest baseline (ours: least-kv; paper: random)" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["br-0", "1,100", "1,000", "20,000", "50,000", "70.0", "76.0"] in rows
    assert ["×1.10", "×1.25", "×0.20", "×0.25", "×1.00", "×0.95"] in rows
    assert ["br-h", "1,000", "-", "100,000", "-", "70.0", "-"] in rows


def test_a_published_best_baseline_stands_beside_our_strongest():
    published = {BEST_BASELINE: PublishedFigures(366), "br-0": PublishedFigures(407)}
    results = [result("random", 900.0), result("least-kv", 950.0), result("br-0", 1100.0)]
    text = shown(published_table(Report(scenario={}, policies=results), published))
    rows = [line.split() for line in text.splitlines()]
    assert ["random", "900", "-"] in rows
    assert ["least-kv", "950", "366"] in rows
    assert ["×1.16", "×1.11"] in rows
    assert "imbal." not in text, "figures that the publication does not give have no columns"
    alone = shown(published_table(Report(scenario={}, policies=results[2:]), published))
    assert ["br-0", "1,100", "407"] in [line.split() for line in alone.splitlines()]


def test_unknown_figures_are_shown_as_such():
    unknown = result("br-0").model_copy(update={"imbalance_kv_tokens": None, "throughput_of_perfect": None})
    assert " - " in shown(comparison_table(Report(scenario={}, policies=[unknown])))


def test_the_tables_of_a_run():
    summary = latencies([outcome()])
    run = result("target", failures={"reset": 2}, ttft_ms=summary.ttft_ms, goodput_requests_per_s=1.5)
    text = shown(latency_table(run), outcome_table(run))
    assert "TTFT" in text
    assert "500.0" in text
    assert "reset" in text
    assert "1.50" in text


def test_the_document_has_the_documented_keys(tmp_path):
    path = tmp_path / "out.json"
    Report(scenario={"seed": 1}, policies=[result("br-0")]).write(path)
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["scenario"] == {"seed": 1}
    assert {
        *("policy", "imbalance_kv_tokens", "idle_fraction", "throughput_of_perfect", "output_tokens_per_s"),
        *("tpot_ms_p95", "ttft_ms_p95", "wait_ms_p99", "requests", "lost"),
    } <= document["policies"][0].keys()
    assert document["policies"][0]["wait_ms_p99"] is None
    assert Report.model_validate(document).policies[0].policy == "br-0"


def test_a_report_that_cannot_be_written(tmp_path):
    with pytest.raises(InvalidInputError, match="cannot be written: No such file or directory"):
        Report(scenario={}, policies=[]).write(tmp_path / "no" / "out.json")
