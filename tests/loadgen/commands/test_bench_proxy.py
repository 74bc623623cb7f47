"""``loadgen bench-proxy`` as its users run it, with loads that are over in no time."""

import asyncio
import json
import resource
import sys
import tomllib

import pytest

from brproxy.config import parse_config
from brproxy.types import InvalidInputError
from loadgen.commands import bench_proxy
from loadgen.commands.bench_proxy import (
    DIRECT,
    OWN,
    SPLIT,
    BenchSettings,
    PlatformError,
    bench_proxies,
    own_config,
    parse_port,
)
from loadgen.dataplane.loads import parse_phase
from loadgen.report.proxies import ProxyReport

PHASES = (parse_phase("req", 1.0),)


async def run(*arguments):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadgen", "bench-proxy", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"COLUMNS": "80", "PATH": ""},
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_brproxy_beside_one_that_does_not_start(tmp_path, unused_tcp_port_factory):
    ports = [str(unused_tcp_port_factory()) for _ in range(3)]
    out_file = tmp_path / "out.json"
    code, out, err = await run(
        *("--port", ports[0], "--worker-ports", ",".join(ports[1:]), "--phases", "req,paced6"),
        *("--proxy", f"bad={sys.executable} -c 'exit({{port}})'"),
        *("--rounds", "1", "--seconds", "1", "--out", str(out_file)),
    )
    assert code == 2, err
    assert "bad ended with code" in err
    assert "req: small requests" in out
    assert "paced6: 6 streams, a token each 20 ms; per event" in out
    report = ProxyReport.model_validate(json.loads(out_file.read_text(encoding="utf-8")))
    assert report.errors.keys() == {"bad"}
    assert [(load.proxy, load.phase) for load in report.loads] == [(OWN.name, "req"), (OWN.name, "paced6")]
    for load in report.loads:
        assert load.failures == {}, load.first_failure
        assert load.units > 0
        assert load.cpu_us_per_unit > 0
        assert load.rss_bytes > 1e7
    assert report.loads[1].checked == 6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("pin", [True, False])
async def test_no_proxy_at_all_costs_what_the_load_costs(unused_tcp_port, pin):
    said = []
    settings = BenchSettings((DIRECT,), PHASES, worker_ports=(unused_tcp_port,), rounds=1, pin=pin)
    report = await bench_proxies(settings, said.append)
    (load,) = report.loads
    assert (load.rss_bytes, load.lost) == (0, 0)
    assert load.proxy_cpu_s == load.workers_cpu_s + load.client_cpu_s > 0
    assert 0 < load.generator_busy < 3
    assert said == [f"round 1: direct, req: {load.cpu_us_per_unit:.1f} CPU µs/request"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_prefill_and_decode_apart(unused_tcp_port_factory):
    port, *workers = (unused_tcp_port_factory() for _ in range(3))
    settings = BenchSettings((SPLIT,), PHASES, port=port, worker_ports=tuple(workers), rounds=1)
    report = await bench_proxies(settings, lambda _: None)
    assert report.errors == {}
    assert report.loads[0].failures == {}, report.loads[0].first_failure
    assert report.loads[0].units > 0


async def test_mistakes_are_one_line_and_exit_code_2():
    code, out, err = await run("--no-own")
    assert (code, out) == (2, "")
    assert err == "loadgen: there is nothing to measure: give --proxy NAME=COMMAND LINE\n"


def test_settings_that_make_no_sense():
    with pytest.raises(InvalidInputError, match="a name of its own, got brproxy, brproxy"):
        BenchSettings((OWN, OWN), PHASES)
    with pytest.raises(InvalidInputError, match="at least one phase and one worker port"):
        BenchSettings((OWN,), ())
    with pytest.raises(InvalidInputError, match="apart need a worker port each"):
        BenchSettings((SPLIT,), PHASES, worker_ports=(1,))
    for text in ("0", "65536", "-1"):
        with pytest.raises(InvalidInputError, match="a port is a number"):
            parse_port(text)


async def test_only_linux_has_what_it_takes(monkeypatch):
    monkeypatch.setattr(bench_proxy.platform, "system", lambda: "Darwin")
    with pytest.raises(PlatformError, match="which only Linux has"):
        await bench_proxies(BenchSettings((OWN,), PHASES), print)


def test_our_own_configuration():
    text = own_config(BenchSettings((OWN,), PHASES, port=1234, worker_ports=(5, 6)))
    config = parse_config(tomllib.loads(text), "own")
    assert config.listen.port == 1234
    assert config.routing.policy == "br-h"
    assert [worker.url for worker in config.worker] == ["http://127.0.0.1:5", "http://127.0.0.1:6"]
    text = own_config(BenchSettings((SPLIT,), PHASES, worker_ports=(5, 6, 7)), split=True)
    roles = [worker.role for worker in parse_config(tomllib.loads(text), "own").worker]
    assert roles == ["prefill", "decode", "decode"]


def test_the_limit_of_open_files_is_raised_as_far_as_it_goes(monkeypatch):
    raised = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    bench_proxy._allow_open_files(100)
    assert raised == []
    bench_proxy._allow_open_files(1000)
    assert raised == [(2256, 4096)]
    with pytest.raises(InvalidInputError, match="need 20256 open files; ulimit -Hn allows 4096"):
        bench_proxy._allow_open_files(10_000)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    bench_proxy._allow_open_files(10_000)
    assert len(raised) == 1
