"""Groups that come and go with a reload under requests, over sockets: nothing is lost, nothing is left."""

import asyncio
import gc

import aiohttp
import orjson
import pytest

from brproxy.config import parse_config

EVENT = b'data: {"choices":[{"index":0,"text":" x"}]}\n\n'


OF_GROUPS = ("Prober.", "Poller.", "FaultWatch.", "AdapterWatch.", "Retiring.", "Returning.", "Handover.")


class Slow:
    """A worker whose streams begin at once and end when ``end`` is set."""

    def __init__(self):
        self.end = asyncio.Event()

    async def __call__(self, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + EVENT)
        await self.end.wait()
        writer.write(b"data: [DONE]\n\n")
        return False


@pytest.fixture
def start(start_worker, start_proxy, client):
    """Return a function that starts a proxy with these workers, and one that has others be there."""

    async def start(*workers, **tables):
        proxy = await start_proxy([], workers=list(workers), **tables)

        def reload(*workers):
            given = parse_config({"worker": list(workers)}, "test")
            config = proxy.running.deployment.config.model_copy(update={"worker": given.worker})
            return proxy.running.deployment.reload(config, "test")

        return proxy, reload

    return start


def streamed(client, proxy, model="m"):
    document = {"model": model, "prompt": "x", "stream": True}
    return client.post(proxy.url + "/v1/completions", json=document)


def names(proxy):
    return [group.name for group in proxy.groups]


def tasks():
    """Return what runs for groups, and for what was asked of them."""
    running = [task.get_coro().__qualname__ for task in asyncio.all_tasks()]
    return sorted(name for name in running if name.startswith(OF_GROUPS))


async def metrics(client, proxy):
    async with client.get(proxy.url + "/metrics") as response:
        return await response.text()


async def test_a_group_comes_and_another_goes_and_no_stream_is_cut(start, start_worker, client, until, fixed):
    async def answers(writer):
        writer.write(fixed(b'{"choices":[]}'))
        return True

    slow = Slow()
    old, new = await start_worker(slow), await start_worker(answers)
    gone = {"url": old.url, "group": "old", "model": "m", "name": "a"}
    proxy, reload = await start(gone)
    async with streamed(client, proxy) as response:
        await response.content.readexactly(len(EVENT))
        changes = reload({"url": new.url, "group": "new", "model": "m", "name": "b"})
        assert str(changes) == "added group new, removed group old, added b [new]"
        assert names(proxy) == ["old (leaving)", "new"]
        async with client.post(proxy.url + "/v1/completions", json={"model": "m", "prompt": "x"}) as other:
            assert (other.status, await other.read()) == (200, b'{"choices":[]}')
        assert 'group="old (leaving)"' in await metrics(client, proxy)
        slow.end.set()
        assert (await response.read()).endswith(b"[DONE]\n\n")
    await until(lambda: names(proxy) == ["new"])
    page = await metrics(client, proxy)
    assert 'group="new"' in page
    assert 'group="old' not in page
    reload({"url": new.url, "group": "new", "model": "m", "name": "b"})
    assert list(proxy.running.service.reaches) == [new.url]
    await proxy.idle()


async def test_nothing_is_left_of_groups_that_have_gone(start, start_emulator, client, until):
    emulator = await start_emulator(2)
    telemetry = {"enabled": True, "interval_s": 0.05}
    keep = {"url": emulator.urls[0], "group": "keep", "model": "other"}
    comes = {"url": emulator.urls[1], "group": "comes", "model": "emulated"}
    proxy, reload = await start(keep, telemetry=telemetry, health=True, fault_tolerance={"enabled": True})
    shared = next(iter(proxy.running.service.groups.each()[0].endpoints))._settings.shared
    await until(lambda: any(proxy.groups[0].roster.routable()))
    await until(lambda: "AdapterWatch._ask" not in tasks())
    before, followed = tasks(), len(proxy.running.service.watch._also)
    for _ in range(2):
        reload(keep, comes)
        await until(lambda: any(proxy.groups[-1].roster.routable()))
        document = {"model": "emulated", "prompt": "x", "max_tokens": 2}
        async with client.post(proxy.url + "/v1/completions", json=document) as response:
            assert response.status == 200
        group = id(proxy.groups[-1])
        reload(keep)
        await until(lambda: len(proxy.groups) == 1)
    await until(lambda: tasks() == before)
    assert (len(shared.endpoints), len(proxy.running.service.watch._also)) == (1, followed)
    assert "comes" not in await metrics(client, proxy)
    gc.collect()
    assert group not in {id(one) for one in gc.get_objects() if type(one).__name__ == "Group"}


async def test_who_waits_in_a_group_that_goes_is_served_by_it(start, start_worker, client, until):
    slow = Slow()
    worker = {"url": (await start_worker(slow)).url, "group": "g", "slots": 1}
    other = {"url": (await start_worker(slow)).url, "group": "other"}
    proxy, reload = await start(worker)
    async with streamed(client, proxy) as first:
        await first.content.readexactly(len(EVENT))
        waiting = asyncio.create_task(streamed(client, proxy).__aenter__())
        await until(lambda: proxy.waiting == 1)
        reload(other)
        slow.end.set()
        assert (await first.read()).endswith(b"[DONE]\n\n")
        async with await waiting as second:
            assert (await second.read()).endswith(b"[DONE]\n\n")
    await until(lambda: names(proxy) == ["other"])
    await proxy.idle()


async def test_what_does_not_end_in_time_is_ended(start, start_worker, client, until):
    slow = Slow()
    worker = {"url": (await start_worker(slow)).url, "group": "g", "slots": 1}
    other = {"url": (await start_worker(slow)).url, "group": "other"}
    proxy, reload = await start(worker, timeouts={"drain_s": 0.3})
    async with streamed(client, proxy) as first:
        await first.content.readexactly(len(EVENT))
        waiting = asyncio.create_task(streamed(client, proxy).__aenter__())
        await until(lambda: proxy.waiting == 1)
        reload(other)
        with pytest.raises(aiohttp.ClientPayloadError):
            await first.read()
        async with await waiting as second:
            assert second.status == 503
            said = orjson.loads(await second.read())["error"]["message"]
            assert said.startswith("The group g (leaving) was removed")
    await until(lambda: names(proxy) == ["other"])
    await proxy.idle()


async def test_a_model_moves_from_one_group_to_another(start, start_worker, client, until, fixed):
    def says(name):
        async def script(writer):
            writer.write(fixed(name))
            return True

        return script

    a, b = await start_worker(says(b'"a"')), await start_worker(says(b'"b"'))
    first, second = {"url": a.url, "group": "a"}, {"url": b.url, "group": "b"}
    proxy, reload = await start(first | {"model": ["m", "n"]}, second | {"model": "o"})

    async def asked(model):
        async with client.post(
            proxy.url + "/v1/completions", json={"model": model, "prompt": "x"}
        ) as response:
            return response.status, await response.read()

    assert [await asked(model) for model in "mno"] == [(200, b'"a"'), (200, b'"a"'), (200, b'"b"')]
    changes = reload(first | {"model": "n"}, second | {"model": ["o", "m"]})
    assert str(changes) == "models changed group a, models changed group b"
    assert [await asked(model) for model in "mno"] == [(200, b'"b"'), (200, b'"a"'), (200, b'"b"')]
    reload(first | {"model": "n"}, second | {"model": "o"})
    status, said = await asked("m")
    assert (status, b"Models served here: n, o." in said) == (404, True)


async def test_who_is_reached_otherwise_is_from_the_next_request_on(start, start_worker, client, fixed):
    async def script(writer):
        writer.write(fixed(b"{}"))
        return True

    server = await start_worker(script)
    worker = {"url": server.url, "name": "a"}
    proxy, reload = await start(worker)
    for fields in ({"X-Key": "1"}, {"X-Key": "2"}, {}):
        changes = reload(worker | {"headers": fields})
        assert (str(changes), changes.restart) == ("reached otherwise a [default] (headers)", ())
        async with client.post(proxy.url + "/v1/completions", json={"prompt": "x"}) as response:
            assert response.status == 200
    assert [headers.get("x-key") for _, headers, _ in server.requests] == ["1", "2", None]
    assert server.connections == 1, "those that are kept are used"
