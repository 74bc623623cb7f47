"""Prefill and decode apart, both legs sent at once (mooncake and sglang), driven by hand."""

import asyncio

import pytest

from loadgen.emulator.handover_wire import FREE_PATH
from loadgen.emulator.wire import RANK_HEADER


def rooms(legs, room, **more):
    """Return what both legs of sglang have in their bodies."""
    host, port = legs.prefill.bootstrap_urls[0].removeprefix("http://").split(":")
    return {"bootstrap_host": host, "bootstrap_port": int(port), "bootstrap_room": room} | more


async def mooncake_params(legs, transfer_id, rank="0"):
    """Return the handles of both legs of mooncake."""
    bootstrap = legs.prefill.bootstrap_urls[0]
    async with legs.client.get(bootstrap + "/query") as response:
        engine = (await response.json())[rank]
    assert engine["worker_addr"] == {"0": {"0": legs.prefill.urls[0]}}
    decode = {"do_remote_decode": False, "do_remote_prefill": True, "remote_bootstrap_addr": bootstrap}
    decode |= {"remote_engine_id": engine["engine_id"], "transfer_id": transfer_id}
    prefill = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}
    return {"kv_transfer_params": prefill, "max_tokens": 1}, {"kv_transfer_params": decode, "max_tokens": 4}


@pytest.mark.parametrize("first", ["prefill", "decode"])
@pytest.mark.parametrize("transfer", ["mooncake", "sglang"])
async def test_both_legs_meet_whichever_comes_first(transfer, first, start_legs, until):
    legs = await start_legs(transfer, prefill_workers=2, prefill={"ranks_per_url": 2})
    if transfer == "mooncake":
        prefill, decode = await mooncake_params(legs, "xfer-1", rank="1")
    else:
        # The same to both: a prefill worker of SGLang makes one token, whatever it is asked for.
        prefill = decode = rooms(legs, 7) | {"max_tokens": 4}
    headers = {RANK_HEADER: "1"}
    send = {
        "prefill": lambda: legs.ask(legs.prefill.urls[0], headers=headers, **prefill),
        "decode": lambda: legs.ask(legs.decode.urls[0], **decode),
    }
    one = asyncio.create_task(send.pop(first)())
    if first == "decode":
        await until(lambda: legs.decode.deployment.cluster.loading)
    elif transfer == "mooncake":
        assert (await one)[0] == 200, "a prefill waits for nobody"
    (other,) = send.values()
    answers = dict(zip(("one", "other"), await asyncio.gather(one, other()), strict=True))
    decoded = answers["one" if first == "decode" else "other"]
    assert [status for status, _ in answers.values()] == [200, 200]
    assert decoded[1]["choices"][0]["text"] == " 1 2 3 4"
    assert legs.prefill.deployment.prefill_tokens_total == [0, 20]
    assert legs.prefill.deployment.output_tokens_total == [0, 1]
    assert sum(legs.decode.deployment.prefill_tokens_total) == 0
    assert await legs.held() == (0, 0)
    assert (await legs.handover())["fetched_requests"] == 1


async def test_a_mooncake_decode_whose_prefill_never_comes(start_legs):
    legs = await start_legs("mooncake", lease_s=5.0)
    _, decode = await mooncake_params(legs, "xfer-1")
    status, error = await legs.error(legs.decode.urls[0], **decode)
    assert (status, error["code"]) == (500, 500)
    assert legs.decode.deployment.cluster.kv_used_tokens.sum() == 0


async def test_a_mooncake_prefill_whose_decode_never_comes(start_legs, until):
    legs = await start_legs("mooncake", lease_s=5.0)
    prefill, _ = await mooncake_params(legs, "xfer-1")
    assert (await legs.ask(legs.prefill.urls[0], **prefill))[1]["kv_transfer_params"] is None
    await until(lambda: legs.prefill.deployment.cluster.kv_used_tokens.sum() == 0)
    assert (await legs.handover())["expired_requests"] == 1


async def test_a_mooncake_decode_that_left_before_the_prefill_is_done(start_legs, until):
    legs = await start_legs("mooncake", transfer_ms_per_ktoken=1e9)
    prefill, decode = await mooncake_params(legs, "xfer-1")
    asked = asyncio.create_task(legs.ask(legs.decode.urls[0], **decode))
    await until(lambda: legs.decode.deployment.cluster.loading)
    asked.cancel()
    await until(lambda: not legs.decode.deployment.cluster.loading)
    # Whether what is to be freed is said before the prefill's end or after, nothing stays.
    assert (await legs.ask(legs.prefill.urls[0], **prefill))[0] == 200
    await until(lambda: legs.prefill.deployment.cluster.kv_used_tokens.sum() == 0)
    assert (await legs.handover())["freed_requests"] == 1


async def test_what_is_freed_before_its_prefill_is_done_is_not_held(start_legs):
    legs = await start_legs("mooncake")
    prefill, decode = await mooncake_params(legs, "xfer-1")
    named = {"engine": decode["kv_transfer_params"]["remote_engine_id"], "request_id": "xfer-1"}
    async with legs.client.post(legs.prefill.urls[0] + FREE_PATH, json=named) as response:
        assert response.status == 200
    assert (await legs.ask(legs.prefill.urls[0], **prefill))[0] == 200
    handover = await legs.handover()
    assert (handover["held_requests"], handover["freed_requests"]) == (0, 1)
    async with legs.client.post(legs.prefill.urls[0] + FREE_PATH, data=b"{") as response:
        assert response.status == 400


@pytest.mark.parametrize("transfer_id", [None, 5, "x" * 2000])
async def test_a_mooncake_prefill_without_an_id(transfer_id, start_legs):
    legs = await start_legs("mooncake")
    params = {"do_remote_decode": True, "transfer_id": transfer_id}
    status, error = await legs.error(legs.prefill.urls[0], kv_transfer_params=params, max_tokens=1)
    assert (status, "transfer_id must be a text" in error["message"]) == (400, True)


async def test_an_engine_that_the_bootstrap_server_does_not_know(start_legs):
    legs = await start_legs("mooncake")
    _, decode = await mooncake_params(legs, "xfer-1")
    decode["kv_transfer_params"]["remote_engine_id"] = "other"
    status, error = await legs.error(legs.decode.urls[0], **decode)
    assert (status, "knows no engine 'other'" in error["message"]) == (500, True)


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_sglang_needs_a_room(side, start_legs):
    legs = await start_legs("sglang")
    emulator = getattr(legs, side)
    status, error = await legs.error(emulator.urls[0], bootstrap_host="127.0.0.1")
    assert (status, "without bootstrap room id" in error["message"]) == (400, True)
    async with legs.client.get(emulator.urls[0] + "/server_info") as response:
        assert (await response.json())["disaggregation_mode"] == side


@pytest.mark.parametrize("named", [False, True])
async def test_a_prefill_on_another_rank_than_the_room_s(named, start_legs):
    lease_s = 100_000.0 if named else 3.0
    legs = await start_legs("sglang", prefill_workers=2, prefill={"ranks_per_url": 2}, lease_s=lease_s)
    more = {"disagg_prefill_dp_rank": 1} if named else {}
    body = rooms(legs, 4, **more)
    headers = {RANK_HEADER: "1"}
    asked = (
        legs.ask(legs.prefill.urls[0], headers=headers, **body, max_tokens=1),
        legs.ask(legs.decode.urls[0], **body, max_tokens=4),
    )
    (prefilled, reply), (decoded, _) = await asyncio.gather(*asked)
    if named:
        assert (prefilled, decoded) == (200, 200)
        return
    assert (prefilled, decoded) == (500, 500), "the decode waits until its time is over"
    assert "follow_bootstrap_room conflict: dispatched to dp_rank 1" in reply["error"]["message"]


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_an_sglang_leg_whose_peer_never_comes(side, start_legs):
    legs = await start_legs("sglang", lease_s=3.0)
    for stream in (False, True):
        _, error = await legs.error(getattr(legs, side).urls[0], stream=stream, **rooms(legs, 7))
        assert error["code"] == 500
    cluster = getattr(legs, side).deployment.cluster
    assert (cluster.kv_used_tokens.sum(), sum(cluster.queued)) == (0, 0)
    assert (await legs.handover(getattr(legs, side)))["failed_requests"] == 2


async def test_an_sglang_decode_that_leaves_ends_the_prefill(start_legs, until):
    legs = await start_legs("sglang", transfer_ms_per_ktoken=1e9)
    body = rooms(legs, 7)
    prefill = asyncio.create_task(legs.error(legs.prefill.urls[0], **body, max_tokens=1))
    decode = asyncio.create_task(legs.ask(legs.decode.urls[0], **body))
    await until(lambda: legs.prefill.deployment.cluster.kv_used_tokens.sum() == 20)
    await until(lambda: legs.prefill.deployment.cluster.running.sum() == 0)
    decode.cancel()
    status, error = await prefill
    assert (status, error["code"]) == (500, 500)
    assert legs.prefill.deployment.cluster.kv_used_tokens.sum() == 0


async def test_sglang_takes_ranks_from_bodies_and_the_room(start_legs):
    legs = await start_legs(
        "sglang", prefill_workers=4, prefill={"ranks_per_url": 4}, decode={"ranks_per_url": 2}
    )
    for room, decode_rank in ((1, 0), (2, 1), (7, 1)):
        body = rooms(legs, room)
        await asyncio.gather(
            legs.ask(legs.prefill.urls[0], **body, max_tokens=1),
            legs.ask(legs.decode.urls[0], **body, max_tokens=2, routed_dp_rank=decode_rank),
        )
    assert legs.prefill.deployment.prompt_tokens_total == [0, 20, 20, 20]
    assert legs.decode.deployment.fetched_tokens_total == [20, 40]
    for wrong in (2, -1, "x"):
        status, _ = await legs.error(legs.decode.urls[0], **rooms(legs, 1, routed_dp_rank=wrong))
        assert status == 400
