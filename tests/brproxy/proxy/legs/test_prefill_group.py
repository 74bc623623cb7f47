"""Prefill workers that share a barrier: prompts wait for their step to end, and share the next one."""

import asyncio
import json

import pytest

from brproxy.build import build_service
from brproxy.config import parse_config

HANDLES = {"do_remote_prefill": True, "remote_block_ids": [1], "remote_engine_id": "e"}


class Step:
    """The answers of workers that step together: none before ``ends``."""

    def __init__(self, fixed):
        self.ends = asyncio.Event()
        self._answer = fixed(
            json.dumps({"choices": [{"index": 0, "text": " x"}], "kv_transfer_params": HANDLES}).encode()
        )

    async def __call__(self, writer):
        await self.ends.wait()
        writer.write(self._answer)
        return True


@pytest.mark.parametrize("shares_barrier", [True, False])
async def test_prompts_wait_for_the_step_and_then_share_the_next_one(
    shares_barrier, start_worker, start_proxy, client, until, fixed
):
    step = Step(fixed)
    prefills = [await start_worker(step) for _ in range(2)]
    decode = await start_worker(Step(fixed))
    decode.script.ends.set()
    workers = [{"url": worker.url, "role": "prefill", "slots": 8} for worker in prefills]
    workers.append({"url": decode.url, "role": "decode", "slots": 8})
    proxy = await start_proxy([], workers=workers, prefill_decode={"shares_barrier": shares_barrier})
    (group,) = [group for group in proxy.groups if group.prefills]

    async def ask(tokens):
        document = {"model": "m", "prompt": list(range(tokens)), "max_tokens": 6}
        async with client.post(f"{proxy.url}/v1/completions", json=document) as response:
            return response.status

    def sent():
        return [len(json.loads(body)["prompt"]) for worker in prefills for _, _, body in worker.requests]

    asking = [asyncio.create_task(ask(100))]
    await until(lambda: sent() == [100])
    asking += [asyncio.create_task(ask(tokens)) for tokens in (30, 20, 20, 10)]
    if not shares_barrier:
        await until(lambda: len(sent()) == 5)
        assert max(map(len, (worker.requests for worker in prefills))) == 4, "beside the long one"
    else:
        await until(lambda: len(group.dispatcher.waiting) == 4)
        assert sent() == [100]
        before = [len(worker.requests) for worker in prefills]
    step.ends.set()
    assert [await task for task in asking] == [200] * 5
    if shares_barrier:
        sums = [
            sum(len(json.loads(body)["prompt"]) for _, _, body in worker.requests[count:])
            for worker, count in zip(prefills, before, strict=True)
        ]
        assert sums == [40, 40]
    await proxy.idle()
    assert group.dispatcher.ledger.prefill_tokens == (0, 0)


async def test_what_is_said_of_prefill_is_of_those_that_prefill():
    costs = {"step_base_ms": 30, "step_ns_per_kv_token": 100, "prefill_us_per_token": 50}
    workers = [
        {"url": f"http://h:{port}", "role": role} for port, role in enumerate(("prefill", "decode"), 1)
    ]
    service = build_service(parse_config({"worker": workers, "costs": costs}, "test"))
    known = {each.group.prefills: each.group.steps.costs() for each in service.groups.each()}
    assert known[True].s_per_prefill_token == pytest.approx(50e-6)
    assert known[False] is None, "it may prefill what is not split, and that is learnt"
    service.watch.close()
    for each in service.groups.each():
        each.driver.close()
