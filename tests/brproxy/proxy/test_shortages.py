"""The proxy's own shortage is nobody else's fault: an error means the same wherever somebody connects."""

import asyncio
import errno
import os

import pytest

from brproxy.proxy.asking import Verdict, probe
from brproxy.relay.endpoint import OUR_OWN
from tests.brproxy.wire import get, post

THEIRS = {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNRESET, errno.EACCES}
ASK = b'{"model":"m","prompt":"x"}'


@pytest.fixture
def failing(monkeypatch):
    """Return a function that has a proxy's endpoints fail to connect with a number of the system's errors."""

    def make(proxy, number):
        tried = []

        async def create_connection(*_, **__):
            tried.append(number)
            raise OSError(number, os.strerror(number))

        class Loop:
            time = staticmethod(asyncio.get_running_loop().time)

        Loop.create_connection = staticmethod(create_connection)
        for endpoint in proxy.running.service.groups["default"].endpoints:
            endpoint.close_idle()
            monkeypatch.setattr(endpoint, "_loop", Loop)
        return tried

    return make


@pytest.mark.parametrize("number", sorted(OUR_OWN | THEIRS), ids=lambda number: errno.errorcode[number])
async def test_an_error_means_the_same_wherever_somebody_connects(
    number, start_worker, start_proxy, raw, answer, fixed, failing, until
):
    ours = number in OUR_OWN
    workers = [await start_worker(answer(fixed(b"{}"))) for _ in range(2)]
    # Checks come all the time, so that three in a row would have taken a worker out long before the end.
    limits = {"pool_wait_s_max": 0.1}
    health = {"interval_s": 0.001, "unhealthy_after": 3}
    proxy = await start_proxy([w.url for w in workers], health=True, health_table=health, limits=limits)
    (group,) = proxy.groups
    await until(lambda: all(member.is_routable for member in group.roster.members))
    tried = failing(proxy, number)
    client = await raw(proxy)

    client.send(post("/v1/completions", ASK))
    told = await client.answer()
    # With both workers taken out a request may have to wait for one, and in vain.
    assert told.status == 503 if ours else told.status in {502, 503}
    if ours:
        assert os.strerror(number).encode() in told.body
        assert told.one(b"retry-after") == b"1"
        client.send(get("/v1/models"))
        told = await client.answer()
        assert (told.status, told.one(b"retry-after")) == (503, b"1")
    for endpoint in proxy.running.service.groups["default"].endpoints:
        result = await probe(endpoint, "/health", 5.0)
        assert result.verdict is (Verdict.NOT_ASKED if ours else Verdict.FAILED)
    seen = len(tried)
    await until(lambda: len(tried) > seen + 20)
    assert [member.is_routable for member in group.roster.members] == [ours] * 2
    await proxy.idle()
