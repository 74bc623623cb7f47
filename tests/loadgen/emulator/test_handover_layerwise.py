"""Decode first, which has its prefill begun by a metaserver (ascend-layerwise), driven by hand."""

import asyncio
from contextlib import asynccontextmanager

import orjson
import pytest
from aiohttp import web

PARAMS = {"do_remote_decode": False, "do_remote_prefill": True}
IDS = {"X-Request-Id": "one"}


@pytest.fixture
def metaserver(stack):
    """Start a metaserver of ours: ``serve`` gets what a decode worker posts and returns a status."""

    @asynccontextmanager
    async def running(serve):
        async def handler(request):
            return web.json_response({"status": "ok"}, status=await serve(orjson.loads(await request.read())))

        app = web.Application()
        app.router.add_post("/v1/metaserver", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1/metaserver"
        finally:
            await runner.cleanup()

    return lambda serve: stack.enter_async_context(running(serve))


@pytest.mark.parametrize("chat", [False, True])
async def test_a_prefill_sends_its_kv_to_the_decode(chat, start_legs, metaserver):
    legs = await start_legs("ascend-layerwise")
    posts = []

    async def prefill(post):
        posts.append(post)
        status, reply = await legs.ask(
            legs.prefill.urls[0], headers=IDS, chat=chat, kv_transfer_params=post, max_tokens=1
        )
        assert "kv_transfer_params" not in reply
        return status

    params = PARAMS | {"metaserver": await metaserver(prefill)}
    status, reply = await legs.ask(
        legs.decode.urls[1], headers=IDS, chat=chat, kv_transfer_params=params, max_tokens=3
    )
    assert (status, reply["usage"]["completion_tokens"]) == (200, 3)
    (post,) = posts
    assert post["request_id"] == ("chatcmpl-one" if chat else "cmpl-one-0")
    assert (post["do_remote_decode"], post["remote_cached_tokens"]) == (True, 0)
    assert f"http://{post['remote_host']}:{post['remote_port']}" == legs.decode.urls[1]
    assert legs.prefill.deployment.prefill_tokens_total == [20]
    assert legs.decode.deployment.prefill_tokens_total == [0, 0]
    assert await legs.held() == (0, 0)
    assert (await legs.handover())["fetched_requests"] == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_metaserver_that_knows_nothing(stream, start_legs, metaserver):
    legs = await start_legs("ascend-layerwise")

    async def unknown(_post):
        return 404

    params = PARAMS | {"metaserver": await metaserver(unknown)}
    _, error = await legs.error(legs.decode.urls[0], stream=stream, kv_transfer_params=params)
    assert (error["code"], "the metaserver failed: status 404" in error["message"]) == (500, True)
    assert legs.decode.deployment.cluster.kv_used_tokens.sum() == 0


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/v1/metaserver", "nonsense", None])
async def test_a_metaserver_that_is_not_there(url, start_legs):
    legs = await start_legs("ascend-layerwise")
    params = PARAMS | {"metaserver": url}
    status, error = await legs.error(legs.decode.urls[0], kv_transfer_params=params)
    assert (status, "the metaserver failed" in error["message"]) == (500, True)


async def test_a_prefill_that_never_comes(start_legs, metaserver):
    legs = await start_legs("ascend-layerwise", lease_s=5.0)

    async def forgets(_post):
        return 200

    params = PARAMS | {"metaserver": await metaserver(forgets)}
    status, error = await legs.error(legs.decode.urls[0], kv_transfer_params=params)
    assert (status, error["message"]) == (500, "no KV came in time")


async def test_a_decode_that_left_before_its_kv_came(start_legs, metaserver, until):
    legs = await start_legs("ascend-layerwise")
    posts, go = [], asyncio.Event()

    async def wait(post):
        posts.append(post)
        await go.wait()
        return 200

    params = PARAMS | {"metaserver": await metaserver(wait)}
    asked = asyncio.create_task(legs.ask(legs.decode.urls[0], headers=IDS, kv_transfer_params=params))
    await until(lambda: posts)
    asked.cancel()
    await until(lambda: not legs.decode.deployment.cluster.loading)
    status, error = await legs.error(
        legs.prefill.urls[0], headers=IDS, kv_transfer_params=posts[0], max_tokens=1
    )
    assert (status, "the decode worker answered 404" in error["message"]) == (500, True)
    assert await legs.held() == (0, 0)
    go.set()


async def test_a_prefill_that_is_not_told_where_to(start_legs):
    legs = await start_legs("ascend-layerwise")
    params = {"do_remote_decode": True}
    status, error = await legs.error(legs.prefill.urls[0], kv_transfer_params=params, max_tokens=1)
    assert (status, "remote_host must be a text" in error["message"]) == (500, True)
