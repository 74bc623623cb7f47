"""The commands as their users run them, on deployments that are over in seconds."""

import asyncio
import json
import re
import sys

import pytest

from brproxy.registry import UnknownNameError
from brproxy.types import InvalidInputError
from loadgen.cli import main
from loadgen.cluster_settings import ClusterSettings
from loadgen.commands.compare import ComparisonSettings
from loadgen.commands.processes import ProcessError, running_process
from loadgen.commands.scenario import Arrivals, Scenario, WorkloadChoice
from loadgen.commands.scenario_file import load_scenario
from loadgen.report.schema import Report

SMALL = ("--workers", "3", "--slots", "4", "--speed", "20", "--requests", "40")


async def start(*arguments):
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "loadgen",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"COLUMNS": "80", "PATH": ""},
    )


async def run(*arguments):
    process = await start(*arguments)
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def emulating(*arguments):
    process = await start("emulate", "--base-port", "0", *arguments)
    line = (await process.stdout.readline()).decode()
    return process, re.findall(r"http://\S+", line)


async def stop(process):
    process.terminate()
    await process.communicate()
    assert process.returncode == 0


async def test_emulated_prefill_workers_say_where_their_bootstrap_ports_are():
    arguments = ("--workers", "2", "--role", "prefill", "--transfer", "sglang", "--bootstrap-port", "0")
    process, urls = await emulating(*arguments)
    line = (await process.stdout.readline()).decode()
    assert len({*urls, *re.findall(r"http://\S+", line)}) == 4, line
    await stop(process)


async def test_compare_prints_a_table_and_writes_the_document(tmp_path):
    out_file = tmp_path / "out.json"
    policies = "join-shortest-queue,br-0"
    code, out, err = await run(
        "compare", "--policies", policies, *SMALL, "--seed", "3", "--out", str(out_file)
    )
    assert code == 0, err
    assert "×: relative to join-shortest-queue, the strongest baseline" in out
    report = Report.model_validate(json.loads(out_file.read_text(encoding="utf-8")))
    assert [result.policy for result in report.policies] == policies.split(",")
    assert report.scenario["rate"] == 1.1
    for result in report.policies:
        assert (result.requests, result.lost) == (40, 0)
        assert 0 <= result.idle_fraction < 1
        assert result.tpot_ms_p95 > 29


async def test_compare_beside_the_simulator(tmp_path):
    out_file = tmp_path / "out.json"
    code, out, err = await run(
        *("compare", "--policies", "least-kv,br-0", "--beside-simulator", *SMALL),
        *("--prefill-us-per-token", "20", "--prefill-tokens-max", "512", "--out", str(out_file)),
    )
    assert code == 0, err
    assert "beside the simulator" in out
    report = Report.model_validate(json.loads(out_file.read_text(encoding="utf-8")))
    assert [result.policy for result in report.simulated] == ["least-kv", "br-0"]
    for measured, simulated in zip(report.policies, report.simulated, strict=True):
        assert simulated.requests == measured.requests
        assert simulated.throughput_of_perfect > 0


async def test_compare_with_kv_capacity_and_prefill(tmp_path):
    trace = tmp_path / "trace.csv"
    rows = "".join(f"2024-05-12 00:00:{i:02}+00:00,{50 + i},{5 + i % 3}\n" for i in range(20))
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows, encoding="utf-8")
    code, out, err = await run(
        *("compare", "--policies", "least-kv,br-h", "--trace", str(trace), "--speed", "20", "--slots", "2"),
        *("--kv-capacity-tokens", "200", "--prefill-us-per-token", "10", "--workers", "2"),
        *("--prefill-tokens-max", "20", "--out", str(tmp_path / "out.json")),
    )
    assert code == 0, err
    assert "br-h" in out
    document = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert document["scenario"]["prefill_tokens_max"] == 20
    for policy in document["policies"]:
        assert 0.5 <= policy["prefill_balance"] <= 1
        assert policy["mean_kv_tokens"] > 0
        assert policy["preemptions"] == 0
        # Seconds of streams are too few.
        assert policy["learnt"] is None
        assert policy["late_share"] >= 0


APART = """
policies = ["least-kv", "br-0"]
[workload]
name = "short"
requests_per_worker = 20
[cluster]
workers = 2
slots = 4
prefill_us_per_token = 10
[prefill]
workers = 2
transfer = "{}"
kv_capacity_tokens = 40000
"""


@pytest.mark.parametrize("transfer", ["nixl", "sglang"])
async def test_compare_with_prefill_workers(transfer, tmp_path):
    file, out_file = tmp_path / "apart.toml", tmp_path / "out.json"
    file.write_text(APART.format(transfer), encoding="utf-8")
    code, out, err = await run(
        *("compare", "--scenario", str(file), "--policies", "br-0", "--speed", "20"),
        *("--out", str(out_file)),
    )
    assert code == 0, err
    assert "prefill side" in out
    report = Report.model_validate(json.loads(out_file.read_text(encoding="utf-8")))
    (result,) = report.policies
    assert (result.policy, result.requests, result.lost) == ("br-0", 40, 0)
    assert (report.scenario["prefill_workers"], report.scenario["transfer"]) == (2, transfer)
    prompts = sum(
        request.prompt_tokens
        for request in load_scenario(file).scenario(tmp_path, 0, None, None).draw()[0].requests
    )
    assert sum(result.prefill.prefill_tokens) >= prompts
    assert 1 <= result.prefill.unevenness <= 2
    assert len(result.prefill.held_tokens_max) == 2
    assert 0 < max(result.prefill.held_tokens_max) <= 40000


async def test_run_against_an_emulator(tmp_path):
    process, urls = await emulating("--workers", "1", "--speed", "20")
    out_file = tmp_path / "out.json"
    code, out, err = await run(
        *(
            "run",
            "--target",
            urls[0],
            "--requests",
            "20",
            "--requests-per-s",
            "5",
            "--speed",
            "20",
            "--verify",
        ),
        *("--slo-ttft-ms", "60000", "--label", "direct", "--out", str(out_file)),
    )
    await stop(process)
    assert code == 0, err
    for words in ("TTFT", "TPOT", "ITL", "end to end", "goodput requests/s", "output tokens/s"):
        assert words in out
    result = json.loads(out_file.read_text(encoding="utf-8"))["policies"][0]
    assert (result["policy"], result["requests"], result["lost"]) == ("direct", 20, 0)
    assert result["imbalance_kv_tokens"] is None
    assert result["goodput_requests_per_s"] > 0


async def test_run_counts_what_it_lost(unused_tcp_port):
    target = f"http://127.0.0.1:{unused_tcp_port}"
    code, out, _ = await run("run", "--target", target, "--requests", "3", "--requests-per-s", "100")
    assert code == 0
    assert re.search(r"connect\s+3", out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("emulate", "--role", "prefill"), "loadgen: workers with the role prefill need a transfer: nixl,"),
        (("compare", "--policies", "br-9"), "loadgen: unknown policy 'br-9'; allowed: br-0, br-h,"),
        (("compare", "--workload", "tall"), "loadgen: unknown workload 'tall'; allowed: proprietary,"),
        (
            ("compare", "--scenario", "x.toml", "--slots", "3", "--seed", "1"),
            "loadgen: --slots: the scenario file says that; change it there",
        ),
        (
            ("compare", "--prefill-workers", "1", "--transfer", "ascend-layerwise"),
            "loadgen: the transfer ascend-layerwise cannot be compared",
        ),
        (
            ("compare", "--prefill-workers", "1", "--prefill-kv-capacity-tokens", "9"),
            "loadgen: request 1 of 'short' grows to",
        ),
        (
            ("compare", "--prefill-workers", "1", "--beside-simulator"),
            "loadgen: the simulator has no prefill workers: leave out --beside-simulator, or them",
        ),
        (("emulate", "--deployments", "0"), "loadgen: there are 1 to 64 deployments, got 0"),
        (("compare", "--workers", "0"), "loadgen: workers and slots must be at least 1, got 0 and 64"),
        (
            ("run", "--target", "http://127.0.0.1:1"),
            "loadgen: workload 'short' has no arrival times: give --requests-per-s",
        ),
        (("run", "--target", "x", "--trace", "/no.csv"), "loadgen: /no.csv: cannot be read: No such file"),
        (("run", "--target", "x", "--requests", "0"), "loadgen: requests must be at least 1, got 0"),
        (
            ("compare", "--out", "/no/x.json"),
            "loadgen: /no/x.json: cannot be written: there is no folder /no",
        ),
        (("demo", "--out", "/"), "loadgen: /: cannot be written: it is a folder"),
        (
            ("simulate", "--plot", "/no/x.png"),
            "loadgen: /no/x.png: cannot be written: there is no folder /no",
        ),
        (("demo", "--speed", "0"), "loadgen: the speed must be more than 0 and at most 1000, got 0.0"),
        (
            ("compare", "--speed", "1001"),
            "loadgen: the speed must be more than 0 and at most 1000, got 1001.0",
        ),
        (("emulate", "--speed", "0"), "loadgen: the speed must be more than 0 and at most 1000, got 0.0"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, words, monkeypatch, capsys):
    # Without a process for each: most of what one takes is to start.
    monkeypatch.setattr(sys, "argv", ["loadgen", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith(words)
    assert err.count("\n") == 1


async def test_help_and_version():
    code, out, _ = await run("--help")
    assert code == 0
    for command in ("emulate", "run", "compare", "demo", "bench-proxy"):
        assert command in out
    assert (await run("--version"))[1].startswith("loadgen ")


async def test_a_process_that_does_not_start_is_reported_with_its_last_line():
    with pytest.raises(ProcessError, match="loadgen did not start: loadgen: the speed must be more than 0"):
        async with running_process("loadgen", ("emulate", "--speed", "0"), re.compile("never")):
            pass


def test_compared_policies_exist():
    with pytest.raises(UnknownNameError):
        ComparisonSettings(("nope",))


def test_a_scenario_is_repeatable():
    scenario = Scenario(WorkloadChoice("short", None, 50), Arrivals(rate=0.9), ClusterSettings(2, 4), seed=5)
    workload, capacity = scenario.draw()
    assert scenario.draw() == (workload, capacity)
    span_s = workload.requests[-1].arrival_s
    assert 49 / span_s == pytest.approx(0.9 * capacity.requests_per_s, rel=0.5)
    assert scenario.describe(workload)["step_ns_per_kv_token"] == pytest.approx(100.0)


def test_a_synthetic_workload_needs_a_number():
    with pytest.raises(InvalidInputError, match="give --requests"):
        Scenario(WorkloadChoice("short", None, None), Arrivals(requests_per_s=1.0)).draw()
