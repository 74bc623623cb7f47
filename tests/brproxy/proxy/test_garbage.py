"""A request that has been served is gone at once: nothing of it waits for the garbage collector."""

import gc

import pytest

from tests.brproxy.proxy.test_semantics import ASK, CHAT, CHUNK, CHUNKED_STREAM, DONE, chunks, fixed
from tests.brproxy.wire import post

REQUESTS = 8
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
ANSWERS = {
    "reply": fixed(b'{"usage":{"prompt_tokens":3,"completion_tokens":2}}', b"Content-Type: application/json"),
    "stream": CHUNKED_STREAM + chunks(CHUNK, CHUNK, USAGE, DONE),
    "error": fixed(b"no", status=b"400 Bad Request"),
}


@pytest.fixture
def _no_collector():
    gc.disable()
    yield
    gc.enable()


def what_only_the_collector_frees():
    """Return the types of ours that it would find now."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    types = {type(item) for item in gc.garbage}
    gc.garbage.clear()
    return {kind.__name__ for kind in types if kind.__module__.startswith("brproxy.")}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.usefixtures("_no_collector")
async def test_a_request_leaves_nothing_to_collect(raw_worker, answering, start_proxy, raw, answer):
    worker = await raw_worker(answering(*[answer] * (REQUESTS + 1)))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    for request in range(REQUESTS + 1):
        if request == 1:
            # The first opens the connection, which leaves things of its own.
            gc.collect()
        client.send(post(CHAT, ASK))
        await client.answer()
        await proxy.idle()
    assert what_only_the_collector_frees() == set()
