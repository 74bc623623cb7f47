"""Limits of a request's head, and of what comes behind an answer, through the whole proxy."""

import random

import orjson
import pytest

from brproxy.relay.server import ClientProtocol
from tests.brproxy.wire import get, post

BOTH_LOOPS = True
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
ASK = b'{"model":"m","messages":[]}'
LIMITS = [None, 16, *(random.Random(seed).randrange(17, 600) for seed in range(3))]


@pytest.mark.parametrize("most", LIMITS)
async def test_as_many_fields_as_are_allowed_and_no_more(most, raw_worker, answering, start_proxy, raw):
    worker = await raw_worker(answering(OK))
    proxy = await start_proxy([worker.url], limits={"header_fields_max": most} if most else {})
    most = most or 128
    # One of them is Host.
    lines = [random.Random(most).choice(["X-A: 1", "x-a: 2", "Cookie: c", f"X-{k}: "]) for k in range(most)]
    for count, status in [(most - 1, 200), (most, 431)]:
        client = await raw(proxy)
        client.send(get("/v1/files", *lines[:count]))
        answer = await client.answer()
        assert answer.status == status
    message = orjson.loads(answer.body)["error"]["message"]
    assert message == f"The request has more than {most} header fields, the most that this proxy accepts."
    assert await client.ended()
    assert len(worker.requests) == 1
    await proxy.idle()


@pytest.mark.parametrize("where", ["target", "value", "name"])
async def test_what_is_too_long_is_431_as_well(where, raw_worker, answering, start_proxy, raw):
    worker = await raw_worker(answering(OK))
    proxy = await start_proxy([worker.url], limits={"header_bytes_max": 2048})
    for size, status in [(1900, 200), (2100, 431)]:
        name, value, target = "X", "v", "/v1/files?"
        if where == "name":
            name += "n" * size
        elif where == "value":
            value *= size
        else:
            target += "t" * size
        client = await raw(proxy)
        client.send(get(target, f"{name}: {value}"))
        answer = await client.answer()
        assert answer.status == status
    assert "is longer than 2048 bytes" in orjson.loads(answer.body)["error"]["message"]
    assert len(worker.requests) == 1


async def test_the_rest_of_a_request_is_waited_for_as_long_as_is_configured(
    raw_worker, answering, start_proxy, raw, transports
):
    worker = await raw_worker(answering(OK))
    proxy = await start_proxy(
        [worker.url], timeouts={"client_linger_s": 0.05}, limits={"body_bytes_max": 1024}
    )
    client = await raw(proxy)
    client.send(post("/v1/chat/completions", ASK * 100)[:500])
    assert (await client.answer()).status == 413
    (transport,) = transports[ClientProtocol]
    assert transport.get_protocol()._lingering_time == 0.05
    assert await client.ended()
