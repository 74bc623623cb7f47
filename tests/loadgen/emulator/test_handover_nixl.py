"""Prefill and decode apart, one leg after the other (nixl and ascend), both driven by hand."""

import asyncio

import pytest

from loadgen.emulator.wire import LENGTH_HEADER, RANK_HEADER

PREFILL = {"kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}, "max_tokens": 1}


async def prefilled(legs, **more):
    """Run a prefill and return its handles."""
    status, reply = await legs.ask(legs.prefill.urls[0], **PREFILL, **more)
    assert status == 200
    assert reply["usage"]["completion_tokens"] == 1
    return reply["kv_transfer_params"]


async def test_kv_is_held_until_it_is_fetched(start_legs):
    legs = await start_legs("nixl", kv_capacity_tokens=100, transfer_ms_per_ktoken=1000.0)
    handles = await prefilled(legs)
    assert (handles["do_remote_prefill"], handles["do_remote_decode"]) == (True, False)
    assert (handles["remote_num_tokens"], handles["remote_block_ids"]) == (20, [[1, 2]])
    assert f"http://{handles['remote_host']}:{handles['remote_port']}" == legs.prefill.urls[0]
    assert await legs.held() == (1, 20)
    assert await legs.metric(legs.prefill.urls[0], "vllm:kv_cache_usage_perc") == [0.2]
    start_s = legs.decode.deployment.now_s()
    status, reply = await legs.ask(legs.decode.urls[0], kv_transfer_params=handles, max_tokens=5)
    assert (status, reply["choices"][0]["text"]) == (200, " 1 2 3 4 5")
    assert legs.decode.deployment.now_s() - start_s >= 0.02 + 5 * 0.03, "a transfer and five steps"
    assert await legs.held() == (0, 0)
    handover = await legs.handover()
    assert (handover["fetched_requests"], handover["fetched_tokens"]) == (1, 20)
    assert await legs.metric(legs.prefill.urls[0], "vllm:kv_cache_usage_perc") == [0.0]
    # Nothing was prefilled by the decode worker.
    assert legs.decode.deployment.prefill_tokens_total == [0, 0]
    assert await legs.metric(legs.decode.urls[0], "vllm:external_prefix_cache_hits_total") == [20.0]


async def test_what_is_no_leg_is_served_as_usual(start_legs):
    legs = await start_legs("nixl")
    for url in (*legs.prefill.urls, *legs.decode.urls):
        status, reply = await legs.ask(url, max_tokens=2)
        assert (status, reply["choices"][0]["text"]) == (200, " 1 2")
        assert "kv_transfer_params" not in reply
    assert legs.decode.deployment.prefill_tokens_total == [20, 20]
    assert await legs.held() == (0, 0)


async def test_workers_with_both_roles_hand_over_to_each_other(start_legs):
    legs = await start_legs("nixl", prefill={"role": "both"}, decode={"role": "both"})
    for one, other in ((legs.prefill, legs.decode), (legs.decode, legs.prefill)):
        _, reply = await legs.ask(one.urls[0], **PREFILL)
        handles = reply["kv_transfer_params"]
        assert (await legs.ask(other.urls[0], kv_transfer_params=handles, max_tokens=2))[0] == 200
        assert sum(other.deployment.fetched_tokens_total) == 20
        assert one.holdings.counts.fetched_requests == 1


async def test_a_stream_whose_length_the_client_knows(start_legs):
    legs = await start_legs("nixl")
    headers = {LENGTH_HEADER: "4", "X-Request-Id": "r"}
    _, reply = await legs.ask(legs.prefill.urls[0], headers=headers, chat=True, **PREFILL)
    documents = await legs.stream(
        legs.decode.urls[0], headers=headers, chat=True, kv_transfer_params=reply["kv_transfer_params"]
    )
    assert "".join(d["choices"][0]["delta"]["content"] for d in documents) == " 1 2 3 4"
    assert reply["kv_transfer_params"]["remote_request_id"].startswith("chatcmpl-r-")


async def test_a_lease_that_ends(start_legs, until):
    legs = await start_legs("nixl", lease_s=2.0)
    handles = await prefilled(legs)
    await until(lambda: legs.prefill.deployment.cluster.kv_used_tokens.sum() == 0)
    assert (await legs.handover())["expired_requests"] == 1
    for stream in (False, True):
        status, error = await legs.error(legs.decode.urls[0], stream=stream, kv_transfer_params=handles)
        assert (status, error["code"], error["type"]) == (
            200 if stream else 500,
            500,
            "InternalServerError",
        )
    assert (await legs.handover(legs.decode))["failed_requests"] == 2
    assert legs.decode.deployment.cluster.kv_used_tokens.sum() == 0


@pytest.mark.parametrize(
    "change", [{"remote_request_id": "other"}, {"remote_engine_id": "other"}, {"remote_port": 70000},
               {"remote_port": 1}, {"remote_host": None}]
)  # fmt: skip
async def test_handles_that_lead_nowhere(change, start_legs):
    legs = await start_legs("nixl")
    handles = await prefilled(legs) | change
    status, error = await legs.error(legs.decode.urls[0], kv_transfer_params=handles)
    assert (status, error["code"]) == (500, 500)


async def test_a_client_that_leaves_in_the_transfer_frees_kv(start_legs, until):
    legs = await start_legs("nixl", transfer_ms_per_ktoken=1e9)
    handles = await prefilled(legs)
    asked = asyncio.create_task(legs.ask(legs.decode.urls[0], kv_transfer_params=handles))
    decode = legs.decode.deployment.cluster
    await until(lambda: decode.loading)
    # A transfer may take longer than what is left of the lease.
    await until(lambda: legs.prefill.holdings.next_expiry_s > 110_000)
    asked.cancel()
    await until(lambda: legs.prefill.deployment.cluster.kv_used_tokens.sum() == 0)
    await until(lambda: not decode.loading and decode.kv_used_tokens.sum() == 0)
    assert (await legs.handover())["freed_requests"] == 1


async def test_a_decode_that_waits_keeps_its_lease_and_frees_it_when_its_client_leaves(
    start_legs, until, monkeypatch
):
    legs = await start_legs("nixl", slots=1, decode={"lease_s": 30.0})
    handles = await prefilled(legs)
    renewed = []
    renew = legs.prefill.holdings.renew
    monkeypatch.setattr(
        legs.prefill.holdings, "renew", lambda *lease: renewed.append(renew(*lease)) or renewed[-1]
    )
    decode, url = legs.decode.deployment.cluster, legs.decode.urls[0]
    endless = asyncio.create_task(legs.ask(url, max_tokens=10**6))
    await until(lambda: decode.running[0] == 1)
    asked = asyncio.create_task(legs.ask(url, kv_transfer_params=handles))
    await until(lambda: decode.queued[0] == 1)
    await until(lambda: len(renewed) >= 2)
    assert all(renewed)
    assert await legs.held() == (1, 20)
    asked.cancel()
    await until(lambda: legs.prefill.deployment.cluster.kv_used_tokens.sum() == 0)
    assert (await legs.handover())["freed_requests"] == 1
    endless.cancel()


@pytest.mark.parametrize(
    ("change", "headers", "status", "freed"),
    [
        ({"model": "other"}, {}, 404, True),
        ({}, {RANK_HEADER: "9"}, 400, True),
        ({"max_tokens": 200}, {}, 400, True),
        # Nobody saw handles in a body that cannot be read.
        ({"max_tokens": -1}, {}, 400, False),
    ],
)
async def test_a_decode_that_is_refused(change, headers, status, freed, start_legs, until):
    legs = await start_legs("nixl", kv_capacity_tokens=100)
    handles = await prefilled(legs)
    answered, _ = await legs.error(legs.decode.urls[0], headers=headers, kv_transfer_params=handles, **change)
    assert answered == status
    if freed:
        await until(lambda: legs.prefill.deployment.cluster.kv_used_tokens.sum() == 0)
    else:
        assert await legs.held() == (1, 20)


async def test_a_request_that_waits_gets_the_room_of_one_whose_client_left(start_legs, until):
    legs = await start_legs("nixl", slots=1, transfer_ms_per_ktoken=1e9)
    handles, url, cluster = await prefilled(legs), legs.decode.urls[0], legs.decode.deployment.cluster
    first = asyncio.create_task(legs.ask(url, kv_transfer_params=handles))
    await until(lambda: cluster.loading)
    second = asyncio.create_task(legs.ask(url, max_tokens=2))
    await until(lambda: cluster.queued[0] == 2)
    first.cancel()
    assert (await second)[0] == 200


async def test_a_prefill_whose_client_leaves_holds_nothing(start_legs, until):
    legs = await start_legs("nixl", step_base_s=3600.0)
    cluster = legs.prefill.deployment.cluster
    asked = asyncio.create_task(legs.ask(legs.prefill.urls[0], **PREFILL))
    await until(lambda: cluster.running[0] == 1)
    asked.cancel()
    await until(lambda: cluster.running[0] == 0)
    assert await legs.held() == (0, 0)


async def test_held_kv_holds_up_prefills(start_legs, until):
    legs = await start_legs("nixl", kv_capacity_tokens=30)
    handles = await prefilled(legs)
    second = asyncio.create_task(legs.ask(legs.prefill.urls[0], **PREFILL))
    await until(lambda: legs.prefill.deployment.cluster.queued[0] == 1)
    assert (await legs.ask(legs.decode.urls[0], kv_transfer_params=handles, max_tokens=2))[0] == 200
    assert (await second)[0] == 200


async def test_four_prefill_workers_and_one_deployment_of_eight_ranks(start_legs):
    legs = await start_legs("nixl", prefill_workers=4, decode_workers=8, decode={"ranks_per_url": 8})
    assert (len(legs.prefill.urls), len(legs.decode.urls)) == (4, 1)

    async def both(number):
        _, reply = await legs.ask(legs.prefill.urls[number % 4], **PREFILL)
        headers = {RANK_HEADER: str(number % 8)}
        return await legs.ask(
            legs.decode.urls[0], headers=headers, kv_transfer_params=reply["kv_transfer_params"], max_tokens=3
        )

    answers = await asyncio.gather(*(both(number) for number in range(16)))
    assert [status for status, _ in answers] == [200] * 16
    assert legs.decode.deployment.fetched_tokens_total == [40] * 8
    assert await legs.held() == (0, 0)


async def test_ascend_says_more_and_may_have_a_decode_prefilled_again(start_legs):
    legs = await start_legs("ascend", decode={"recomputed_share": 0.5})
    handles = await prefilled(legs, min_tokens=1)
    assert (handles["do_remote_prefill"], handles["remote_ptp_size"], handles["num_prompt_blocks"]) == (
        True,
        1,
        2,
    )
    reasons = []
    for _ in range(20):
        handles = await prefilled(legs, min_tokens=1)
        _, reply = await legs.ask(legs.decode.urls[0], kv_transfer_params=handles, max_tokens=8)
        (choice,) = reply["choices"]
        reasons.append((choice["finish_reason"], choice.get("stop_reason")))
        tokens = reply["usage"]["completion_tokens"]
        assert tokens == 8 if reasons[-1] == ("length", None) else 1 <= tokens < 8
    assert set(reasons) == {("length", None), ("stop", "recomputed")}
