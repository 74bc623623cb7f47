"""Workers that come up late or come back as others: they are asked once, and the proxy follows."""

import asyncio
import logging

import pytest

from brproxy import returning
from brproxy.app import running_proxy
from brproxy.config import parse_config
from brproxy.config_workers import Worker
from brproxy.discovery import fill_in
from brproxy.roster import WorkerLimits
from brproxy.starting import found_at, of_urls
from tests.brproxy.conftest import HANG_S
from tests.brproxy.engine_pages import MODEL, SGLANG, VLLM, loads, models, server_info, serving

OTHER = SGLANG | {
    "/v1/models": models("sglang", "other"),
    "/v1/loads": loads((0, 32, 5000), (1, 32, 5000)),
    "/server_info": server_info(dp_size=2),
}
"""SGLang after a restart with another model, and everything else."""


@pytest.fixture(autouse=True)
def all_levels(caplog):
    caplog.set_level(logging.INFO, "brproxy")


@pytest.fixture
def start(stack):
    """Return a function that starts servers with such pages, and a proxy with a worker "a" at the first."""

    async def start(*pages, **keys):
        servers = [await stack.enter_async_context(serving(each, status=503)) for each in pages]
        config = parse_config(
            {
                "listen": {"port": 0},
                "discovery": {"timeout_s": HANG_S},
                "telemetry": {"enabled": False},
                "health": {"interval_s": 0.02, "timeout_s": HANG_S, "unhealthy_after": 1},
                "worker": [{"url": servers[0].url, "name": "a", "engine": "sglang"} | keys],
            },
            "x",
        )
        proxy = await stack.enter_async_context(running_proxy(await fill_in(config)))
        (group,) = proxy.service.fleet.groups
        return *servers, proxy, group.roster

    return start


async def until(is_so):
    async with asyncio.timeout(HANG_S):
        while not is_so():
            await asyncio.sleep(0.01)


async def goes_out_and_comes_back_as(server, roster, pages):
    server.pages = {}
    await until(lambda: not roster.member(0).is_routable)
    server.asked.clear()
    server.pages = pages
    await until(lambda: roster.member(0).is_routable)


def warnings(caplog):
    return [
        r.getMessage()
        for r in caplog.records
        if r.levelno == logging.WARNING and r.getMessage().startswith("worker a [")
    ]


async def test_one_that_comes_up_late_is_asked_then(start):
    server, proxy, roster = await start({})
    member = roster.member(0)
    await until(lambda: server.asked.count("/health") > 2)
    assert member.limits == WorkerLimits(64, slots_are_assumed=True)
    server.asked.clear()
    server.pages = SGLANG
    await until(lambda: member.limits == WorkerLimits(256, 440_000, capacity_is_found=True))
    await until(lambda: server.asked.count("/health") > 3)
    assert sorted(set(server.asked)) == ["/health", "/server_info", "/v1/loads", "/v1/models", "/version"]
    assert server.asked.count("/v1/models") == 1, "once, not at each check"
    assert proxy.deployment.config.worker[0].slots == 256


async def test_one_that_comes_back_as_another_is_followed_and_told_of_with_both_numbers(start, caplog):
    server, _, roster = await start(SGLANG)
    assert roster.member(0).limits.slots == 256
    caplog.clear()
    await goes_out_and_comes_back_as(server, roster, OTHER)
    # Both ranks together: the file has them as one worker.
    await until(lambda: roster.member(0).limits == WorkerLimits(64, 10_000, capacity_is_found=True))
    assert warnings(caplog) == [
        "worker a [default]: 2 DP ranks are behind this URL, and the file has 1",
        f"worker a [default]: it serves other now, and served {MODEL}",
        "worker a [default]: it has 32 slots now, and had 256",
        "worker a [default]: it has 5,000 KV tokens now, and had 440,000",
        "worker a [default]: it has 2 DP ranks now, and had 1",
    ]
    assert "limits changed a [default] (slots, kv_capacity_tokens)" in caplog.messages[-1]


async def test_what_the_file_says_holds_and_a_model_that_is_gone_is_told(start, caplog):
    server, _, roster = await start(SGLANG, model=MODEL, slots=8, kv_capacity_tokens=9)
    caplog.clear()
    await goes_out_and_comes_back_as(server, roster, OTHER)
    await until(lambda: f"it serves other now, and served {MODEL}" in caplog.text)
    assert roster.member(0).limits == WorkerLimits(8, 9)
    assert f"worker a [default]: configured but not served: {MODEL}" in warnings(caplog)
    assert "worker a [default]: slots = 8 in the file, but it runs 64 at once" in warnings(caplog)


async def test_one_that_comes_back_as_it_was_is_no_news(start, caplog):
    server, _, roster = await start(SGLANG)
    caplog.clear()
    await goes_out_and_comes_back_as(server, roster, SGLANG)
    await until(lambda: any("worker a [default]: SGLang" in line for line in caplog.messages))
    assert warnings(caplog) == []
    assert roster.member(0).limits.slots == 256


async def test_one_that_joins_while_the_proxy_runs_is_asked(start):
    _, late, proxy, roster = await start(SGLANG, OTHER)
    proxy.deployment.add(Worker(url=late.url, name="late", engine="sglang"))
    await until(lambda: roster.find("late").limits == WorkerLimits(64, 10_000, capacity_is_found=True))


async def test_one_that_has_started_anew_is_asked_though_its_checks_saw_nothing(start):
    server, proxy, roster = await start(SGLANG)
    await until(lambda: roster.member(0).is_routable)
    server.pages = OTHER
    proxy.parts.returning.restarted(proxy.service.fleet.groups[0], roster.member(0))
    await until(lambda: roster.member(0).limits.slots == 64)


async def test_what_fails_is_told_and_the_next_is_asked(start, caplog, monkeypatch):
    server, _, roster = await start(VLLM)

    async def broken(*_):
        raise ValueError("x")

    monkeypatch.setattr(returning, "find_out", broken)
    await goes_out_and_comes_back_as(server, roster, OTHER)
    await until(lambda: "asking a worker who it is failed" in caplog.text)
    monkeypatch.undo()
    await goes_out_and_comes_back_as(server, roster, OTHER)
    await until(lambda: roster.member(0).limits.kv_capacity_tokens == 10_000)


async def test_without_a_file_who_comes_back_is_asked_and_followed_the_same(stack, caplog):
    server = await stack.enter_async_context(serving(SGLANG, status=503))
    found = await found_at(of_urls([server.url]))
    assert server.asked.count("/v1/models") == 1
    given = parse_config(
        {
            "listen": {"port": 0},
            "health": {"interval_s": 0.02, "timeout_s": HANG_S, "unhealthy_after": 1},
            "telemetry": {"enabled": False},
            "worker": [{"url": server.url}],
        },
        "x",
    )
    config = found.model_copy(update={key: getattr(given, key) for key in ("listen", "health", "telemetry")})
    assert await fill_in(config) == config
    assert server.asked.count("/v1/models") == 1, "nobody is asked twice"
    proxy = await stack.enter_async_context(running_proxy(config))
    (group,) = proxy.service.fleet.groups
    member = group.roster.member(0)
    assert member.limits == WorkerLimits(256, 440_000, capacity_is_found=True)
    await until(lambda: member.is_routable)
    await goes_out_and_comes_back_as(server, group.roster, OTHER)
    await until(lambda: member.limits == WorkerLimits(64, 10_000, capacity_is_found=True))
    assert any(line.endswith(f"it serves other now, and served {MODEL}") for line in caplog.messages)
