"""A prefill worker whose KV is full gets nothing more until what it keeps has been fetched."""

import asyncio
from contextlib import suppress

from tests.brproxy.proxy.legs.conftest import Pair

PROMPT = [1, 2, 3, 4, 5]
ROOM_TOKENS = 12
"""For two prompts with a token each, and not for a third."""


async def test_prompts_that_wait_to_be_fetched_take_room_and_no_slot(
    start_side, start_proxy, client, until, unused_tcp_port
):
    prefill = await start_side("nixl", "prefill", 1)
    decode = await start_side("nixl", "decode", 1)
    common = {"transfer": "nixl", "slots": 1}
    workers = [
        common | {"url": prefill.urls[0], "role": "prefill", "kv_capacity_tokens": ROOM_TOKENS},
        common | {"url": decode.urls[0], "role": "decode"},
    ]
    proxy = await start_proxy([], workers=workers, listen={"port": unused_tcp_port})
    pair = Pair("nixl", prefill, decode, proxy, client)
    decoding, prefilling = (
        proxy.running.service.groups[name].group.dispatcher for name in ("default", "default/prefill")
    )
    endless = asyncio.create_task(pair.ask(prompt=PROMPT, max_tokens=1_000_000, stream=True))
    await until(lambda: decoding.ledger.requests == (1,) and prefilling.ledger.requests == (0,))
    asking = [asyncio.create_task(pair.ask(prompt=PROMPT)) for _ in range(5)]
    await until(lambda: decoding.waiting.count == 2 and prefilling.waiting.count == 3)

    assert pair.held == 2 * len(PROMPT), "kept by the engine"
    assert prefilling.ledger.kv_tokens == (2 * len(PROMPT),), "and booked"
    assert prefilling.ledger.state([True], late_binding=True).slots_free == [1], "none of its slots is taken"
    assert prefilling.decide(0.0, [True]) == [], "its KV has no room for a third"
    assert sum(prefill.deployment.prefill_tokens_total) == 3 * len(PROMPT)

    endless.cancel()
    with suppress(asyncio.CancelledError):
        await endless
    assert [status for status, _ in await asyncio.gather(*asking)] == [200] * 5
    assert not pair.counts["again"] + pair.counts["expired"]
    await proxy.idle()
    await until(lambda: not pair.held)
