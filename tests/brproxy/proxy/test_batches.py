"""Closed batches over real sockets: those that take long go first, and workers are not told."""

import asyncio
import json

import pytest

from brproxy.config import parse_config
from brproxy.types import BrproxyError

BATCH = {"X-Batch-ID": "epoch-1"}


class Engine:
    """Answers with the tokens that a prompt is said to take; one that is held waits until it is let go."""

    def __init__(self):
        self.tokens = {}
        self.order = []
        self.held = asyncio.Event()

    def script(self, worker, fixed):
        async def script(writer):
            prompt = json.loads(worker[0].requests[-1][2])["prompt"]
            self.order.append(prompt)
            if prompt == "hold":
                await self.held.wait()
            usage = {"prompt_tokens": 5, "completion_tokens": self.tokens.get(prompt, 1)}
            writer.write(fixed(json.dumps({"usage": usage}).encode()))
            return True

        return script


@pytest.fixture
async def one_slot(start_worker, start_proxy, fixed):
    """Return a function that starts an engine with one slot, and its proxy."""

    async def start(**tables):
        engine, workers = Engine(), []
        workers.append(await start_worker(engine.script(workers, fixed)))
        return engine, await start_proxy([workers[0].url], worker={"slots": 1}, **tables), workers[0]

    return start


async def asks(client, proxy, prompt, headers=BATCH):
    document = {"model": "m", "prompt": prompt}
    async with client.post(proxy.url + "/v1/completions", json=document, headers=headers) as response:
        return response.status, await response.text()


async def in_line(client, proxy, engine, asked):
    """Have requests wait behind one that takes the only slot, in this order; return in which they went."""
    dispatcher = proxy.groups[0].dispatcher
    tasks = [asyncio.create_task(asks(client, proxy, "hold", {}))]
    while "hold" not in engine.order:
        await asyncio.sleep(0.001)
    for count, (prompt, headers) in enumerate(asked, 1):
        tasks.append(asyncio.create_task(asks(client, proxy, prompt, headers)))
        while dispatcher.waiting.count < count:
            await asyncio.sleep(0.001)
    engine.order.clear()
    engine.held.set()
    assert [status for status, _ in await asyncio.gather(*tasks)] == [200] * len(tasks)
    return engine.order


@pytest.mark.parametrize("predictor", ["survival", "exact-match"])
async def test_those_whose_siblings_took_long_go_first(predictor, one_slot, client):
    engine, proxy, worker = await one_slot(prediction={"predictor": predictor})
    engine.tokens = {"long": 500, "tiny": 3, "some": 100}
    for prompt in ("tiny", "some", "long"):
        await asks(client, proxy, prompt)
    asked = [("tiny", BATCH), ("some", BATCH), ("else", {}), ("tiny", BATCH), ("long", BATCH)]
    assert await in_line(client, proxy, engine, asked) == ["long", "some", "else", "tiny", "tiny"]
    assert all("x-batch-id" not in headers for _, headers, _ in worker.requests)


async def test_the_field_s_name_is_configured(one_slot, client):
    engine, proxy, worker = await one_slot(batches={"header": "X-Rollout"})
    engine.tokens = {"long": 500, "tiny": 3}
    named = {"x-rollout": "r"}
    for prompt in ("tiny", "long"):
        await asks(client, proxy, prompt, named)
    order = await in_line(client, proxy, engine, [("tiny", named), ("long", named)])
    assert order == ["long", "tiny"]
    # A field that means nothing here passes as any other does.
    await asks(client, proxy, "x", BATCH)
    assert worker.requests[-1][1]["x-batch-id"] == "epoch-1"


async def test_without_a_field_all_go_as_they_come(one_slot, client):
    engine, proxy, _ = await one_slot(batches={"header": ""})
    engine.tokens = {"long": 500, "tiny": 3}
    for prompt in ("tiny", "long"):
        await asks(client, proxy, prompt)
    order = await in_line(client, proxy, engine, [("tiny", BATCH), ("long", BATCH)])
    assert order == ["tiny", "long"]


@pytest.mark.parametrize("name", ["", "a b", "x" * 9, "caf\u00e9"])
async def test_a_name_that_is_none_is_refused_in_one_line(name, one_slot, client):
    engine, proxy, _ = await one_slot(batches={"id_bytes_max": 8})
    status, text = await asks(client, proxy, "x", {"X-Batch-ID": name})
    assert status == 400
    assert "X-Batch-ID must name a batch by 1 to 8 visible ASCII characters, got" in text
    assert not engine.order
    status, _ = await asks(client, proxy, "x", {"X-Batch-ID": "x" * 8})
    assert status == 200


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("X-Request-Id", "means something else already"),
        ("Authorization", "means something else already"),
        ("Content-Length", "means something else already"),
        ("X-Data-Parallel-Rank", "means something else already"),
        ("a b", "must be the name of a header field"),
    ],
)
def test_a_field_that_has_a_meaning_names_no_batch(header, says):
    with pytest.raises(BrproxyError, match=f"batches.header: .*{says}"):
        parse_config({"worker": [{"url": "http://w:1"}], "batches": {"header": header}}, "test")
