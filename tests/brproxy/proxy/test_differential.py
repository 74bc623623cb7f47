"""A few hundred exchanges with and without the proxy; differential.py is the command that runs many."""

import asyncio

from tests.brproxy.proxy.differential import differ
from tests.brproxy.wire import post

BOTH_LOOPS = True


async def test_a_client_sees_the_same_through_the_proxy():
    # What is rare: a stream that ends without a blank line, and an upload that is passed on as it comes.
    _, failures = await differ([91, 781, *range(140, 340)])
    assert not failures


async def test_a_broken_stream_looks_complete_in_no_framing():
    # An error event within a Content-Length; the same for HTTP/1.0; a first event that breaks off unframed.
    _, failures = await differ([134, 239, 2368])
    assert not failures


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
