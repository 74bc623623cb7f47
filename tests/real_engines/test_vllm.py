"""A real vLLM behind the proxy answers as it does without, and the books say what it holds."""

import asyncio
import random
import re
import time

import orjson
import pytest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
OWN = re.compile(rb'"(?:id|created)":\s*(?:"[^"]*"|\d+)')
"""What differs from one answer to the next."""
APART_MAX = 0.05
"""How far the books may be from the engine's own gauge, as a share of it."""
SAMPLES = 40


def words(draw, count):
    return " ".join(draw.choice(ENGLISH) for _ in range(count))


ENGLISH = [
    *("the", "of", "and", "to", "in", "that", "was", "it", "for", "with", "his", "on", "be", "at", "which"),
    *(
        "have",
        "from",
        "this",
        "are",
        "not",
        "but",
        "had",
        "they",
        "you",
        "all",
        "water",
        "mountain",
        "question",
    ),
    *("answer", "remember", "important", "between", "different", "government", "history", "development"),
    *(
        "because",
        "through",
        "children",
        "another",
        "together",
        "something",
        "evening",
        "language",
        "carefully",
    ),
]
CHINESE = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出"
    "就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所民"
)
CODE = (
    "def {a}({b}, {c}=None):\n    if {b} is None:\n        return {c}[{n}]\n"
    "    for {a}_i in range(len({b})):\n"
    "        {c} += {b}[{a}_i] * {n}\n    return {{'{a}': {c}, \"{b}\": {n}.5}}\n\n"
)


def text_of(kind, draw):
    """Return a prompt that begins like no other: a cached prefix would be no load."""
    head = f"{draw.randrange(1 << 40):x} "
    if kind == "english":
        return head + words(draw, 160)
    if kind == "chinese":
        return head + "".join(draw.choice(CHINESE) for _ in range(240))
    names = {"a": draw.choice(ENGLISH), "b": draw.choice(ENGLISH), "c": draw.choice(ENGLISH)}
    return head + "".join(CODE.format(**names, n=draw.randrange(1000)) for _ in range(5))


def chat(engine, text="Hello", tokens=8, **more):
    messages = [{"role": "user", "content": text}]
    return {"model": engine.model, "messages": messages, "max_tokens": tokens, "temperature": 0, **more}


async def answer(session, url, path, body):
    async with session.post(url + path, json=body) as response:
        own = await response.read()
        return response.status, response.headers["Content-Type"], OWN.sub(b'"_":0', own)


FORMS = [
    {},
    {"stream": True},
    {"stream": True, "stream_options": {"include_usage": True}},
    {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"stream": True, "n": 2, "temperature": 1, "seed": 7},
    {"n": 2, "temperature": 1, "seed": 7},
    {"stream": True, "logprobs": True, "top_logprobs": 2},
    {"stream": True, "stop": ["e"]},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form) or "plain")
async def test_an_answer_is_the_engines_own(form, engine, proxy, session):
    body = chat(engine, tokens=24, **form)
    # Not what comes together: chunks hold as many tokens as there are when they are written.
    direct = await answer(session, engine.url, CHAT, body)
    through = await answer(session, proxy.url, CHAT, body)
    assert through[:2] == direct[:2]
    assert said(through[2]) == said(direct[2])
    await engine.idle()
    assert proxy.kv_tokens == 0


def said(raw):
    """Return what an answer says: its texts by choice, its reasons to end, its last usage, and its end."""
    if not raw.startswith(b"data: "):
        document = orjson.loads(raw)
        return [choice["message"]["content"] for choice in document["choices"]], document["usage"]
    events = [event.removeprefix(b"data: ") for event in raw.split(b"\n\n") if event]
    texts, reasons, usage = {}, {}, None
    for event in events[:-1]:
        document = orjson.loads(event)
        usage = document.get("usage") or usage
        for choice in document["choices"]:
            index = choice["index"]
            texts[index] = texts.get(index, "") + (choice["delta"].get("content") or "")
            reasons[index] = choice.get("finish_reason") or reasons.get(index)
    return texts, reasons, usage, events[-1]


ERRORS = [
    (CHAT, {"model": "nobody"}),
    (CHAT, {"max_tokens": -1}),
    (CHAT, {"max_tokens": 10**6}),
    (CHAT, {"messages": "none"}),
    (CHAT, {"temperature": "hot"}),
    (CHAT, {"stream": True, "max_tokens": -1}),
    ("/v1/nothing", {}),
]


@pytest.mark.parametrize(("path", "wrong"), ERRORS)
async def test_an_error_is_the_engines_byte_for_byte(path, wrong, engine, proxy, session):
    body = chat(engine) | wrong
    assert await answer(session, proxy.url, path, body) == await answer(session, engine.url, path, body)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_slot(stream, engine, proxy, session):
    body = chat(engine, tokens=3000, stream=stream, ignore_eos=True)
    asking = asyncio.create_task(answer(session, proxy.url, CHAT, body))
    async with asyncio.timeout(60):
        while not (await engine.gauges())[1]:
            await asyncio.sleep(0.01)
    asking.cancel()
    left_s = time.monotonic()
    await asyncio.gather(asking, return_exceptions=True)
    await engine.idle()
    took_ms = 1000 * (time.monotonic() - left_s)
    print(f"stream={stream}: the engine was idle {took_ms:.0f} ms after its client left")
    assert proxy.kv_tokens == 0


@pytest.mark.parametrize("kind", ["english", "code", "chinese", "tokens", "mixed"])
async def test_the_books_are_what_the_engine_holds(kind, engine, proxy, session):
    draw = random.Random(kind)
    stop = asyncio.Event()

    async def one():
        now = draw.choice(["english", "code", "chinese"]) if kind == "mixed" else kind
        tokens = draw.randrange(60, 200)
        if now == "tokens":
            prompt = [draw.randrange(100, 300) for _ in range(draw.randrange(100, 400))]
            body = {"model": engine.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
            path = COMPLETIONS
        else:
            body, path = chat(engine, text_of(now, draw), tokens), CHAT
        status, _, _ = await answer(session, proxy.url, path, body | {"stream": True, "ignore_eos": True})
        assert status == 200

    async def user():
        while not stop.is_set():
            await one()

    users = [asyncio.create_task(user()) for _ in range(6)]
    pairs = []
    # A few of each kind teach.
    await asyncio.sleep(10)
    for _ in range(SAMPLES):
        await asyncio.sleep(0.2)
        before = proxy.kv_tokens
        held, running, waiting = await engine.gauges()
        booked = (before + proxy.kv_tokens) / 2
        if running and not waiting:
            # The gauge counts whole blocks: half a block a request more than tokens.
            pairs.append((booked, held - running * engine.block_tokens / 2))
    stop.set()
    await asyncio.gather(*users)
    booked, held = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    apart = f"{100 * (booked / held - 1):+.1f} %"
    print(f"{kind}: booked {booked:.0f}, held {held:.0f} KV tokens: {apart}, {len(pairs)} looks")
    assert abs(booked - held) <= APART_MAX * held
    assert proxy.kv_tokens == 0
