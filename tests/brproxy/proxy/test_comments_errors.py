"""Errors that come after comments: they are events of the stream, in the words of whoever failed."""

import orjson
import pytest

from brproxy.proxy.commented import COMMENT
from tests.brproxy.proxy.test_semantics import ASK, CHAT, DONE, fixed
from tests.brproxy.proxy.waiting_clients import BY_HAND, JSON, OFTEN, SERVED, Script, broken
from tests.brproxy.wire import post

BOTH_LOOPS = True


ERRORS = {
    "/v1/chat/completions": b"",
    "/generate": b"",
    "/v1/messages": b"event: error\n",
    "/v1/responses": b"event: error\n",
}


@pytest.mark.parametrize(("path", "line"), ERRORS.items(), ids=ERRORS)
@pytest.mark.parametrize("status", [b"400 Bad Request", b"500 Oops", b"503 Busy"])
async def test_an_error_of_the_worker_is_an_error_event(status, path, line, start_commented, raw, commented):
    script = Script(fixed(b'{"error":{"message":"no such thing"}}', JSON, status=status))
    proxy, _ = await start_commented(script, **BY_HAND)
    client = await raw(proxy)
    client.send(post(path, ASK))
    await script.asked.wait()
    commented[0]._comment()
    script.go_on.set()
    answer = await broken(client)
    assert answer.status == 200
    assert answer.body == COMMENT + line + b'data: {"error":{"message":"no such thing"}}\n\n'
    await proxy.idle()


@pytest.mark.parametrize(("path", "line"), ERRORS.items(), ids=ERRORS)
async def test_an_error_of_the_proxy_is_an_error_event(path, line, start_commented, raw):
    script = Script(SERVED)
    proxy, _ = await start_commented(
        script,
        worker={"slots": 1},
        routing={"policy": "br-0"},
        limits={"pool_wait_s_max": 0.3},
        timeouts=OFTEN["timeouts"],
    )
    first, second = await raw(proxy), await raw(proxy)
    first.send(post(CHAT, ASK))
    await script.asked.wait()
    second.send(post(path, ASK))
    answer = await broken(second)
    *waiting, event = answer.body.split(COMMENT)
    assert waiting
    assert not b"".join(waiting)
    assert event.startswith(line + b"data: ")
    assert b"no worker had a free slot and KV room within 0.3 s" in event
    script.go_on.set()
    assert (await first.answer()).body.endswith(DONE)
    await proxy.idle()


async def test_the_words_of_an_error_are_those_of_the_worker(start_commented, raw, commented):
    """A reply that is no error and no stream is told as what it is: one event, and no clean end."""
    script = Script(fixed(b'{"text":"x"}', JSON))
    proxy, _ = await start_commented(script, **BY_HAND)
    client = await raw(proxy)
    client.send(post("/v1/messages", ASK))
    await script.asked.wait()
    commented[0]._comment()
    script.go_on.set()
    answer = await broken(client)
    assert orjson.loads(answer.body.removeprefix(COMMENT + b"data: ")) == {"text": "x"}
    await proxy.idle()
