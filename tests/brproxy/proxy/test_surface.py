"""What clients see through the proxy: bytes, headers, control pages."""

import asyncio

import pytest
from yarl import URL

from brproxy.engines.prompt import prompt_size
from brproxy.estimate import TokenEstimator

CHAT = "/v1/chat/completions"
TEXT = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "four words of text"}]}
CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":" x"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":40,"completion_tokens":6}}\n\n'
DONE = b"data: [DONE]\n\n"


async def test_a_stream_passes_byte_for_byte(start_worker, start_proxy, client, answer, chunked):
    parts = [b": hello\n\n", CHUNK[:20], CHUNK[20:] + CHUNK[:-1], b"\n", b"data: odd\r\n\r\n", DONE, b"rest"]
    worker = await start_worker(
        answer(*chunked(*parts, headers="X-Worker: w\r\nConnection: X-Hop\r\nX-Hop: h\r\n"))
    )
    proxy = await start_proxy([worker.url])
    async with client.post(proxy.url + CHAT, json=TEXT, headers={"X-Request-Id": "mine"}) as response:
        assert await response.read() == b"".join(parts)
        assert response.headers["X-Worker"] == "w"
        assert "X-Hop" not in response.headers
        assert response.headers["X-Request-Id"] == "mine"
        assert "Server" not in response.headers, "the worker sent none"
    await proxy.idle()


async def test_the_request_passes_unchanged(start_worker, start_proxy, client, answer, fixed):
    worker = await start_worker(answer(fixed(b"{}")))
    proxy = await start_proxy([worker.url])
    body = b'{"model" : "m", "input": "x", "big": 123456789012345678901234567890}'
    headers = {
        "Authorization": "Bearer k",
        "Content-Type": "application/json",
        "Accept": "x/y",
        "X-Request-Id": "r",
    }
    # "encoded": the client must not tidy the URL up before it is sent.
    url = URL(proxy.url + "/v1/embeddings?a=%2F&b=c%20d", encoded=True)
    async with client.post(url, data=body, headers=headers):
        pass
    line, seen, received = worker.requests[0]
    assert line == "POST /v1/embeddings?a=%2F&b=c%20d HTTP/1.1"
    assert received == body
    assert (seen["authorization"], seen["accept"], seen["x-request-id"]) == ("Bearer k", "x/y", "r")
    assert seen["host"] == worker.url.removeprefix("http://")


@pytest.mark.parametrize("status", ["400 Bad Request", "404 Nope", "418 I'm a teapot", "500 Oh"])
async def test_a_workers_own_error_reaches_the_client_unchanged(
    status, start_worker, start_proxy, client, answer, fixed
):
    error = b'{"error":{"message":"max_tokens must be at least 1","code":400}}'
    worker = await start_worker(answer(fixed(error, status=status, content_type="application/json; x=y")))
    proxy = await start_proxy([worker.url])
    async with client.post(proxy.url + CHAT, json=TEXT) as response:
        assert (response.status, response.reason) == (int(status[:3]), status[4:])
        assert await response.read() == error
        assert response.headers["Content-Type"] == "application/json; x=y"
    assert worker.connections == 1, "an error is an answer: nothing is retried"
    await proxy.idle()


async def test_a_compressed_reply_passes_compressed(start_worker, start_proxy, client, answer, fixed):
    body = b"\x1f\x8b not really gzip"
    worker = await start_worker(answer(fixed(body, headers="Content-Encoding: gzip\r\n")))
    proxy = await start_proxy([worker.url])
    async with client.get(proxy.url + "/version") as response:
        assert response.headers["Content-Encoding"] == "gzip"
        assert await response.content.read() == body


async def test_usage_is_asked_for_and_hidden_again(start_worker, start_proxy, client, answer, chunked):
    worker = await start_worker(answer(*chunked(CHUNK, CHUNK, USAGE, DONE)))
    proxy = await start_proxy([worker.url])
    async with client.post(proxy.url + CHAT, json=TEXT) as response:
        assert await response.read() == CHUNK + CHUNK + DONE
    assert b'"stream_options":{"include_usage":true}' in worker.requests[0][2]
    estimator = proxy.running.service.estimator
    assert estimator.tokens_per_chunk("m") == 3.0
    text = prompt_size(TEXT).text
    assert TokenEstimator(4.0, 1).prompt_tokens("m", "", text) < 20
    assert estimator.prompt_tokens("m", "", text) == pytest.approx(40, abs=2)


async def test_a_prompt_is_estimated_for_its_model_and_user(
    start_worker, start_proxy, client, answer, chunked, monkeypatch
):
    asked = []

    def prompt_tokens(self, *of, **options):
        asked.append(of)
        return 7

    monkeypatch.setattr(TokenEstimator, "prompt_tokens", prompt_tokens)
    proxy = await start_proxy([(await start_worker(answer(*chunked(CHUNK, USAGE, DONE)))).url])
    async with client.post(proxy.url + CHAT, json=TEXT | {"user": "ann"}) as response:
        await response.read()
    assert asked == [("m", "ann", prompt_size(TEXT).text)]


async def test_usage_that_the_client_asked_for_is_not_hidden(
    start_worker, start_proxy, client, answer, chunked
):
    worker = await start_worker(answer(*chunked(CHUNK, USAGE, DONE)))
    proxy = await start_proxy([worker.url])
    asked = TEXT | {"stream_options": {"include_usage": True}}
    async with client.post(proxy.url + CHAT, json=asked) as response:
        assert await response.read() == CHUNK + USAGE + DONE


async def test_asking_for_usage_can_be_turned_off(start_worker, start_proxy, client, answer, chunked):
    worker = await start_worker(answer(*chunked(CHUNK, DONE)))
    proxy = await start_proxy([worker.url], estimate={"ask_usage": False})
    async with client.post(proxy.url + CHAT, json=TEXT) as response:
        await response.read()
    assert b"stream_options" not in worker.requests[0][2]


async def test_load_follows_the_stream(start_worker, start_proxy, client, silence, chunked, until):
    worker = await start_worker(silence(*chunked(CHUNK, CHUNK, CHUNK, end=False)))
    proxy = await start_proxy([worker.url])
    prompt = {"model": "m", "stream": True, "prompt": [1] * 100}
    async with client.post(proxy.url + "/v1/completions", json=prompt) as response:
        await response.content.readany()
        await until(lambda: proxy.ledger.kv_tokens == (103,))
        assert proxy.ledger.requests == (1,)
    await proxy.idle()


async def test_any_other_path_is_booked_while_it_runs(start_worker, start_proxy, client, silence, until):
    worker = await start_worker(silence())
    proxy = await start_proxy([worker.url])
    asked = asyncio.create_task(
        client.post(proxy.url + "/v1/rerank", json={"query": "q" * 40, "documents": []})
    )
    await until(lambda: proxy.ledger.kv_tokens == (10,))
    asked.cancel()
    await proxy.idle()


async def test_models_are_the_union(start_emulator, start_proxy, client):
    first, second = await start_emulator(1, model="small"), await start_emulator(2, model="large")
    proxy = await start_proxy([*first.urls, *second.urls])
    async with client.get(proxy.url + "/v1/models") as response:
        assert [model["id"] for model in (await response.json())["data"]] == ["small", "large"]


async def test_models_without_a_worker(start_proxy, client, unused_tcp_port):
    proxy = await start_proxy([f"http://127.0.0.1:{unused_tcp_port}"])
    async with client.get(proxy.url + "/v1/models") as response:
        assert response.status == 502
        assert (await response.json())["error"]["type"] == "upstream_error"


async def test_models_in_the_workers_own_words_when_it_refuses(
    start_worker, start_proxy, client, answer, fixed
):
    worker = await start_worker(answer(fixed(b'{"error":"Unauthorized"}', status="401 Unauthorized")))
    proxy = await start_proxy([worker.url])
    async with client.get(proxy.url + "/v1/models") as response:
        assert (response.status, await response.read()) == (401, b'{"error":"Unauthorized"}')


async def test_an_unknown_model_is_refused_in_the_openai_format(start_emulator, start_proxy, client):
    emulator = await start_emulator(1)
    proxy = await start_proxy(emulator.urls, worker={"model": "emulated"})
    async with client.post(proxy.url + CHAT, json=TEXT | {"model": "nope"}) as response:
        assert response.status == 404
        error = (await response.json())["error"]
    assert error["message"] == "The model `nope` does not exist. Models served here: emulated."
    async with client.get(proxy.url + "/v1/models/nope") as response:
        assert response.status == 404


async def test_a_body_that_is_too_large(start_emulator, start_proxy, client):
    proxy = await start_proxy((await start_emulator(1)).urls, limits={"body_bytes_max": 2000})
    async with client.post(proxy.url + CHAT, data=b"x" * 3000) as response:
        assert response.status == 413
        assert "larger than 2000 bytes" in (await response.json())["error"]["message"]


async def test_health_ready_and_metrics(start_emulator, start_proxy, client, unused_tcp_port):
    emulator = await start_emulator(1)
    proxy = await start_proxy(emulator.urls, health=True)
    for path, text in (("/health", "ok\n"), ("/ready", "ready\n")):
        async with client.get(proxy.url + path) as response:
            assert (response.status, await response.text()) == (200, text)
    async with client.post(proxy.url + CHAT, json=TEXT | {"model": "emulated", "max_tokens": 5}) as response:
        await response.read()
    async with client.get(proxy.url + "/metrics") as response:
        text = await response.text()
    assert 'brproxy_requests_total{group="default",outcome="finished"} 1.0' in text
    assert 'brproxy_output_tokens_total{group="default"} 5.0' in text
    assert f'brproxy_worker_routable{{group="default",worker="{emulator.urls[0][7:]}"}} 1.0' in text
    down = await start_proxy([f"http://127.0.0.1:{unused_tcp_port}"], health=True)
    async with client.get(down.url + "/ready") as response:
        name = f"127.0.0.1:{unused_tcp_port}"
        reason = f"{name}: cannot connect to http://{name}: Connection refused"
        assert (response.status, await response.text()) == (503, f"no worker is healthy\n{reason}\n")
    async with client.get(down.url + "/health") as response:
        assert response.status == 200


async def test_head_and_no_content(start_worker, start_proxy, client, answer):
    worker = await start_worker(answer(b"HTTP/1.1 204 No Content\r\nX-A: b\r\n\r\n"))
    proxy = await start_proxy([worker.url])
    async with client.delete(proxy.url + "/v1/files/1") as response:
        assert (response.status, response.headers["X-A"], await response.read()) == (204, "b", b"")
    async with client.head(proxy.url + "/v1/files/1") as response:
        assert response.status == 204


async def test_non_streaming_replies_teach_the_estimate(start_emulator, start_proxy, client):
    proxy = await start_proxy((await start_emulator(1)).urls)
    document = {"model": "emulated", "prompt": "ab " * 50, "max_tokens": 3}
    async with client.post(proxy.url + "/v1/completions", json=document) as response:
        assert (await response.json())["choices"][0]["text"] == " 1 2 3"
    text = prompt_size(document).text
    assert TokenEstimator(4.0, 1).prompt_tokens("emulated", "", text) < 35
    assert 40 <= proxy.running.service.estimator.prompt_tokens("emulated", "", text) <= 50
    await proxy.idle()
