"""Two DP ranks behind one URL are two workers: a request runs where it is booked, and shares are equal.

``pytest tests/real_engines --real-ranks http://127.0.0.1:8101``, of a vLLM with ``--data-parallel-size 2``.
"""

import asyncio
import random

import pytest

from brproxy.engines.exposition import samples
from tests.real_engines.asking import CHAT, answer, chat
from tests.real_engines.texts import text_of

RUNNING, DONE = "vllm:num_requests_running", "vllm:request_success_total"
REQUESTS, AT_ONCE = 60, 8


@pytest.fixture
async def engine(open_engine):
    return await open_engine("--real-ranks")


@pytest.fixture
async def proxy(engine, start_proxy):
    return await start_proxy({"url": engine.url, "slots": 8, "ranks": "0-1"})


async def by_rank(engine, name):
    """Return a sum of samples for each rank; one that has done nothing may have none."""
    found = {"0": 0.0, "1": 0.0}
    for sample in samples(await engine.page("/metrics"), [name]):
        found[sample.labels["engine"]] += sample.value
    return [found["0"], found["1"]]


async def test_both_ranks_have_as_much_to_do(engine, proxy, session):
    draw, places = random.Random(4), asyncio.Semaphore(AT_ONCE)
    before = await by_rank(engine, DONE)
    looks = []

    async def one():
        body = chat(engine, text_of("english", draw), draw.randrange(20, 60), stream=True, ignore_eos=True)
        async with places:
            status, _, own = await answer(session, proxy.url, CHAT, body)
        assert status == 200, own

    async def watch():
        while True:
            await asyncio.sleep(0.3)
            booked = list(proxy.ledger().requests)
            looks.append((booked, await by_rank(engine, RUNNING)))

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(one() for _ in range(REQUESTS)))
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    done = [now - then for now, then in zip(await by_rank(engine, DONE), before, strict=True)]
    busy = [look for look in looks if sum(look[0]) == AT_ONCE]
    booked, running = (
        [sum(ranks) / len(busy) for ranks in zip(*part, strict=True)] for part in zip(*busy, strict=True)
    )
    print(f"done {done}; on average booked {booked}, running {running}, {len(busy)} looks")
    assert sum(done) == REQUESTS
    assert min(done) >= 0.4 * REQUESTS
    assert max(running) - min(running) <= 0.25 * AT_ONCE
    assert proxy.booked() == 0
