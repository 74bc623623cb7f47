"""A real vLLM behind the proxy answers as it does without, and the books say what it holds."""

import pytest

from tests.real_engines.asking import CHAT, answer, chat, leave, said
from tests.real_engines.books import KINDS, hold_to_the_gauge


@pytest.fixture
async def engine(open_engine):
    return await open_engine("--real-vllm")


@pytest.fixture
async def proxy(engine, start_proxy):
    return await start_proxy({"url": engine.url, "slots": 8})


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
    assert proxy.booked() == 0


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
    took_ms = await leave(session, engine, proxy, CHAT, body)
    print(f"stream={stream}: the engine was idle {took_ms:.0f} ms after its client left")
    assert proxy.booked() == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_the_books_are_what_the_engine_holds(kind, engine, proxy, session):
    await hold_to_the_gauge(kind, engine, proxy, session)
