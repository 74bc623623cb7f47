"""What holds for each transfer, end to end: two workers do one request, and nothing stays behind."""

import asyncio
import json

import pytest

from brproxy.happenings import Observer
from tests.brproxy.proxy.legs.conftest import TRANSFERS, WORDS

pytestmark = pytest.mark.parametrize("transfer", TRANSFERS)
ANSWER = " 1 2 3 4 5 6"


async def settled_pair(pair, until):
    """Wait until nothing is booked and nothing is held; fails by timeout."""
    await pair.proxy.idle()
    await until(lambda: not pair.held)
    assert len(pair.proxy.running.service.metaserver) == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_one_prefills_and_another_decodes(transfer, stream, start_pair, until):
    pair = await start_pair(transfer)
    texts = await asyncio.gather(*(pair.text(stream=stream) for _ in range(12)))
    assert set(texts) == {ANSWER}
    assert sum(pair.prefill.deployment.prompt_tokens_total) == 12 * len(WORDS.split())
    assert all(pair.prefill.deployment.prompt_tokens_total), "both prefill workers had some"
    assert sum(pair.decode.deployment.output_tokens_total) >= 12 * 5
    assert pair.counts["split"] == 12
    assert not pair.counts["stranded"] + pair.counts["again"] + pair.counts["expired"]
    await settled_pair(pair, until)


async def test_usage_is_what_one_engine_would_say(transfer, start_pair):
    pair = await start_pair(transfer)
    _, body = await pair.ask()
    assert json.loads(body)["usage"] == {"prompt_tokens": 5, "total_tokens": 11, "completion_tokens": 6}
    _, body = await pair.ask(stream=True)
    assert b'"usage"' not in body, "what only the proxy asked for is taken out"
    _, body = await pair.ask(stream=True, stream_options={"include_usage": True})
    assert b'"prompt_tokens":5' in body


async def test_an_error_of_the_engine_is_the_client_s_as_it_is(transfer, start_pair, client, until):
    pair = await start_pair(transfer)
    wrong = {"model": "emulated", "prompt": 5, "max_tokens": 6}
    status, body = await pair.ask(**wrong)
    assert status == 400
    assert b"prompt must be a string or a list of token ids" in body
    await settled_pair(pair, until)


async def test_a_prompt_that_is_counted_is_so_for_both_legs(transfer, start_pair, until):
    """The estimate is not what the emulated engines count; whoever books the prompt has the count."""
    counted = {"exact": "engine", "timeout_s": 600, "wait_s": 60}
    pair = await start_pair(transfer, prompts=counted, estimate={"ask_usage": False})
    seen = {"prefill": set(), "decode": set()}

    class Looks(Observer):
        def __init__(self, side):
            self._side = side

        def bound(self, entry, waited_s):
            seen[self._side].add(entry.prompt_tokens)

    for group in pair.proxy.groups:
        group.dispatcher.happenings.tell(Looks("prefill" if group.prefills else "decode"))
    words = "x " * 300
    texts = await asyncio.gather(*(pair.text(stream=True, prompt=words) for _ in range(6)))
    assert set(texts) == {ANSWER}
    assert seen == {"prefill": {300}, "decode": {300}}
    assert pair.proxy.running.service.counting.stats.prompts["answered"] == 6
    assert len(pair.proxy.running.service.counting.counts) == 0
    await settled_pair(pair, until)


async def test_a_client_that_leaves_leaves_nothing(transfer, start_pair, client, until):
    """Some are in prefill then, some wait, some stream."""
    pair = await start_pair(transfer, decodes=1, prefill_settings={"lease_s": 100_000.0})
    asking = [
        asyncio.create_task(pair.ask(stream=i % 2 == 0, max_tokens=200, prompt=WORDS * (1 + i)))
        for i in range(24)
    ]
    for i, task in enumerate(asking):
        await asyncio.sleep(0.004 * (i % 5))
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await settled_pair(pair, until)
    assert not pair.prefill.holdings.counts.expired_requests, (
        "it was freed, and not only when its lease ended"
    )
    assert await pair.text() == ANSWER


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_that_is_gone_is_not_missed(
    transfer, role, start_pair, until, unused_tcp_port_factory
):
    gone = {"url": f"http://127.0.0.1:{unused_tcp_port_factory()}", "role": role}
    pair = await start_pair(transfer, prefills=1, decodes=1, more=[gone])
    assert {await pair.text() for _ in range(6)} == {ANSWER}
    assert pair.counts["split"] == 6
    await settled_pair(pair, until)


async def test_an_unknown_model_is_the_proxy_s_or_the_engine_s(transfer, start_pair, until):
    pair = await start_pair(transfer)
    status, body = await pair.ask(model="nobody")
    assert status == 404
    assert b"nobody" in body
    await settled_pair(pair, until)


async def test_what_cannot_be_split_is_served_where_it_can(transfer, start_pair, until):
    """One that decodes can prefill, but for SGLang's; and a client's own handles name other people's KV."""
    pair = await start_pair(transfer)
    own = {"do_remote_prefill": True, "remote_block_ids": [1], "remote_engine_id": "x"}
    status, body = await pair.ask(echo=True, logprobs=1, kv_transfer_params=own)
    if transfer == "sglang":
        assert (status, pair.counts["alone"]) == (200, 0), "it hands prompts' probabilities over"
    else:
        assert status == 200, body
        assert (pair.counts["alone"], pair.counts["split"]) == (1, 0)
        assert not sum(pair.prefill.deployment.prompt_tokens_total)
    await settled_pair(pair, until)
