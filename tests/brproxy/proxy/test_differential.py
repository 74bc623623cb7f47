"""A few hundred exchanges with and without the proxy; differential.py is the command that runs many."""

import asyncio

import pytest

from tests.brproxy.proxy.differential import differ
from tests.brproxy.wire import post

BOTH_LOOPS = True
BROKEN = {
    134: "an error event fills up the Content-Length of a stream that broke: it looks complete",
    239: "the same, to a HTTP/1.0 client",
    2368: "a stream without framing that breaks in its first event is a 500, since it is retried in DECODE",
}


async def test_a_client_sees_the_same_through_the_proxy():
    _, failures = await differ(seed for seed in range(200) if seed not in BROKEN)
    assert not failures


@pytest.mark.parametrize("seed", [pytest.param(s, marks=pytest.mark.xfail(reason=BROKEN[s])) for s in BROKEN])
async def test_what_is_known_to_differ(seed):
    _, failures = await differ([seed])
    assert not failures


@pytest.mark.xfail(reason="chunks are looked for, and their framing taken off, where the worker uses none")
async def test_what_looks_like_a_chunk_in_a_body_without_chunks_is_its_body(raw_worker, start_proxy, raw):
    event = b'data: {"choices":[{"index":0,"delta":{"content":" x"}}]}\n\n'
    sends = [event, b": x\r\n\r\n", b"%x\r\n%b\r\n" % (len(event), event), b"data: [DONE]\n\n"]

    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for send in sends:
            writer.write(send)
            await asyncio.sleep(0.01)

    worker = await raw_worker(script)
    client = await raw(await start_proxy([worker.url]))
    client.send(post("/v1/chat/completions", b'{"stream":true}'))
    assert (await client.answer()).body == b"".join(sends)
