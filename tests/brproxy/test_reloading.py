"""A file that is read again: who is asked who it is then, and that nobody waits for an answer."""

import asyncio

import pytest

from brproxy import returning
from brproxy.app import running_proxy
from brproxy.config import load_config
from brproxy.discovery import fill_in
from brproxy.roster import WorkerLimits
from tests.brproxy.conftest import HANG_S
from tests.brproxy.engine_pages import MODEL, SGLANG, models, serving

ASKED = "/v1/models"
OTHER = SGLANG | {"/v1/models": models("sglang", "other")}
SILENT = None
"""In place of pages: it takes questions, and answers none."""


@pytest.fixture
def start(stack, tmp_path):
    """Return a function that starts servers with such pages, and a proxy with the first as worker "a"."""

    async def start(*pages):
        servers = [
            await stack.enter_async_context(serving({}, silent=[ASKED, "/version"]))
            if each is SILENT
            else await stack.enter_async_context(serving(each))
            for each in pages
        ]
        path = tmp_path / "brproxy.toml"
        write(path, {"a": servers[0].url})
        proxy = await stack.enter_async_context(running_proxy(await fill_in(load_config(path)), path=path))
        for server in servers:
            server.asked.clear()
        return *servers, proxy, path

    return start


def write(path, urls, more=""):
    text = "[listen]\nport = 0\n[health]\nenabled = false\n[telemetry]\nenabled = false\n"
    text += f"[discovery]\ntimeout_s = {HANG_S}\n"
    for name, url in urls.items():
        text += f'[[worker]]\nname = "{name}"\nurl = "{url}"\nengine = "sglang"\n{more}'
    path.write_text(text)


async def until(is_so):
    async with asyncio.timeout(HANG_S):
        while not is_so():
            await asyncio.sleep(0.01)


def limits(proxy, name):
    (group,) = proxy.service.fleet.groups
    return group.roster.find(name).limits


async def test_who_has_not_changed_is_not_asked_and_what_is_known_of_it_holds(start):
    server, proxy, path = await start(SGLANG)
    server.pages = OTHER
    for _ in range(3):
        assert (await proxy.reloading.reload()).steps == ()
    assert limits(proxy, "a") == WorkerLimits(256, 440_000, capacity_is_found=True)
    await asyncio.sleep(0)
    assert server.asked == []
    write(path, {"a": server.url}, "slots = 8\n")
    await proxy.reloading.reload()
    server.pages = {}
    await until(lambda: ASKED in server.asked)
    write(path, {"a": server.url})
    await proxy.reloading.reload()
    assert limits(proxy, "a") == WorkerLimits(256, 440_000, capacity_is_found=True), "as it said last"


async def test_whose_table_has_changed_is_asked_and_what_it_says_otherwise_is_told(start, caplog):
    server, proxy, path = await start(SGLANG)
    server.pages = OTHER
    write(path, {"a": server.url}, "slots = 8\n")
    changes = await proxy.reloading.reload()
    assert list(map(str, changes.steps)) == ["limits changed a [default] (slots)"]
    await until(lambda: f"worker a [default]: it serves other now, and served {MODEL}" in caplog.messages)
    assert server.asked.count(ASKED) == 1
    assert limits(proxy, "a") == WorkerLimits(8, 440_000, capacity_is_found=True)


async def test_nobody_waits_for_an_answer_and_who_is_new_is_asked_once(start):
    _, silent, other, proxy, path = await start(SGLANG, SILENT, SGLANG)
    urls = {"a": proxy.deployment.config.worker[0].url, "silent": silent.url}
    write(path, urls)
    # The limit for an answer is longer than any test.
    await proxy.reloading.reload()
    await until(lambda: ASKED in silent.asked)
    write(path, urls | {"other": other.url})
    await proxy.reloading.reload()
    await until(lambda: limits(proxy, "other") == WorkerLimits(256, 440_000, capacity_is_found=True))
    assert limits(proxy, "silent") == WorkerLimits(64, slots_are_assumed=True)
    assert silent.asked.count(ASKED) == other.asked.count(ASKED) == 1


async def test_who_has_never_answered_is_asked_again_with_a_reload_but_not_with_each(start, monkeypatch):
    server, proxy, _ = await start({})
    await proxy.reloading.reload()
    await until(lambda: server.asked.count(ASKED) == 1)
    for _ in range(3):
        await proxy.reloading.reload()
    monkeypatch.setattr(returning, "ASKED_AGAIN_S", 0.0)
    proxy.parts.returning._silent_next_s = 0.0
    server.pages = SGLANG
    await proxy.reloading.reload()
    await until(lambda: limits(proxy, "a") == WorkerLimits(256, 440_000, capacity_is_found=True))
    assert server.asked.count(ASKED) == 2
