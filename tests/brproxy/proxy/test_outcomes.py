"""How requests end in the books, whoever ended them, over real sockets."""

import pytest

from brproxy.lifecycle import State
from tests.brproxy.proxy.test_semantics import ASK, CHAT, CHUNK, CHUNKED_STREAM, DONE, STREAM, chunks
from tests.brproxy.wire import get, post

BOTH_LOOPS = True
BEGUN = CHUNKED_STREAM + chunks(CHUNK, end=b"")
WHOLE = CHUNKED_STREAM + chunks(CHUNK, DONE)
UPGRADED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
UPGRADE = get("/v1/realtime", "Connection: Upgrade", "Upgrade: websocket")
REFUSAL = b"HTTP/1.1 503 Full\r\nContent-Length: 0\r\n\r\n"

# What the client sends, what the worker answers, whether it closes then, and how the request ends.
ENDINGS = {
    "whole": (post(CHAT, ASK), WHOLE, False, State.FINISHED),
    "whole, for a 1.0 client": (post(CHAT, ASK, version="1.0"), WHOLE, False, State.FINISHED),
    "whole, until the connection ends": (
        post(CHAT, ASK),
        STREAM + b"\r\n" + CHUNK + DONE,
        True,
        State.FINISHED,
    ),
    "broken off": (post(CHAT, ASK), BEGUN, True, State.FAILED),
    "broken off before it began": (post(CHAT, ASK), STREAM, True, State.FAILED),
    "silent": (post(CHAT, ASK), BEGUN, False, State.FAILED),
    "refused": (post(CHAT, ASK), REFUSAL, False, State.FAILED),
    "a tunnel that the worker closes": (UPGRADE, UPGRADED + b"bye", True, State.FINISHED),
}


def outcomes(proxy):
    return dict(proxy.running.service.metrics.groups["default"].outcomes)


@pytest.mark.parametrize(("request_bytes", "answer", "closes", "state"), ENDINGS.values(), ids=ENDINGS)
async def test_a_request_ends_as_what_happened(
    request_bytes, answer, closes, state, raw_worker, answering, start_proxy, raw
):
    worker = await raw_worker(answering(answer, close=closes))
    timeouts = {"stall_s": 0.1} if answer == BEGUN and not closes else {}
    proxy = await start_proxy([worker.url], limits={"retries_max": 0}, timeouts=timeouts)
    client = await raw(proxy)
    client.send(request_bytes)
    await client.reader.read(1)
    await proxy.idle()
    assert outcomes(proxy) == {state: 1}


@pytest.mark.parametrize(
    ("request_bytes", "answer"), [(post(CHAT, ASK), BEGUN), (post(CHAT, ASK), b""), (UPGRADE, UPGRADED)]
)
async def test_a_client_that_leaves_has_cancelled(
    request_bytes, answer, raw_worker, answering, start_proxy, raw, until
):
    worker = await raw_worker(answering(answer))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(request_bytes)
    if answer:
        await client.reader.read(1)
    else:
        await until(lambda: worker.requests)
    client.writer.close()
    await proxy.idle()
    assert outcomes(proxy) == {State.CANCELLED: 1}
