"""What happens when workers fail, refuse or stall, and when clients leave."""

import asyncio

import aiohttp
import orjson
import pytest

CHAT = "/v1/chat/completions"
ASK = {"model": "emulated", "stream": True, "messages": [{"role": "user", "content": "a few words"}]}
CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":" x"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
REFUSED = b'data: {"error":{"message":"full","type":"Service Unavailable","code":503}}\n\n'


@pytest.fixture
def dead_url(unused_tcp_port):
    return f"http://127.0.0.1:{unused_tcp_port}"


async def ask(client, proxy, **more):
    async with client.post(proxy.url + CHAT, json=ASK | more) as response:
        return response.status, response.headers, await response.read()


async def test_a_worker_that_cannot_be_reached_is_passed_by(start_emulator, start_proxy, client, dead_url):
    emulator = await start_emulator(1)
    proxy = await start_proxy([dead_url, *emulator.urls])
    for _ in range(8):
        status, _, body = await ask(client, proxy, max_tokens=2)
        assert (status, body.endswith(DONE)) == (200, True)
    await proxy.idle()


@pytest.mark.parametrize(
    "head", [b"", b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n", "chunked head"]
)
async def test_a_reset_before_the_first_byte_is_retried(
    head, start_worker, start_emulator, start_proxy, client, reset, chunked
):
    parts = chunked(end=False) if head == "chunked head" else [head] if head else []
    worker = await start_worker(reset(*parts))
    emulator = await start_emulator(1)
    proxy = await start_proxy([worker.url, *emulator.urls])
    for _ in range(6):
        status, _, body = await ask(client, proxy, max_tokens=2)
        assert (status, body.endswith(DONE)) == (200, True)
    assert worker.connections
    await proxy.idle()


async def test_a_kept_connection_that_the_worker_has_closed_is_no_failure(
    start_worker, start_proxy, client, fixed
):
    served = set()

    async def one_request_a_connection(writer):
        if writer in served:
            writer.transport.abort()
            return False
        served.add(writer)
        writer.write(fixed(b"{}"))
        await writer.drain()
        return True

    worker = await start_worker(one_request_a_connection)
    proxy = await start_proxy([worker.url], limits={"retries_max": 0})
    for _ in range(5):
        assert (await ask(client, proxy))[0] == 200
    assert worker.connections == 5
    assert len(worker.requests) == 9, "every kept connection was tried once"
    await proxy.idle()


@pytest.mark.parametrize(("path", "tried"), [(CHAT, [0, 0, 1, 1]), ("/reset_prefix_cache", [0, 0, 0, 1])])
async def test_what_workers_may_have_worked_on_runs_twice_at_most_and_only_if_it_generates(
    path, tried, start_worker, start_proxy, client, reset
):
    workers = [await start_worker(reset()) for _ in range(4)]
    proxy = await start_proxy([worker.url for worker in workers], limits={"retries_max": 9})
    async with client.post(proxy.url + path, json=ASK) as response:
        assert response.status == 502
        message = (await response.json())["error"]["message"]
    assert message.startswith("No worker took the request: http://127.0.0.1:")
    assert sorted(len(worker.requests) for worker in workers) == tried
    await proxy.idle()


async def test_what_reaches_no_worker_tries_as_many_as_it_may(start_proxy, client, unused_tcp_port_factory):
    proxy = await start_proxy([f"http://127.0.0.1:{unused_tcp_port_factory()}" for _ in range(4)])
    status, _, body = await ask(client, proxy)
    assert (status, b"No worker took the request: cannot connect to" in body) == (502, True)
    assert sum(proxy.running.service.metrics.groups["default"].retries.values()) == 2
    await proxy.idle()


@pytest.mark.parametrize("kind", ["status", "first event"])
async def test_a_refusal_moves_on(
    kind, start_worker, start_emulator, start_proxy, client, answer, chunked, fixed
):
    script = (
        answer(fixed(b"{}", status="503 Full"))
        if kind == "status"
        else answer(*chunked(b": x\n\n", REFUSED, DONE))
    )
    worker = await start_worker(script)
    emulator = await start_emulator(1)
    proxy = await start_proxy([worker.url, *emulator.urls])
    for _ in range(6):
        status, _, body = await ask(client, proxy, max_tokens=2)
        assert (status, REFUSED in body, body.endswith(DONE)) == (200, False, True)
    assert worker.connections
    await proxy.idle()


async def test_a_refusal_by_all_reaches_the_client_unchanged(
    start_worker, start_proxy, client, answer, fixed
):
    body = b'{"error":{"message":"busy","code":503}}'
    workers = [
        await start_worker(answer(fixed(body, status="503 Busy", headers="X-W: 1\r\n"))) for _ in range(2)
    ]
    proxy = await start_proxy([worker.url for worker in workers])
    status, headers, received = await ask(client, proxy)
    assert (status, received, headers["X-W"]) == (503, body, "1")
    await proxy.idle()


async def test_a_refused_stream_reaches_the_client_unchanged(
    start_worker, start_proxy, client, answer, chunked
):
    worker = await start_worker(answer(*chunked(b": ping\n\n" + REFUSED, DONE)))
    proxy = await start_proxy([worker.url])
    status, headers, body = await ask(client, proxy)
    assert (status, headers["Content-Type"], body) == (
        200,
        "text/event-stream",
        b": ping\n\n" + REFUSED + DONE,
    )
    await proxy.idle()


async def test_another_error_in_the_first_event_is_the_clients(
    start_worker, start_proxy, client, answer, chunked
):
    error = b'data: {"error":{"message":"bad rank","code":400}}\n\n'
    worker = await start_worker(answer(*chunked(error, DONE)))
    proxy = await start_proxy([worker.url])
    assert (await ask(client, proxy))[2] == error + DONE
    assert worker.connections == 1


async def broken_stream(client, proxy):
    """Return what a client sees of a stream that ends badly: the bytes, and how it noticed."""
    received = b""
    try:
        async with client.post(proxy.url + CHAT, json=ASK) as response:
            async for data in response.content.iter_any():
                received += data
    except aiohttp.ClientPayloadError:
        return received, "broken"
    return received, "clean"


@pytest.mark.parametrize("framing", ["chunked", "until close"])
async def test_a_stream_that_breaks_off_says_so_and_has_no_clean_end(
    framing, start_worker, start_proxy, client, reset, answer, chunked
):
    if framing == "chunked":
        script = reset(*chunked(CHUNK, CHUNK[:10], end=False))
    else:
        script = answer(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + CHUNK)
    worker = await start_worker(script)
    proxy = await start_proxy([worker.url])
    received, end = await broken_stream(client, proxy)
    assert end == "broken"
    assert received.startswith(CHUNK + b'data: {"error":{')
    event = orjson.loads(received[len(CHUNK) + 6 :])
    assert event["error"]["message"] == "The worker's response broke off before it was complete."
    assert worker.connections == 1, "nothing is sent twice"
    await proxy.idle()


@pytest.mark.parametrize("framing", ["chunked", "until close"])
async def test_an_event_that_waits_for_usage_is_not_lost_with_the_stream(
    framing, start_worker, start_proxy, client, reset, answer, chunked
):
    # What vLLM says of its fingerprint may come in the usage event, for which this one is held.
    finish = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    if framing == "chunked":
        script = reset(*chunked(CHUNK, finish, end=False))
    else:
        script = answer(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + CHUNK + finish)
    worker = await start_worker(script)
    proxy = await start_proxy([worker.url])
    received, end = await broken_stream(client, proxy)
    assert end == "broken"
    assert received.startswith(CHUNK + finish + b'data: {"error":{')
    await proxy.idle()


async def test_a_stream_until_close_with_done_is_complete(start_worker, start_proxy, client, answer):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    worker = await start_worker(answer(head + CHUNK + DONE))
    proxy = await start_proxy([worker.url])
    assert await broken_stream(client, proxy) == (CHUNK + DONE, "clean")


async def test_a_reply_that_breaks_off_has_no_clean_end(start_worker, start_proxy, client, answer):
    worker = await start_worker(answer(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}"))
    proxy = await start_proxy([worker.url])
    with pytest.raises(aiohttp.ClientPayloadError):
        await ask(client, proxy)
    await proxy.idle()


async def test_a_stalled_stream_is_ended(start_worker, start_proxy, client, silence, chunked):
    worker = await start_worker(silence(*chunked(CHUNK, end=False)))
    proxy = await start_proxy([worker.url], timeouts={"stall_s": 0.1})
    received, end = await broken_stream(client, proxy)
    assert end == "broken"
    assert b"The worker sent nothing for 0.1 s." in received
    await proxy.idle()


async def test_a_worker_that_never_answers_is_a_504(start_worker, start_proxy, client, silence):
    worker = await start_worker(silence())
    proxy = await start_proxy([worker.url], timeouts={"first_byte_s": 0.1})
    status, _, body = await ask(client, proxy)
    assert (status, orjson.loads(body)["error"]["type"]) == (504, "upstream_timeout")
    await asyncio.wait_for(worker.left.wait(), 60)
    await proxy.idle()


async def leave_after(client, proxy, moment, **more):
    """Send a request and leave when ``moment`` says so."""
    asked = asyncio.create_task(ask(client, proxy, **more))
    await moment()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked


@pytest.mark.parametrize("stream", [True, False])
async def test_leaving_before_the_first_token(stream, start_worker, start_proxy, client, silence, until):
    worker = await start_worker(silence())
    proxy = await start_proxy([worker.url])

    for _ in range(3):
        worker.requests.clear()
        worker.left.clear()
        await leave_after(client, proxy, lambda: until(lambda: worker.requests), stream=stream)
        await asyncio.wait_for(worker.left.wait(), 60)
        await proxy.idle()


async def test_leaving_in_mid_stream(start_worker, start_proxy, client, silence, chunked, until):
    worker = await start_worker(silence(*chunked(CHUNK, end=False)))
    proxy = await start_proxy([worker.url])

    for _ in range(3):
        worker.left.clear()
        streaming = lambda: any(proxy.ledger.active().output_tokens)  # noqa: E731
        await leave_after(client, proxy, lambda streaming=streaming: until(streaming))
        await asyncio.wait_for(worker.left.wait(), 60)
        await proxy.idle()


async def test_leaving_while_waiting_in_the_pool(start_worker, start_proxy, client, silence, until):
    worker = await start_worker(silence())
    proxy = await start_proxy([worker.url], worker={"slots": 1})
    first = asyncio.create_task(ask(client, proxy))
    await until(lambda: proxy.ledger.bound == 1)

    for _ in range(3):
        await leave_after(client, proxy, lambda: until(lambda: proxy.waiting == 1))
        await until(lambda: proxy.waiting == 0)
    assert len(worker.requests) == 1, "the others never reached the worker"
    first.cancel()
    await proxy.idle()


async def test_half_closing_counts_as_leaving(start_worker, start_proxy, silence, until, stack):
    worker = await start_worker(silence())
    proxy = await start_proxy([worker.url])
    _, writer = await asyncio.open_connection("127.0.0.1", proxy.running.port)
    stack.callback(writer.close)
    body = orjson.dumps(ASK)
    writer.write(
        b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(body), body)
    )
    await until(lambda: worker.requests)
    writer.write_eof()
    await asyncio.wait_for(worker.left.wait(), 60)
    await proxy.idle()


async def test_a_full_pool_is_a_429(start_worker, start_proxy, client, silence, until):
    worker = await start_worker(silence())
    limits = {"pool_requests_max": 1, "retry_after_s": 7}
    proxy = await start_proxy([worker.url], worker={"slots": 1}, limits=limits)
    others = [asyncio.create_task(ask(client, proxy)) for _ in range(2)]
    await until(lambda: (proxy.ledger.bound, proxy.waiting) == (1, 1))
    status, headers, body = await ask(client, proxy)
    assert (status, headers["Retry-After"]) == (429, "7")
    assert orjson.loads(body)["error"] == {
        "message": "Overloaded: 1 requests are waiting already, the most that the pool holds.",
        "type": "rate_limit_error",
        "param": None,
        "code": 429,
    }
    for other in others:
        other.cancel()
    await proxy.idle()


async def test_too_many_requests_in_the_proxy_is_a_429(start_worker, start_proxy, client, silence, until):
    worker = await start_worker(silence())
    proxy = await start_proxy([worker.url], limits={"requests_max": 1})
    other = asyncio.create_task(ask(client, proxy))
    await until(lambda: proxy.ledger.bound == 1)
    assert (await ask(client, proxy))[0] == 429
    other.cancel()
    await proxy.idle()


async def test_waiting_too_long_is_a_503(start_worker, start_proxy, client, silence, until):
    worker = await start_worker(silence())
    proxy = await start_proxy([worker.url], worker={"slots": 1}, limits={"pool_wait_s_max": 0.1})
    other = asyncio.create_task(ask(client, proxy))
    await until(lambda: proxy.ledger.bound == 1)
    status, headers, body = await ask(client, proxy)
    assert (status, headers["Retry-After"]) == (503, "1")
    assert "no worker had a free slot and KV room within 0.1 s" in orjson.loads(body)["error"]["message"]
    other.cancel()
    await proxy.idle()


async def test_a_prompt_that_never_fits_is_a_400(start_emulator, start_proxy, client):
    proxy = await start_proxy((await start_emulator(1)).urls, worker={"kv_capacity_tokens": 50})
    counted = {"model": "emulated", "prompt": [1] * 51, "max_tokens": 2}
    async with client.post(proxy.url + "/v1/completions", json=counted) as response:
        assert response.status == 400
        assert (await response.json())["error"]["type"] == "invalid_request_error"


async def test_a_guess_refuses_nothing(start_emulator, start_proxy, client):
    proxy = await start_proxy((await start_emulator(1)).urls, worker={"kv_capacity_tokens": 50})
    guessed = [{"role": "user", "content": "word " * 100}]
    status, _, body = await ask(client, proxy, messages=guessed, max_tokens=2)
    assert (status, body.endswith(DONE)) == (200, True)
    await proxy.idle()


async def test_a_client_that_stops_reading_does_not_hold_its_slot_for_ever(start_worker, start_proxy, stack):
    async def flood(writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        while True:
            writer.write(CHUNK * 1000)
            await writer.drain()

    worker = await start_worker(flood)
    proxy = await start_proxy([worker.url], timeouts={"stall_s": 0.2})
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.running.port, limit=1024)
    stack.callback(writer.close)
    body = orjson.dumps(ASK)
    writer.write(
        b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(body), body)
    )
    await reader.readexactly(10)
    await proxy.idle()
