"""DP ranks behind one URL, end to end: both get load, and only the proxy says which."""

import asyncio

import pytest

DOCUMENT = {"model": "emulated", "prompt": "one two three", "max_tokens": 40}


async def ask(client, proxy, headers=None, path="/v1/completions", **more):
    async with client.post(proxy.url + path, json=DOCUMENT | more, headers=headers) as response:
        return response.status, await response.read()


def counted(scope, emulator):
    return emulator.deployment.prompt_tokens_total[scope]


@pytest.mark.parametrize("mode", ["local", "global"])
async def test_ranks_are_loaded_evenly_and_none_is_asked_twice(mode, start_emulator, start_proxy, client):
    emulator = await start_emulator(4, ranks_per_url=2, ranks_are_global=mode == "global")
    workers = [
        {"url": url, "ranks": ranks, "rank_mode": mode} | ({"rank_base": base} if mode == "local" else {})
        for url, ranks, base in zip(emulator.urls, ("0-1", "2-3"), (0, 2), strict=True)
    ]
    proxy = await start_proxy([], workers=workers, routing={"policy": "br-0"}, health=True)
    keys = [member.key for member in proxy.groups[0].roster.members]
    assert [key.rpartition("/")[2] for key in keys] == ["0", "1", "2", "3"]
    assert [member.rank for member in proxy.groups[0].roster.members] == [0, 1, 2, 3]
    answers = await asyncio.gather(*(ask(client, proxy, stream=i % 2 == 0) for i in range(32)))
    assert {status for status, _ in answers} == {200}
    assert emulator.deployment.prompt_tokens_total == [24] * 4, "eight requests of three tokens each"
    service = proxy.running.service.groups["default"]
    assert [endpoint.origin for endpoint in service.endpoints] == list(emulator.urls)
    async with client.get(proxy.url + "/metrics") as response:
        text = await response.text()
    assert all(f'worker="{key}"' in text for key in keys)
    await proxy.idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_cannot_say_which_rank(stream, start_worker, start_proxy, client, fixed):
    async def script(writer):
        writer.write(fixed(b"{}"))
        return True

    servers = [await start_worker(script) for _ in range(2)]
    workers = [
        {"url": servers[0].url, "ranks": "4-5", "rank_base": 4, "model": "emulated"},
        {"url": servers[1].url, "group": "other", "model": "other"},
    ]
    proxy = await start_proxy([], workers=workers, routing={"policy": "round-robin"})
    said = {
        "X-DATA-parallel-Rank": "7",
        "x-override-routed-dp-rank": "7",
        "X-Override-Disagg-Prefill-Dp-Rank": "7",
    }
    for model in ("emulated", "emulated", "other"):
        # In the body it is the client's, which a server that is told in a field does not look at.
        await ask(client, proxy, said, model=model, stream=stream, routed_dp_rank=7)
    await ask(client, proxy, said, path="/any/other", model="emulated")
    ranks = [headers.pop("x-data-parallel-rank") for _, headers, _ in servers[0].requests]
    assert len(ranks) == 3
    assert set(ranks) == {"0", "1"}
    ((_, alone, body),) = servers[1].requests
    everything = [*(headers for _, headers, _ in servers[0].requests), alone]
    assert not any("rank" in name for headers in everything for name in headers)
    assert b'"routed_dp_rank": 7' in body


async def test_a_server_that_refuses_is_out_with_all_its_ranks(
    start_emulator, start_proxy, client, unused_tcp_port
):
    emulator = await start_emulator(2, ranks_per_url=2)
    workers = [
        {"url": f"http://127.0.0.1:{unused_tcp_port}", "ranks": "0-3"},
        {"url": emulator.urls[0], "ranks": "4-5", "rank_base": 4},
    ]
    proxy = await start_proxy(
        [],
        workers=workers,
        health=True,
        health_table={"interval_s": 600, "unhealthy_after": 1},
        routing={"policy": "round-robin"},
    )
    roster = proxy.groups[0].roster
    for member in roster.members[:4]:
        # As if it had been there when it was asked.
        roster.record(member, ok=True, reason="", now_s=0.0)
    assert (await ask(client, proxy))[0] == 200
    assert [member.is_routable for member in roster.members] == [False] * 4 + [True] * 2
    assert all(member.refuses_since_s is not None for member in roster.members[:4])
    await proxy.idle()


async def test_a_retry_goes_to_another_server_and_not_to_another_rank_of_one_that_is_gone(
    start_emulator, start_proxy, client, unused_tcp_port
):
    emulator = await start_emulator(1)
    workers = [{"url": f"http://127.0.0.1:{unused_tcp_port}", "ranks": "0-7"}, {"url": emulator.urls[0]}]
    limits = {"retries_max": 1}
    proxy = await start_proxy([], workers=workers, limits=limits, routing={"policy": "round-robin"})
    for _ in range(9):
        assert (await ask(client, proxy))[0] == 200
    await proxy.idle()
    alone = await start_proxy([], workers=workers[:1], limits=limits)
    status, body = await ask(client, alone)
    assert (status, body.count(b"Connection refused")) == (502, 1), "there is nobody else"


async def test_models_are_asked_for_once_for_all_ranks_behind_a_url(start_worker, start_proxy, client, fixed):
    async def script(writer):
        writer.write(fixed(b'{"object":"list","data":[{"id":"m"}]}'))
        return True

    server = await start_worker(script)
    proxy = await start_proxy([], workers=[{"url": server.url, "ranks": "0-7"}])
    async with client.get(proxy.url + "/v1/models") as response:
        assert [entry["id"] for entry in (await response.json())["data"]] == ["m"]
    ((line, headers, _),) = server.requests
    assert line == "GET /v1/models HTTP/1.1"
    assert "x-data-parallel-rank" not in headers
