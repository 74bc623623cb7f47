"""A real SGLang behind the proxy answers as it does without, tells its load, and the books say what it holds.

``pytest tests/real_engines --real-sglang http://127.0.0.1:8111``.
"""

import asyncio
import sys

import orjson
import pytest

from brproxy.engines.load_pages import read_sglang_loads
from tests.real_engines.asking import CHAT, COMPLETIONS, GENERATE, answer, chat, leave, said
from tests.real_engines.books import KINDS, hold_to_the_gauge
from tests.real_engines.conftest import Engine


class Sglang(Engine):
    """An SGLang server, and what its page of loads says."""

    async def load(self):
        (report,) = read_sglang_loads(await self.page("/v1/loads")).reports.values()
        return report

    async def gauges(self):
        """See Engine.gauges."""
        report = await self.load()
        return report.kv_used_tokens, report.running, report.waiting


@pytest.fixture
async def engine(open_engine):
    return await open_engine("--real-sglang", Sglang)


@pytest.fixture
async def proxy(engine, start_proxy):
    return await start_proxy({"url": engine.url, "slots": 8, "engine": "sglang"})


def generate(tokens=8, **more):
    sampling = {"max_new_tokens": tokens, "temperature": 0}
    return {"text": "Hello, who is there?", "sampling_params": sampling, **more}


STREAM = {"stream": True}
USAGE = {"stream_options": {"include_usage": True}}
CONTINUOUS = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
FORMS = [
    (CHAT, {}),
    (CHAT, STREAM),
    (CHAT, STREAM | USAGE),
    (CHAT, STREAM | CONTINUOUS),
    (CHAT, STREAM | {"logprobs": True, "top_logprobs": 2}),
    (CHAT, {"n": 2, "temperature": 0}),
    (COMPLETIONS, {}),
    (COMPLETIONS, STREAM | USAGE),
]


@pytest.mark.parametrize(("path", "form"), FORMS)
async def test_an_answer_is_the_engines_own(path, form, engine, proxy, session):
    body = chat(engine, tokens=24, **form)
    if path == COMPLETIONS:
        body["prompt"] = body.pop("messages")[0]["content"]
    direct = await answer(session, engine.url, path, body)
    through = await answer(session, proxy.url, path, body)
    assert through[:2] == direct[:2]
    assert said(through[2]) == said(direct[2])
    await engine.idle()
    assert proxy.booked() == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_its_own_generation_is_passed_on(stream, engine, proxy, session):
    body = generate(24, stream=stream)
    direct = await answer(session, engine.url, GENERATE, body)
    through = await answer(session, proxy.url, GENERATE, body)
    assert through[:2] == direct[:2]
    assert generated(through[2]) == generated(direct[2])
    await engine.idle()
    assert proxy.booked() == 0


def generated(raw):
    """Return the last that an answer of /generate says: its text so far, the reason to end, and counts."""
    events = [event.removeprefix(b"data: ") for event in raw.split(b"\n\n") if event]
    end = events.pop() if events[-1] == b"[DONE]" else b""
    document = orjson.loads(events[-1])
    about = document["meta_info"]
    return document["text"], about["finish_reason"], about["prompt_tokens"], about["completion_tokens"], end


ERRORS = [
    (CHAT, {"model": "nobody", "max_tokens": -1}),
    (CHAT, {"max_tokens": 10**6}),
    (CHAT, {"messages": "none"}),
    (CHAT, {"temperature": "hot"}),
    (CHAT, {"temperature": -1, "stream": True}),
    (GENERATE, {"text": 7}),
    (GENERATE, {"sampling_params": {"max_new_tokens": -1}}),
    ("/v1/nothing", {}),
]


@pytest.mark.parametrize(("path", "wrong"), ERRORS)
async def test_an_error_is_the_engines_byte_for_byte(path, wrong, engine, proxy, session):
    body = (generate() if path == GENERATE else chat(engine)) | wrong
    assert await answer(session, proxy.url, path, body) == await answer(session, engine.url, path, body)


@pytest.mark.parametrize("path", [CHAT, GENERATE])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_slot(path, stream, engine, proxy, session):
    if path == CHAT:
        body = chat(engine, tokens=3000, stream=stream, ignore_eos=True)
    else:
        body = generate(stream=stream)
        body["sampling_params"] |= {"max_new_tokens": 3000, "ignore_eos": True}
    took_ms = await leave(session, engine, proxy, path, body)
    print(f"{path} stream={stream}: the engine was idle {took_ms:.0f} ms after its client left")
    assert proxy.booked() == 0


async def test_its_load_is_read(engine, proxy, session):
    busy = asyncio.create_task(
        answer(session, proxy.url, CHAT, chat(engine, tokens=300, stream=True, ignore_eos=True))
    )
    wanted = {"running_requests": 1.0, "kv_capacity_tokens": float((await engine.load()).kv_capacity_tokens)}
    async with asyncio.timeout(60):
        while not wanted.items() <= (await told(proxy, session)).items():
            assert not busy.done(), await told(proxy, session)
            await asyncio.sleep(0.05)
    assert not [name for name in await told(proxy, session) if name.startswith("signal_missing")]
    await busy


async def told(proxy, session):
    """Return what the proxy's metrics tell of the engine."""
    async with session.get(proxy.url + "/metrics") as response:
        lines = (await response.text()).split("\n")
    own = [line.removeprefix("brproxy_engine_") for line in lines if line.startswith("brproxy_engine_")]
    return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in own}


async def test_init_and_check_know_it(engine, tmp_path):
    file = tmp_path / "brproxy.toml"
    written = await command("init", engine.url, "--out", str(file))
    assert 'engine = "sglang"' in file.read_text(), written
    load = await engine.load()
    assert str(load.kv_capacity_tokens) in file.read_text() + written
    assert engine.model in await command("check", "--config", str(file))


async def command(*arguments):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "brproxy", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said_s, _ = await process.communicate()
    print(said_s.decode())
    assert process.returncode == 0
    return said_s.decode()


@pytest.mark.parametrize("kind", KINDS)
async def test_the_books_are_what_the_engine_holds(kind, engine, proxy, session):
    await hold_to_the_gauge(kind, engine, proxy, session)
