"""What workers are told of clients, over real sockets."""

import pytest

from tests.brproxy.wire import get, post

CHAT = "/v1/chat/completions"
ASK = b'{"model":"m","messages":[]}'
ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nVia: 1.1 engine\r\nContent-Length: 2\r\n\r\n{}"
)


def told(head):
    """Return what a worker's request says of hops, by lower-case name."""
    fields = [line.partition(b": ") for line in head.split(b"\r\n")[1:] if line]
    return [
        (name.lower(), value)
        for name, _, value in fields
        if name.lower().startswith((b"x-forwarded", b"forwarded", b"via"))
    ]


async def test_each_request_of_a_connection_is_told_of(raw_worker, answering, start_proxy, raw):
    worker = await raw_worker(answering(*[ANSWER] * 4))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    own = [(b"x-forwarded-for", b"127.0.0.1"), (b"x-forwarded-proto", b"http"), (b"via", b"1.1 brproxy")]
    before = (
        "x-forwarded-for: 10.0.0.9",
        "Via: 1.1 a",
        "X-FORWARDED-FOR: 10.0.0.8",
        "X-Forwarded-Proto: https",
    )
    behind = [
        (b"x-forwarded-for", b"10.0.0.9,10.0.0.8, 127.0.0.1"),
        (b"x-forwarded-proto", b"https"),
        (b"via", b"1.1 a, 1.1 brproxy"),
    ]
    for request, expected in [
        (post(CHAT, ASK), own),
        (post(CHAT, ASK, *before), behind),
        (get("/v1/files"), own),
        (get("/v1/files", "Connection: keep-alive", version="1.0"), [*own[:2], (b"via", b"1.0 brproxy")]),
    ]:
        client.send(request)
        answer = await client.answer()
        assert told(worker.requests[-1]) == expected
        assert answer.all(b"via") == [b"1.1 engine"], "what a client gets is the worker's"
    await proxy.idle()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"x_forwarded": "off", "via": False},
            [(b"x-forwarded-for", b"6.6.6.6"), (b"forwarded", b"for=6.6.6.6")],
        ),
        (
            {"x_forwarded": "replace", "via": False},
            [(b"x-forwarded-for", b"127.0.0.1"), (b"x-forwarded-proto", b"http")],
        ),
    ],
)
async def test_as_configured(settings, expected, raw_worker, answering, start_proxy, raw):
    worker = await raw_worker(answering(ANSWER))
    proxy = await start_proxy([worker.url], forwarding=settings)
    client = await raw(proxy)
    client.send(post(CHAT, ASK, "X-Forwarded-For: 6.6.6.6", "Forwarded: for=6.6.6.6"))
    assert (await client.answer()).status == 200
    assert told(worker.requests[-1]) == expected


async def test_two_proxies_in_a_row(raw_worker, answering, start_proxy, raw):
    worker = await raw_worker(answering(ANSWER))
    inner = await start_proxy([worker.url])
    outer = await start_proxy([inner.url])
    client = await raw(outer)
    client.send(post(CHAT, ASK))
    assert (await client.answer()).status == 200
    assert dict(told(worker.requests[-1])) == {
        b"x-forwarded-for": b"127.0.0.1, 127.0.0.1",
        b"x-forwarded-proto": b"http",
        b"via": b"1.1 brproxy, 1.1 brproxy",
    }
