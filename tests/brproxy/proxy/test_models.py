"""The list of models: asked for once for many clients, kept for some seconds, labelled as it is."""

import asyncio
import gzip
import zlib

import orjson
import pytest

from brproxy.proxy.errors import ProxyError
from brproxy.proxy.models import ASKED_AT_ONCE_MAX, KEPT_MAX, ModelLimits, ModelList
from brproxy.relay.endpoint import Endpoint, EndpointSettings
from brproxy.relay.errors import ShortageError
from tests.brproxy.wire import get

BOTH_LOOPS = True
MODELS = "/v1/models"
SETTINGS = EndpointSettings(connect_s=5.0, keepalive_s=4.0, idle_max=8, head_bytes_max=4096)
LIMIT_S = 30.0


def listing(*names):
    return orjson.dumps({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})


def ids(body):
    return [entry["id"] for entry in orjson.loads(body)["data"]]


@pytest.fixture
def models_of(stack):
    """Return a function that makes the list of some workers' models."""

    def make(*workers, **limits):
        endpoints = [Endpoint(worker.url, SETTINGS) for worker in workers]
        for endpoint in endpoints:
            stack.callback(endpoint.close)
        defaults = {"timeout_s": LIMIT_S, "bytes_max": 1 << 16, "kept_s": 100.0, "retry_after_s": 1}
        models = ModelList(
            lambda: [(endpoint, MODELS) for endpoint in endpoints], ModelLimits(**(defaults | limits))
        )
        stack.push_async_callback(models.close)
        return models

    return make


async def test_one_answer_for_all_who_ask_alike(start_worker, models_of, answer, fixed):
    worker = await start_worker(answer(fixed(listing("m"))))
    models = models_of(worker)
    asked = [models.answer([(b"User-Agent", b"%d" % number)]) for number in range(50)]
    answers = [*await asyncio.gather(*asked), await models.answer([(b"X-Request-Id", b"r")])]
    assert {ids(answer.body)[0] for answer in answers} == {"m"}
    assert len(worker.requests) == 1
    assert "user-agent" not in worker.requests[0][1], "what is not in the key is not passed on"


async def test_who_asks_makes_a_difference(start_worker, models_of, fixed):
    async def by_key(writer):
        key = worker.requests[-1][1]["authorization"]
        if key == "Bearer none":
            writer.write(
                fixed(b'{"error":"no"}', status="401 Unauthorized", headers="WWW-Authenticate: B\r\n")
            )
        else:
            writer.write(fixed(listing(key.removeprefix("Bearer "))))
        return False

    worker = await start_worker(by_key)
    models = models_of(worker)
    for _ in range(2):
        for name in ("a", "b", "none"):
            answer = await models.answer([(b"authorization", b"Bearer " + name.encode())])
            if name == "none":
                assert (answer.status, answer.body) == (401, b'{"error":"no"}')
                assert answer.fields == (("Content-Type", "application/json"), ("WWW-Authenticate", "B"))
            else:
                assert ids(answer.body) == [name]
    assert len(worker.requests) == 4, "an error is not kept"


async def test_an_answer_is_kept_for_its_time_and_not_longer(start_worker, models_of, answer, fixed):
    worker = await start_worker(answer(fixed(listing("m"))))
    models = models_of(worker, kept_s=0.0)
    for _ in range(3):
        await models.answer([])
    assert len(worker.requests) == 3
    worker = await start_worker(answer(fixed(listing("m"))))
    models = models_of(worker, kept_s=100.0)
    for _ in range(2):
        await models.answer([])
    assert len(worker.requests) == 1
    ((key, (until_s, kept)),) = models._kept.items()
    models._kept[key] = (until_s - 100.0, kept)
    await models.answer([])
    assert len(worker.requests) == 2


async def test_what_is_kept_is_bounded(start_worker, models_of, answer, fixed):
    large = listing("x" * 1000)
    worker = await start_worker(answer(fixed(large)))
    models = models_of(worker, bytes_max=1500)
    for number in range(KEPT_MAX + 10):
        await models.answer([(b"Authorization", b"%d" % number)])
        assert sum(len(kept.body) for _, kept in models._kept.values()) <= 4 * 1500
    models = models_of(await start_worker(answer(fixed(listing()))))
    for number in range(KEPT_MAX + 10):
        await models.answer([(b"Authorization", b"%d" % number)])
    assert len(models._kept) == KEPT_MAX


async def test_a_worker_that_hangs_delays_nobody_beyond_its_limit(
    start_worker, models_of, silence, answer, fixed
):
    hung = await start_worker(silence())
    good = await start_worker(answer(fixed(listing("m"))))
    answer = await asyncio.wait_for(models_of(hung, good, timeout_s=0.2).answer([]), LIMIT_S)
    assert ids(answer.body) == ["m"]


async def test_clients_that_ask_differently_are_bounded_and_leave_alone(
    start_worker, models_of, silence, until
):
    hung = await start_worker(silence())
    models = models_of(hung)
    asking = [
        asyncio.create_task(models.answer([(b"Authorization", b"%d" % number)]))
        for number in range(ASKED_AT_ONCE_MAX)
    ]
    await until(lambda: len(models._asking) == ASKED_AT_ONCE_MAX)
    with pytest.raises(ProxyError, match="64 clients ask for models already") as caught:
        await models.answer([(b"Authorization", b"one more")])
    assert (caught.value.status, caught.value.retry_after_s) == (429, 1)
    asking[0].cancel()
    await asyncio.wait(asking[:1])
    assert len(models._asking) == ASKED_AT_ONCE_MAX, "somebody else may wait for the same"
    await models.close()
    await asyncio.wait(asking)


async def test_an_origin_is_asked_once(start_worker, models_of, answer, fixed):
    worker = await start_worker(answer(fixed(listing("m"))))
    assert ids((await models_of(worker, worker).answer([])).body) == ["m"]
    assert len(worker.requests) == 1


async def test_the_first_that_has_a_model_tells_of_it(start_worker, models_of, answer, fixed):
    first = await start_worker(answer(fixed(b'{"data":[{"id":"a","by":1}]}', headers="Vary: Origin\r\n")))
    second = await start_worker(answer(fixed(b'{"data":[{"id":"a","by":2},{"id":"b","n":12345678901}]}')))
    union = await models_of(first, second).answer([])
    assert union.body == b'{"object":"list","data":[{"id":"a","by":1},{"id":"b","n":12345678901}]}'
    assert union.fields == (("Content-Type", "application/json"), ("Vary", "Origin"))


DEEP = b'{"data":[{"id":"a","x":' + b"[" * 300 + b"]" * 300 + b"}]}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"data":1}',
        b'{"data":[1]}',
        b'{"data":[{}]}',
        b'{"data":[{"id":[]}]}',
        DEEP,
    ],
)
async def test_what_is_no_list_is_passed_as_it_is(body, start_worker, models_of, answer, fixed):
    worker = await start_worker(answer(fixed(body, content_type="x/y")))
    told = await models_of(worker).answer([])
    assert (told.status, told.body, told.fields) == (200, body, (("Content-Type", "x/y"),))
    other = await start_worker(answer(fixed(listing("m"))))
    assert ids((await models_of(worker, other).answer([])).body) == ["m"]


@pytest.mark.parametrize(
    ("coding", "encode"), [("gzip", gzip.compress), ("X-GZIP", gzip.compress), ("deflate", zlib.compress)]
)
async def test_an_encoded_list_is_decoded(coding, encode, start_worker, start_proxy, client, answer, fixed):
    body = encode(listing("m"))
    worker = await start_worker(answer(fixed(body, headers=f"Content-Encoding: {coding}\r\n")))
    proxy = await start_proxy([worker.url])
    asked = {"Accept-Encoding": "gzip"}
    async with client.get(proxy.url + MODELS, headers=asked) as response:
        assert "Content-Encoding" not in response.headers
        assert ids(await response.read()) == ["m"]
    assert worker.requests[0][1]["accept-encoding"] == "identity", "the client's is for what the proxy sends"


async def test_what_cannot_be_decoded_keeps_its_label(start_worker, start_proxy, client, answer, fixed):
    bomb = gzip.compress(bytes(1 << 20))
    for body, coding in ((b"\x1f\x8b not gzip", "gzip"), (b"?", "br"), (bomb, "gzip"), (bomb[:-9], "gzip")):
        worker = await start_worker(answer(fixed(body, headers=f"Content-Encoding: {coding}\r\n")))
        proxy = await start_proxy([worker.url], limits={"control_bytes_max": 1 << 16})
        async with client.get(proxy.url + MODELS) as response:
            assert (response.headers["Content-Encoding"], await response.read()) == (coding, body)


async def test_a_list_that_is_too_long_is_no_answer(start_worker, start_proxy, client, answer, fixed):
    worker = await start_worker(answer(fixed(listing("x" * 2000))))
    proxy = await start_proxy([worker.url], limits={"control_bytes_max": 2000})
    async with client.get(proxy.url + MODELS) as response:
        assert response.status == 502


async def test_a_shortage_of_the_proxys_own_is_told_as_one(models_of, start_worker, silence, monkeypatch):
    async def fail(_):
        raise ShortageError("cannot connect: Too many open files")

    models = models_of(await start_worker(silence()))
    monkeypatch.setattr(Endpoint, "connect", fail)
    with pytest.raises(ProxyError) as caught:
        await models.answer([])
    assert (caught.value.status, caught.value.retry_after_s) == (503, 1)


async def test_cross_origin_fields_are_the_workers(start_worker, start_proxy, raw, fixed):
    async def script(writer):
        origin = worker.requests[-1][1].get("origin")
        about = f"Access-Control-Allow-Origin: {origin}\r\nVary: Origin\r\n" if origin else ""
        writer.write(fixed(listing("m"), headers=about + "X-Other: x\r\n"))
        return False

    worker = await start_worker(script)
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    for origin in (None, "http://page", "http://other"):
        client.send(get(MODELS, *([f"Origin: {origin}"] if origin else [])))
        told = await client.answer()
        allowed = told.one(b"access-control-allow-origin")
        assert (allowed or b"").decode() == (origin or "")
        assert told.one(b"vary") == (b"Origin" if origin else None)
        assert told.one(b"x-other") is None
