"""What bench-proxy shows of its loads."""

import pytest
from rich.console import Console

from loadgen.dataplane.loads import parse_phase
from loadgen.report.proxies import ProxyLoad, ProxyReport, proxy_table
from loadgen.report.schema import Percentiles


def load(proxy, cpu_us, phase="paced200", number=1, **more):
    latency = Percentiles(mean=1.0, p50=1.5, p95=2.0, p99=2.5)
    figures = {
        "window_s": 2.0,
        "requests": 20,
        "events": 20_000,
        "reads": 1,
        "workers_cpu_s": 0.1,
        "client_cpu_s": 0.1,
        "rss_bytes": 80_000_000,
        "checked": 20,
        "failures": {},
        "first_failure": "",
        "units": 20_000,
        "proxy_cpu_s": cpu_us * 0.02,
        "cpu_us_per_unit": cpu_us,
        "generator_busy": 0.5,
        "offered_per_s": None,
        "ticks_skipped": 0.0,
        **dict.fromkeys(("first_ms", "whole_ms", "delay_ms", "gap_ms"), latency),
    }
    return ProxyLoad(**figures | {"proxy": proxy, "phase": phase, "round": number} | more)


def shown(report, phase):
    console = Console(width=80, no_color=True)
    with console.capture() as capture:
        console.print(proxy_table(report, parse_phase(phase, 2.0)))
    return capture.get()


def report(*loads):
    return ProxyReport(settings={}, loads=list(loads), errors={})


def test_medians_spread_and_relation_to_the_first():
    rounds = [load("a", 40.0, number=1), load("a", 30.0, number=2), load("a", 32.0, number=3)]
    text = shown(report(*rounds, load("a-rather-long-name", 16.0, rss_bytes=0)), "paced200")
    assert "paced200: 200 streams, a token each 20 ms; per event" in text
    for words in ("32.0", "30.0-40.0", "×1.00", "16.0", "×0.50", "10,000", "1.5", "2.5", "80", "gap"):
        assert words in text
    assert "…" not in text
    assert all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize(
    ("phase", "there", "absent"),
    [("req", "/request", "first"), ("short", "first", "delay"), ("unpaced", "delay", "whole")],
)
def test_each_phase_shows_what_it_can_say(phase, there, absent):
    text = shown(report(load("a", 1.0, phase)), phase)
    assert there in text
    assert absent not in text
    assert "×1.00" in text


def test_what_is_not_known_and_who_is_absent():
    nothing = load("a", 1.0, units=0, cpu_us_per_unit=None, delay_ms=None, gap_ms=None)
    assert " - " in shown(report(nothing), "paced200")
    assert "proxy" in shown(report(), "paced200")


def test_doubts_are_told_once_for_all_rounds():
    assert report(load("a", 1.0)).warnings() == []
    lost = {"failures": {"reset": 2, "timeout": 1}, "first_failure": "reset: by peer"}
    doubtful = report(
        load("a", 1.0, ticks_skipped=0.2, generator_busy=0.97),
        load("a", 1.0, number=2, ticks_skipped=0.3, **lost),
        load("b", 1.0, "req"),
        load("b", 1.0, offered_per_s=10_100.0),
        load("c", 1.0, offered_per_s=20_000.0),
        load("c", 1.0, number=2, offered_per_s=40_000.0, ticks_skipped=0.5),
    )
    assert doubtful.warnings() == [
        "paced200, a: 3 requests lost, the first: reset: by peer",
        "paced200, a: the load generator skipped 30% of its ticks: rates and delays are partly its own",
        "paced200, a: the load generator used 97% of its core: rates and delays are partly its own",
        "paced200, c: only 50% of the load came through: the delays are a saturated proxy's",
        "paced200, c: the load generator skipped 50% of its ticks: rates and delays are partly its own",
    ]
