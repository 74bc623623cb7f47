"""Workers that come, drain and go while their group runs, over real sockets."""

import asyncio

import pytest

from brproxy.roster import MemberState, RosterError, WorkerLimits

DOCUMENT = {"model": "emulated", "prompt": "x", "max_tokens": 1}


async def ask(client, proxy, **more):
    async with client.post(proxy.url + "/v1/completions", json=DOCUMENT | more) as response:
        return response.status, await response.read()


async def metrics(client, proxy):
    async with client.get(proxy.url + "/metrics") as response:
        return await response.text()


async def test_one_that_is_added_is_checked_served_and_shown(start_emulator, start_proxy, client, until):
    first, second = await start_emulator(1), await start_emulator(1)
    proxy = await start_proxy(first.urls, health=True, routing={"policy": "round-robin"})
    group = proxy.groups[0]
    member = group.add("late", WorkerLimits(8), second.urls[0])
    assert group.roster.routable() == (True, False), "not before its first check"
    await until(lambda: member.is_routable)
    group.drain(group.roster.member(0).key)
    for _ in range(2):
        assert (await ask(client, proxy))[0] == 200, "by the one that is left"
    text = await metrics(client, proxy)
    assert 'brproxy_worker_routable{group="default",worker="late"} 1.0' in text
    assert 'brproxy_retries_total{group="default",worker="late"} 0.0' in text
    assert len(proxy.running.service.groups["default"].endpoints) == 2
    await proxy.idle()


async def test_one_that_is_removed_finishes_what_it_has_and_is_forgotten(
    start_emulator, start_worker, start_proxy, client, until
):
    stopped = asyncio.Event()

    async def script(writer):
        await stopped.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        return True

    slow, emulator = await start_worker(script), await start_emulator(1)
    proxy = await start_proxy([slow.url, *emulator.urls], health=False)
    group, service = proxy.groups[0], proxy.running.service.groups["default"]
    slow_key = group.roster.member(0).key
    group.drain(group.roster.member(1).key)
    running = asyncio.create_task(ask(client, proxy))
    await until(lambda: proxy.ledger.requests == (1, 0))
    member = group.remove(slow_key)
    assert member.state is MemberState.DRAINING
    again = group.add("again", WorkerLimits(8), emulator.urls[0])
    for _ in range(3):
        assert (await ask(client, proxy))[0] == 200
    assert proxy.ledger.requests == (1, 0, 0)
    stopped.set()
    assert (await running) == (200, b"{}")
    await until(lambda: member.state is MemberState.GONE)
    assert [m.key for m in group.roster.members] == [group.roster.member(1).key, again.key]
    assert [endpoint.origin for endpoint in service.endpoints] == list(emulator.urls), "which two share"
    with pytest.raises(RosterError):
        service.endpoint(member.index)
    assert f'worker="{slow_key}"' not in await metrics(client, proxy)
    assert (await ask(client, proxy))[0] == 200
    await proxy.idle()


async def test_two_of_one_name_are_told_apart_while_one_of_them_leaves(start_worker, start_proxy, client):
    stopped = asyncio.Event()

    async def script(writer):
        await stopped.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        return True

    slow = await start_worker(script)
    proxy = await start_proxy([], workers=[{"url": slow.url, "name": "w"}])
    running = asyncio.create_task(ask(client, proxy))
    while not slow.requests:
        await asyncio.sleep(0.001)
    group = proxy.groups[0]
    group.remove("w")
    group.add("w", WorkerLimits(8), "http://127.0.0.1:1")
    text = await metrics(client, proxy)
    series = [line.partition(" ")[0] for line in text.splitlines() if line.startswith("brproxy_")]
    assert len(series) == len(set(series)), "a page that has one twice is refused as a whole"
    assert 'brproxy_worker_requests{group="default",worker="w (leaving)"} 1.0' in text
    assert 'brproxy_worker_requests{group="default",worker="w"} 0.0' in text
    stopped.set()
    assert (await running) == (200, b"{}")
    await proxy.idle()
    assert "leaving" not in await metrics(client, proxy)


async def test_who_waits_for_the_largest_worker_is_not_forgotten_when_that_shrinks(
    start_worker, start_proxy, client, until, answer, fixed
):
    worker = await start_worker(answer(fixed(b"{}")))
    proxy = await start_proxy([], workers=[{"url": worker.url, "name": "w", "kv_capacity_tokens": 1000}])
    group = proxy.groups[0]
    group.drain("w")
    asked = asyncio.create_task(ask(client, proxy, prompt="x" * 8000))
    await until(lambda: proxy.waiting == 1)
    group.set_limits("w", WorkerLimits(1, 100))
    group.resume("w")
    async with asyncio.timeout(60):
        assert (await asked)[0] == 200
    await proxy.idle()


async def test_where_all_checks_fail_requests_are_served_all_the_same(raw_worker, start_proxy, client, until):
    status = b"200 OK"

    async def script(worker, reader, writer):
        while True:
            length = await worker.read_head(reader)
            is_check = worker.requests[-1].startswith(b"GET /health")
            await reader.readexactly(length)
            said = status if is_check else b"200 OK"
            writer.write(b"HTTP/1.1 %b\r\nContent-Length: 2\r\n\r\n{}" % said)

    worker = await raw_worker(script)
    health = {"unhealthy_after": 1, "ejected_share_max": 0.5}
    proxy = await start_proxy([worker.url], health=True, health_table=health)
    member = proxy.groups[0].roster.member(0)
    status = b"500 Bad"
    await until(lambda: not member.is_routable)
    assert (await ask(client, proxy))[0] == 200
    async with client.get(proxy.url + "/ready") as response:
        assert response.status == 503, "who can send requests elsewhere should"
    await proxy.idle()


async def test_a_group_with_a_rank_down_is_said_to_be_down_and_comes_back(
    start_emulator, start_worker, start_proxy, client, until
):
    is_well = False

    async def script(writer):
        status = b"200 OK" if is_well else b"500 Bad"
        writer.write(b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % status)
        return False

    emulator, rank = await start_emulator(1), await start_worker(script)
    names = {"one": emulator.urls[0], "two": rank.url}
    workers = [{"url": url, "name": name} for name, url in names.items()]
    proxy = await start_proxy([], workers=workers, health=True, health_table={"unhealthy_after": 1})

    async def ready():
        async with client.get(proxy.url + "/ready") as response:
            return response.status, await response.text()

    assert await ready() == (200, "ready\ngroup default is down: 1 of 2 workers, two: /health answers 500\n")
    is_well = True
    await until(lambda: all(proxy.groups[0].roster.routable()))
    assert await ready() == (200, "ready\n")


async def test_a_group_without_workers_lets_its_requests_wait(start_emulator, start_proxy, client, until):
    emulator = await start_emulator(1)
    proxy = await start_proxy(emulator.urls, health=True)
    group = proxy.groups[0]
    group.remove(group.roster.member(0).key)
    async with client.get(proxy.url + "/ready") as response:
        assert response.status == 503
    assert "brproxy_envelope_kv_tokens" in await metrics(client, proxy)
    asked = asyncio.create_task(ask(client, proxy))
    await until(lambda: proxy.waiting == 1)
    group.add("new", WorkerLimits(4), emulator.urls[0])
    async with asyncio.timeout(5):
        assert (await asked)[0] == 200
    await proxy.idle()


async def test_the_checks_of_one_that_has_gone_end(start_emulator, start_proxy, until):
    emulator = await start_emulator(2)
    proxy = await start_proxy(emulator.urls, health=True)
    checks = lambda: [t for t in asyncio.all_tasks() if "Prober._run" in repr(t)]  # noqa: E731
    assert len(checks()) == 2
    proxy.groups[0].remove(proxy.groups[0].roster.member(0).key)
    await until(lambda: len(checks()) == 1)


async def test_no_healthy_worker_is_called_that_and_not_overload(start_proxy, client, unused_tcp_port):
    url = f"http://127.0.0.1:{unused_tcp_port}"
    proxy = await start_proxy([url], health=True, limits={"pool_wait_s_max": 0.05})
    status, body = await ask(client, proxy)
    assert status == 503
    assert b"No worker was healthy within 0.05 s." in body
    assert b"verloaded" not in body
    text = await metrics(client, proxy)
    assert 'brproxy_wait_seconds_count{group="default"} 1.0' in text, "who found none has waited, too"


async def test_time_with_a_worker_that_failed_is_no_wait(start_worker, start_emulator, start_proxy, client):
    async def fail_late(writer):
        await asyncio.sleep(0.2)
        writer.transport.abort()
        return False

    failing, emulator = await start_worker(fail_late), await start_emulator(1)
    proxy = await start_proxy([failing.url, *emulator.urls], routing={"policy": "round-robin"})
    assert (await ask(client, proxy))[0] == 200
    text = await metrics(client, proxy)
    assert 'brproxy_wait_seconds_count{group="default"} 2.0' in text, "each stay in the pool"
    assert 'brproxy_wait_seconds_bucket{group="default",le="0.1"} 2.0' in text
    key = proxy.groups[0].roster.member(0).key
    assert f'brproxy_retries_total{{group="default",worker="{key}"}} 1.0' in text


async def test_every_request_has_the_lines_of_its_member(start_worker, start_proxy, client, answer, fixed):
    workers = [await start_worker(answer(fixed(b"{}"))) for _ in range(2)]
    proxy = await start_proxy([workers[0].url], health=False)
    group = proxy.groups[0]
    group.drain(group.roster.member(0).key)
    group.add("second", WorkerLimits(8), workers[1].url, b"X-Rank: 3\r\n")
    assert (await ask(client, proxy))[0] == 200
    ((_, fields, _),) = workers[1].requests
    assert fields["x-rank"] == "3"
    await proxy.idle()
