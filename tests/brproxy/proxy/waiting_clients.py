"""Clients that wait for a stream and get comments meanwhile, and workers that follow a script."""

import asyncio

from brproxy.proxy.commented import COMMENT
from tests.brproxy.proxy.test_semantics import CHUNK, CHUNKED_STREAM, DONE, chunks
from tests.brproxy.wire import WireError

IN_TURN = {"routing": {"policy": "round-robin"}}
SERVED = CHUNKED_STREAM + chunks(CHUNK, DONE)
OFTEN = {"timeouts": {"keepalive_comments_s": 0.02}}
# Nobody sees one that comes by itself: they are said by hand.
BY_HAND = {"timeouts": {"keepalive_comments_s": 3600}}
REFUSED = b'data: {"error":{"message":"full","type":"Service Unavailable","code":503}}\n\n'
JSON = b"Content-Type: application/json"


class Script:
    """A worker that answers each request, once ``go_on`` is set, by the next of ``answers``."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = asyncio.Event()
        self.go_on = asyncio.Event()

    async def __call__(self, worker, reader, writer):
        while True:
            await worker.read_request(reader)
            self.asked.set()
            await self.go_on.wait()
            answer = self.answers.pop(0)
            if answer is None:
                return
            writer.write(answer)


async def comments(client, count=1):
    """Wait until so many comments have come."""
    while client.received.count(COMMENT) < count:
        data = await client.reader.read(1 << 16)
        assert data, f"the connection ended behind {client.received!r}"
        client.received += data


async def broken(client):
    """Return what a client has had of an answer that has no clean end."""
    try:
        return await client.answer()
    except WireError as error:
        return error.answer
