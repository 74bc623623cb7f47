"""Streams that go on at another worker when theirs dies, over real sockets with scripted workers."""

import asyncio
import gc
import json

import aiohttp
import pytest

from brproxy.proxy.going_on import COMMENT
from tests.brproxy.proxy.test_garbage import what_only_the_collector_frees

WORDS = [f" w{number}" for number in range(6)]
ASK = {"model": "m", "prompt": "go", "max_tokens": 6, "stream": True}
ON = {"limits": {"failovers_max": 2}, "routing": {"policy": "round-robin"}}
DIED = {
    "error": {
        "message": "EngineCore encountered an issue. See stack trace (above) for the root cause.",
        "type": "InternalServerError",
        "code": 500,
    }
}


ABORTED = {
    "id": "cmpl-x",
    "choices": [{"index": 0, "text": " lost", "finish_reason": "abort"}],
    "usage": {"prompt_tokens": 1, "total_tokens": 3, "completion_tokens": 2},
}


def sse(document):
    return b"data: %b\n\n" % (document if isinstance(document, bytes) else json.dumps(document).encode())


class Engine:
    """A worker that completes WORDS from wherever a prompt ends; ``dies`` tells it how often, and when.

    ``after`` events it ends the connection, or with ``says`` tells an error first; None: it never does.
    """

    def __init__(self, start_worker):
        self.start_worker = start_worker
        self.dies = []
        self.asked = []
        self.running_usage = True
        self.open = asyncio.Event()
        self.open.set()

    async def start(self):
        self.worker = await self.start_worker(self)
        return self.worker

    async def __call__(self, writer):
        _, headers, body = self.worker.requests[-1]
        asked = json.loads(body)
        self.asked.append(asked)
        await self.open.wait()
        after, says = self.dies.pop(0) if self.dies else (None, None)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head)
        for number, event in enumerate(self.events(asked, headers["x-request-id"])):
            if number == after:
                if says is not None:
                    for piece in (sse(says), sse(b"[DONE]")):
                        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                    writer.write(b"0\r\n\r\n")
                await writer.drain()
                return False
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        return True

    def events(self, asked, request_id):
        prompt = asked["prompt"]
        is_ids = isinstance(prompt, list)
        done = max(len(prompt) - 2, 0) if is_ids else prompt.count(" w")
        words = WORDS[done : done + asked["max_tokens"]]
        options = asked.get("stream_options") or {}
        running = options.get("continuous_usage_stats") and self.running_usage
        prompt_tokens = len(prompt) if is_ids else 1 + done

        def event(count, **choice):
            usage = {
                "prompt_tokens": prompt_tokens,
                "total_tokens": prompt_tokens + count,
                "completion_tokens": count,
            }
            document = {"id": f"cmpl-{request_id}", "created": 1000 + done}
            document["choices"] = [choice] if choice else []
            return document | ({"usage": usage} if running or not choice else {})

        for number, word in enumerate(words, 1):
            is_last = number == len(words)
            ids = {"token_ids": [100 + done + number]} if is_ids else {}
            reason = "length" if is_last else None
            yield sse(event(number, index=0, text=word, finish_reason=reason, **ids))
        if options.get("include_usage"):
            yield sse(event(len(words)))
        yield sse(b"[DONE]")


@pytest.fixture
def start(start_worker, start_proxy):
    async def start(count=2, **tables):
        engines = [Engine(start_worker) for _ in range(count)]
        urls = [(await engine.start()).url for engine in engines]
        return await start_proxy(urls, **ON | tables), engines

    return start


async def ask(client, proxy, path="/v1/completions", **document):
    """Return headers, what came, and whether the answer ended cleanly."""
    received = b""
    async with client.post(proxy.url + path, json=ASK | document) as response:
        try:
            async for piece in response.content.iter_any():
                received += piece
        except aiohttp.ClientError:
            return response.headers, received, False
        return response.headers, received, True


def told(received):
    """Return the documents of a stream's events, without comments."""
    events = [event for event in received.split(b"\n\n") if event.startswith(b"data: ")]
    return [json.loads(event[6:]) for event in events if event != b"data: [DONE]"]


def text(documents):
    return "".join(choice["text"] for document in documents for choice in document.get("choices", []))


@pytest.mark.parametrize("says", [None, DIED, ABORTED])
@pytest.mark.parametrize("after", [1, 2, 5])
async def test_a_stream_goes_on_where_its_worker_died(start, client, after, says):
    proxy, engines = await start()
    for engine in engines:
        engine.dies = [(after, says)]
    engines[1].dies = []
    for _ in range(2):
        headers, received, is_whole = await ask(client, proxy)
        assert is_whole
        assert received.endswith(b"data: [DONE]\n\n")
        documents = told(received)
        assert text(documents) == "".join(WORDS)
        assert len({document["id"] for document in documents}) == 1
        assert {document["created"] for document in documents} == {1000}
        assert not any("usage" in document for document in documents)
        assert headers["X-Brproxy-Failover"] == "possible"
    await proxy.idle()
    second = next(asked for asked in engines[1].asked if asked["prompt"] != "go")
    assert second["prompt"] == "go" + "".join(WORDS[:after])
    assert second["max_tokens"] == 6 - after


@pytest.mark.parametrize("running", [False, True])
async def test_usage_is_of_the_whole(start, client, running):
    proxy, engines = await start()
    engines[0].dies = engines[1].dies = [(2, None)]
    options = {"include_usage": True} | ({"continuous_usage_stats": True} if running else {})
    _, received, is_whole = await ask(client, proxy, stream_options=options)
    assert is_whole
    documents = told(received)
    assert documents[-1]["usage"] == {"prompt_tokens": 1, "total_tokens": 7, "completion_tokens": 6}
    counts = [document["usage"] and document["usage"]["completion_tokens"] for document in documents[:-1]]
    assert counts == ([1, 2, 3, 4, 5, 6] if running else [None] * 6)
    await proxy.idle()


async def test_token_ids_go_on_as_token_ids(start, client):
    proxy, engines = await start()
    engines[0].dies = engines[1].dies = [(3, None)]
    _, received, is_whole = await ask(client, proxy, prompt=[7, 8], return_token_ids=True)
    assert is_whole
    assert text(told(received)) == "".join(WORDS)
    asked = engines[0].asked + engines[1].asked
    assert sorted((a["prompt"] for a in asked), key=len) == [[7, 8], [7, 8, 101, 102, 103]]
    await proxy.idle()


INEXACT = [
    {"path": "/v1/chat/completions"},
    {"n": 2},
    {"echo": True},
    {"logprobs": 1},
    {"suffix": "x"},
    {"seed": 1},
    {"stop": ["x"]},
    {"presence_penalty": 0.5},
    {"response_format": {"type": "json_object"}},
    {"prompt": ["go"]},
    {"prompt": [7, 8]},
    {"unknown_member": 1},
]


@pytest.mark.parametrize("more", INEXACT, ids=str)
async def test_what_is_not_exact_ends_with_an_error(start, client, more):
    proxy, engines = await start()
    engines[0].dies = engines[1].dies = [(2, None)]
    headers, received, is_whole = await ask(client, proxy, **more)
    assert not is_whole
    assert "error" in told(received)[-1]
    assert len(engines[0].asked + engines[1].asked) == 1
    assert "X-Brproxy-Failover" not in headers
    await proxy.idle()


@pytest.mark.parametrize(
    ("count", "running", "tables"),
    [
        (1, True, {}),
        (2, False, {}),
        (2, True, {"limits": {"failovers_max": 0}}),
    ],
    ids=["no other worker", "nobody counts", "off"],
)
async def test_it_does_not_go_on(start, client, count, running, tables):
    proxy, engines = await start(count, **tables)
    for engine in engines:
        engine.dies, engine.running_usage = [(2, None)], running
    _, received, is_whole = await ask(client, proxy)
    assert not is_whole
    assert "error" in told(received)[-1]
    assert sum(len(engine.asked) for engine in engines) == 1
    await proxy.idle()


def failovers(proxy):
    return dict(proxy.running.service.metrics.groups["default"].failovers)


@pytest.mark.parametrize(
    ("more", "tables"),
    [({}, {"limits": {"failovers_max": 0}}), ({"path": "/v1/chat/completions"}, {}), ({"seed": 1}, {})],
    ids=["off", "a chat", "not exact"],
)
async def test_an_abort_passes_as_it_is_where_nobody_goes_on(start, client, more, tables):
    proxy, engines = await start(**tables)
    engines[0].dies = engines[1].dies = [(2, ABORTED)]
    _, received, is_whole = await ask(client, proxy, **more)
    assert is_whole
    assert received.endswith(b"data: [DONE]\n\n")
    assert told(received)[-1]["choices"] == ABORTED["choices"]
    assert len(engines[0].asked + engines[1].asked) == 1
    assert failovers(proxy) == {}
    await proxy.idle()


@pytest.mark.parametrize("path", ["/inference/v1/abort_requests", "/abort_request", "/pause"])
async def test_an_abort_that_was_asked_for_is_the_answer(start, client, until, path):
    proxy, engines = await start(worker={"slots": 8})
    for engine in engines:
        engine.dies = [(2, ABORTED)]
        engine.open.clear()
    asking = asyncio.create_task(ask(client, proxy))
    await until(lambda: any(engine.asked for engine in engines))
    busy = engines[0] if engines[0].asked else engines[1]
    for engine in engines:
        if engine is not busy:
            engine.open.set()
            engine.dies = []
    abort = client.post(proxy.url + path, json={"prompt": "go", "max_tokens": 6, "request_ids": ["x"]})
    async with abort as response:
        await response.read()
    busy.open.set()
    _, received, is_whole = await asking
    assert is_whole
    assert told(received)[-1]["choices"] == ABORTED["choices"]
    # What begins after that has been asked for by nobody.
    engines[0].dies = engines[1].dies = [(2, ABORTED)]
    _, received, is_whole = await ask(client, proxy)
    assert text(told(received)) == "".join(WORDS)
    await proxy.idle()


async def test_what_came_of_it_is_counted(start, client, until):
    proxy, engines = await start(3)
    engines[0].dies = engines[1].dies = engines[2].dies = [(1, None)]
    # One dies, goes on at another one that dies as well, and comes to its end at the third.
    for engine in engines:
        engine.dies = [(1, None)] if engine is not engines[2] else []
    for _ in range(2):
        _, _, is_whole = await ask(client, proxy)
        assert is_whole
    counts = failovers(proxy)
    assert counts["finished"] >= 1
    assert sum(counts.values()) == 2
    for engine in engines:
        engine.dies = [(1, None)] * 9
    assert not (await ask(client, proxy))[2]
    assert failovers(proxy)["failed"] == counts.get("failed", 0) + 2
    async with client.get(proxy.url + "/metrics") as response:
        assert 'brproxy_failovers_total{group="default",outcome="finished"}' in await response.text()
    await proxy.idle()


async def test_of_one_worker_nobody_can_go_on(start, client):
    proxy, engines = await start(1)
    engines[0].dies = [(2, None)]
    assert not (await ask(client, proxy))[2]
    assert failovers(proxy) == {"no_worker": 1}


async def test_a_client_that_leaves_meanwhile_is_counted_as_such(start, client, until):
    proxy, engines = await start(2)
    for engine in engines:
        engine.dies = [(2, None)]
        engine.open.clear()
    asking = asyncio.create_task(ask(client, proxy))
    await until(lambda: any(engine.asked for engine in engines))
    dying, other = engines if engines[0].asked else engines[::-1]
    dying.open.set()
    await until(lambda: other.asked)
    asking.cancel()
    await proxy.idle()
    assert failovers(proxy) == {"left": 1}


async def test_it_goes_on_beside_comments_and_leaves_nothing_to_collect(start, client):
    proxy, engines = await start(timeouts={"keepalive_comments_s": 3600})
    for _ in range(2):
        gc.collect()
        engines[0].dies = engines[1].dies = [(2, None)]
        _, received, is_whole = await ask(client, proxy)
        assert is_whole
        assert text(told(received)) == "".join(WORDS)
        assert received.count(COMMENT) == 1
        await proxy.idle()
    # What a connection leaves that breaks, whoever was on it.
    assert what_only_the_collector_frees() <= {"ResponseHead", "ResponseParser"}


async def test_it_goes_on_as_often_as_it_may(start, client):
    proxy, engines = await start(3)
    for engine in engines:
        engine.dies = [(1, None)] * 9
    _, received, is_whole = await ask(client, proxy)
    assert not is_whole
    assert "error" in told(received)[-1]
    assert text(told(received)) == "".join(WORDS[:3])
    assert sum(len(engine.asked) for engine in engines) == 3
    await proxy.idle()


async def test_what_goes_on_is_a_request_of_its_own(start, client, until):
    proxy, engines = await start(2, worker={"slots": 1}, routing={"policy": "br-0"})
    for engine in engines:
        engine.open.clear()
    holding = asyncio.create_task(ask(client, proxy))
    await until(lambda: any(engine.asked for engine in engines))
    held, dying = engines if engines[0].asked else engines[::-1]
    dying.dies = [(2, None)]
    dying.open.set()
    asking = asyncio.create_task(ask(client, proxy))
    await until(lambda: proxy.waiting)
    (entry,) = proxy.groups[0].dispatcher.waiting.first()
    assert (entry.request.prompt_tokens, entry.request.output_tokens_max) == (3, 4)
    assert proxy.ledger.bound == 1, "the part that broke off has given its place back"
    asking.cancel()
    await until(lambda: not proxy.waiting)
    held.open.set()
    assert (await holding)[2]
    await proxy.idle()
