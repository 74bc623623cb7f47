"""A real pair of vLLM servers that hand KV over by NIXL answers as one would, and nothing stays behind.

``pytest tests/real_engines --real-prefill http://127.0.0.1:8101 --real-decode http://127.0.0.1:8102``. The
first request that is handed over takes half a minute, so that one is asked ahead of all.
"""

import asyncio
import random
import time

import pytest

from tests.real_engines.asking import CHAT, COMPLETIONS, answer, chat, said
from tests.real_engines.conftest import FETCHED, PATIENCE_S
from tests.real_engines.texts import text_of

REQUESTS = 200
AT_ONCE = 6
FREED_WITHIN_S = 2.0
"""How long a prefill worker may keep what nobody will fetch; its own lease ends after 30 s (seconds)."""
LEAVERS, LATER_S = 12, 0.01


@pytest.fixture
async def prefill(open_engine):
    return await open_engine("--real-prefill")


@pytest.fixture
async def decode(open_engine):
    return await open_engine("--real-decode")


@pytest.fixture
def start_pair(prefill, decode, start_proxy, session):
    async def start(decode_slots=8, **tables):
        workers = (
            {"url": prefill.url, "role": "prefill", "slots": 8},
            {"url": decode.url, "role": "decode", "slots": decode_slots},
        )
        proxy = await start_proxy(*workers, **tables)
        status, _, body = await answer(session, proxy.url, CHAT, chat(prefill, text_of("english", random)))
        assert status == 200, body
        await freed(prefill)
        return proxy

    return start


async def freed(engine):
    """Wait until nothing is held."""
    async with asyncio.timeout(PATIENCE_S):
        while (await engine.gauges())[0]:
            await asyncio.sleep(0.02)


def question(engine, draw, number):
    """Return the path and body of one of many: chats and completions, streaming and not."""
    kind = draw.choice(["english", "code", "chinese", "tokens"])
    more = {"stream": True, "stream_options": {"include_usage": True}} if number % 2 else {}
    if kind != "tokens":
        return CHAT, chat(engine, text_of(kind, draw), draw.randrange(4, 24), **more)
    prompt = [draw.randrange(100, 300) for _ in range(draw.randrange(10, 400))]
    body = {"model": engine.model, "prompt": prompt, "max_tokens": draw.randrange(4, 24), "temperature": 0}
    return COMPLETIONS, body | more


def told(raw):
    """Return what an answer says; what of it was cached is each engine's own."""
    found = said(raw)
    found.usage.pop("prompt_tokens_details", None)
    return found


async def test_two_answer_as_one_would(prefill, decode, start_pair, session):
    proxy = await start_pair()
    draw, places = random.Random(3), asyncio.Semaphore(AT_ONCE)
    fetched_before = await decode.sum_of(FETCHED)

    async def both(number):
        path, body = question(prefill, draw, number)
        async with places:
            through = await answer(session, proxy.url, path, body)
            direct = await answer(session, prefill.url, path, body)
        assert through[:2] == direct[:2]
        return told(through[2]), told(direct[2])

    pairs = await asyncio.gather(*(both(number) for number in range(REQUESTS)))
    different = [(through, direct) for through, direct in pairs if through != direct]
    prompt_tokens = sum(direct.usage["prompt_tokens"] for _, direct in pairs)
    fetched = await decode.sum_of(FETCHED) - fetched_before
    counts = proxy.services["default"].handover.counts
    print(
        f"{len(different)} of {REQUESTS} different; {prompt_tokens} tokens of prompts, {fetched:.0f} fetched"
    )
    print(dict(counts))
    assert not different, different[0]
    assert fetched == pytest.approx(prompt_tokens, rel=0.05)
    assert counts["split"] == REQUESTS + 1
    assert not counts["again"] + counts["expired"] + counts["stranded"]
    async with asyncio.timeout(FREED_WITHIN_S):
        await freed(prefill)
    assert proxy.booked() == proxy.booked("default/prefill") == 0


async def until(condition):
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0)


class Books:
    """What the proxy has booked of a request in two legs, beside ``others`` that decode all the while."""

    def __init__(self, proxy):
        self._ledgers = proxy.ledger("default/prefill"), proxy.ledger()
        self._pool = proxy.services["default"].group.dispatcher.waiting
        self.others = 0

    @property
    def prefills(self):
        return self._ledgers[0].bound

    @property
    def decodes(self):
        return self._ledgers[1].bound - self.others

    @property
    def waits(self):
        return len(self._pool)

    @property
    def are_empty(self):
        return not self.prefills + self.decodes + self.waits


PHASES = {
    "prefill": lambda books: books.prefills,
    "pool": lambda books: books.waits,
    "sent": lambda books: books.decodes,
    "stream": lambda books: books.decodes and not books.prefills,
}
"""By what the books say of a request that has got that far."""


@pytest.mark.parametrize("phase", PHASES)
async def test_clients_that_leave_leave_nothing(phase, prefill, start_pair, session):
    """Each leaves a little later than the one before."""
    proxy = await start_pair(decode_slots=1 if phase == "pool" else 8)
    books, draw, took_s = Books(proxy), random.Random(phase), []

    def asked(tokens, **more):
        text = " ".join(text_of("english", draw) for _ in range(6))
        body = chat(prefill, text, tokens, ignore_eos=True, **more)
        return asyncio.create_task(answer(session, proxy.url, CHAT, body))

    async def hold_the_slot():
        """Return a stream that takes the one slot there is to decode, for longer than one request takes."""
        stream = asked(2000, stream=True)
        await until(lambda: PHASES["stream"](books))
        books.others = 1
        return stream

    for number in range(LEAVERS):
        busy = await hold_the_slot() if phase == "pool" else None
        await freed(prefill)
        asking = asked(500, stream=number % 2 == 0)
        await until(lambda: PHASES[phase](books))
        await asyncio.sleep(number * LATER_S)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        left_s = time.monotonic()
        # Who prefills shows what it holds only once it has begun.
        await until(lambda: books.are_empty)
        await freed(prefill)
        took_s.append(time.monotonic() - left_s)
        if busy is not None:
            assert not busy.done(), "the pool was there for it"
            busy.cancel()
            books.others = 0
            await until(lambda: books.are_empty)
    print(f"{phase}: the prefill worker held nothing after {', '.join(f'{s:.2f}' for s in took_s)} s")
    print(dict(proxy.services["default"].handover.counts))
    assert max(took_s) < FREED_WITHIN_S
    await until(lambda: books.are_empty)
    assert proxy.booked() == proxy.booked("default/prefill") == 0
