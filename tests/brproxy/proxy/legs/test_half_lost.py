"""Where one half of a request is lost, the worker that decodes does it all: what the client gets is whole."""

import asyncio
import json

import pytest

from brproxy.proxy.legs import held

PARAMS = {"do_remote_prefill": True, "remote_block_ids": [1, 2], "remote_engine_id": "p", "remote_port": 1}
TEXT = "one two"
FAILURE = {"message": "Internal server error", "type": "InternalServerError", "code": 500}


def whole(document, status="200 OK"):
    body = json.dumps(document).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def stream(*documents):
    events = b"".join(b"data: %b\n\n" % json.dumps(document).encode() for document in documents)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    return head + events + b"data: [DONE]\n\n"


def choices(text):
    return {"choices": [{"index": 0, "text": text, "finish_reason": "length"}]}


PREFILLED = whole(choices("o") | {"kv_transfer_params": PARAMS})


def asked(body):
    return json.loads(body).get("kv_transfer_params")


@pytest.fixture
def start_decoder(start_worker):
    """Return a function that starts a worker that decodes; it fails ``failures`` times."""

    async def start(failures, *, names_status=True, always=False):
        async def script(writer):
            body = worker.requests[-1][2]
            is_stream = json.loads(body).get("stream", False)
            if json.loads(body)["max_tokens"] == 1:
                answer = whole(choices("freed"))
            elif len(worker.requests) <= failures and (asked(body) or always):
                failed = {"error": FAILURE}
                answer = whole(failed, "500 Internal Server Error") if names_status else stream(failed)
            else:
                answer = stream(choices(TEXT)) if is_stream else whole(choices(TEXT))
            writer.write(answer)
            await writer.drain()
            return False

        worker = await start_worker(script)
        return worker

    return start


@pytest.fixture
def start_halves(start_proxy, client):
    """Return a function that starts a proxy before workers; it returns that, and how a client asks it."""

    async def start(prefills, decodes, more=(), **tables):
        workers = [*more]
        workers += [{"url": url, "role": "prefill"} for url in prefills]
        workers += [{"url": url, "role": "decode"} for url in decodes]
        proxy = await start_proxy([], workers=workers, **tables)

        async def ask(**more):
            body = {"model": "m", "prompt": "a", "max_tokens": 9} | more
            async with client.post(proxy.url + "/v1/completions", json=body) as response:
                return response.status, await response.read()

        return proxy, ask

    return start


def handover(proxy):
    return proxy.running.service.groups["default"].handover


def counts(proxy):
    return handover(proxy).counts


@pytest.mark.parametrize("names_status", [True, False])
async def test_what_cannot_be_fetched_is_prefilled_where_it_is_decoded(
    names_status, start_worker, start_decoder, start_halves, answer
):
    prefill = await start_worker(answer(PREFILLED))
    decode = await start_decoder(1, names_status=names_status)
    proxy, ask = await start_halves([prefill.url], [decode.url])
    status, body = await ask(stream=not names_status)
    assert status == 200
    assert TEXT.encode() in body
    assert b"error" not in body
    await proxy.idle()
    own = [body for _, _, body in decode.requests if json.loads(body)["max_tokens"] == 9]
    assert [asked(body) for body in own] == [PARAMS, None], "at once, from the same worker, without handles"
    assert counts(proxy)["unfetched"] == counts(proxy)["stranded"] == 1
    assert len(prefill.requests) == 1


@pytest.mark.parametrize("names_status", [True, False])
async def test_an_error_that_stays_is_the_answer(
    names_status, start_worker, start_decoder, start_halves, answer
):
    prefill = await start_worker(answer(PREFILLED))
    decode = await start_decoder(99, names_status=names_status, always=True)
    proxy, ask = await start_halves([prefill.url], [decode.url])
    status, body = await ask(stream=not names_status)
    assert status == (500 if names_status else 200)
    assert b"Internal server error" in body
    await proxy.idle()
    assert len([None for _, _, body in decode.requests if json.loads(body)["max_tokens"] == 9]) == 2


async def test_without_a_worker_that_can_be_reached_who_decodes_prefills(
    start_decoder, start_halves, unused_tcp_port
):
    decode = await start_decoder(0)
    proxy, ask = await start_halves([f"http://127.0.0.1:{unused_tcp_port}"], [decode.url])
    status, body = await ask(kv_transfer_params={"mine": 1})
    assert (status, json.loads(body)) == (200, choices(TEXT))
    assert [asked(body) for _, _, body in decode.requests] == [None]
    assert (counts(proxy)["split"], counts(proxy)["alone"]) == (0, 1)
    await proxy.idle()


async def test_one_worker_that_dies_of_a_prefill_leaves_it_to_who_decodes(
    start_worker, start_decoder, start_halves, answer
):
    prefill, decode = await start_worker(answer()), await start_decoder(0)
    proxy, ask = await start_halves([prefill.url], [decode.url])
    status, body = await ask()
    assert (status, json.loads(body)) == (200, choices(TEXT))
    assert len(prefill.requests) == 1
    await proxy.idle()


async def test_what_two_workers_may_have_died_of_reaches_no_third(
    start_worker, start_decoder, start_halves, answer
):
    prefills = [await start_worker(answer()) for _ in range(2)]
    decode = await start_decoder(0)
    proxy, ask = await start_halves([worker.url for worker in prefills], [decode.url])
    status, _ = await ask()
    assert status == 502
    assert [len(worker.requests) for worker in prefills] == [1, 1]
    assert not decode.requests
    await proxy.idle()


@pytest.mark.parametrize("is_prefilled", [True, False])
async def test_what_a_worker_of_either_leg_may_have_died_of_reaches_no_third(
    is_prefilled, start_worker, start_halves, answer
):
    prefills = [await start_worker(answer(*part)) for part in [(), (PREFILLED,)][: 1 + is_prefilled]]
    decodes = [await start_worker(answer()) for _ in range(2)]
    proxy, ask = await start_halves(*([one.url for one in side] for side in (prefills, decodes)))
    asked = 0
    while not prefills[0].requests:
        # Which of two that have nothing to do prefills is chance.
        status, _ = await ask()
        assert status == 502
        asked += 1
    await proxy.idle()
    runs = [body for one in decodes for _, _, body in one.requests if json.loads(body)["max_tokens"] == 9]
    assert len(runs) + len(prefills[0].requests) == 2 * asked


async def test_a_client_that_leaves_while_its_worker_fails_leaves_nothing(
    start_worker, start_decoder, start_halves, answer, until
):
    prefill, decode = await start_worker(answer(PREFILLED)), await start_decoder(1)
    proxy, ask = await start_halves([prefill.url], [decode.url])
    asking = asyncio.create_task(ask())
    await until(lambda: decode.requests)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await proxy.idle()


async def test_whose_client_leaves_its_decode_worker_silent_has_its_prefill_freed(
    start_worker, start_halves, answer, until
):
    async def script(writer):
        if json.loads(decode.requests[-1][2])["max_tokens"] == 1:
            writer.write(whole(choices("freed")))
            await writer.drain()
            return False
        await asyncio.Event().wait()
        return False

    prefill, decode = await start_worker(answer(PREFILLED)), await start_worker(script)
    proxy, ask = await start_halves([prefill.url], [decode.url])
    asking = asyncio.create_task(ask())
    await until(lambda: decode.requests)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await proxy.idle()
    assert len(decode.requests) == 2


@pytest.mark.parametrize("names_status", [True, False])
async def test_what_nobody_decodes_is_freed_however_that_is_said(
    names_status, start_worker, start_halves, answer
):
    full = {"error": {"message": "full", "code": 503}}

    async def script(writer):
        if json.loads(decode.requests[-1][2])["max_tokens"] == 1:
            writer.write(whole(choices("freed")))
        else:
            writer.write(whole(full, "503 Service Unavailable") if names_status else stream(full))
        await writer.drain()
        return False

    prefill, decode = await start_worker(answer(PREFILLED)), await start_worker(script)
    proxy, ask = await start_halves([prefill.url], [decode.url])
    status, body = await ask(stream=True)
    assert (status, b"full" in body) == (503 if names_status else 200, True)
    await proxy.idle()
    legs = [json.loads(body)["max_tokens"] == 1 for _, _, body in decode.requests]
    assert legs.count(True) == 1
    assert legs[-1]


async def test_who_waits_for_a_prefill_that_nobody_will_do_goes_on_without(
    start_worker, start_decoder, start_halves, silence, until
):
    prefill, decode = await start_worker(silence()), await start_decoder(0)
    worker = {"url": prefill.url, "role": "prefill", "slots": 1}
    proxy, ask = await start_halves([], [decode.url], more=[worker])
    side = handover(proxy).group.group
    asking = [asyncio.create_task(ask()) for _ in range(3)]
    await until(lambda: len(side.dispatcher.waiting) == 2)
    side.drain(side.roster.members[0].key)
    await until(lambda: sum(task.done() for task in asking) == 2)
    assert {(await task)[0] for task in asking if task.done()} == {200}
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await proxy.idle()


async def test_who_has_asked_for_a_prefill_has_had_the_request_however_soon_it_dies(
    start_worker, start_halves, answer, client, unused_tcp_port
):
    """A kept connection that closes at once was closed before; but not where a post came meanwhile."""
    came = []

    async def script(writer):
        came.append(writer)
        params = asked(decode.requests[-1][2])
        if len(came) == 1:
            writer.write(whole(choices(TEXT)))
            await writer.drain()
            return True
        post = {"request_id": "chatcmpl-1", "do_remote_decode": True, "remote_engine_id": "d"}
        post |= {"remote_host": "d", "remote_port": 9, "remote_block_ids": [[1]]}
        async with client.post(params["metaserver"], json=post) as response:
            assert response.status == 200
        return False

    prefill, decode = await start_worker(answer(whole(choices("o")))), await start_worker(script)
    common = {"transfer": "ascend-layerwise"}
    workers = [
        common | {"url": each.url, "role": role} for each, role in ((prefill, "prefill"), (decode, "decode"))
    ]
    proxy, ask = await start_halves([], [], workers, listen={"port": unused_tcp_port})
    assert (await ask())[0] == 200
    assert (await ask())[0] == 502
    assert len(came) == 2
    await proxy.idle()


async def test_a_reply_in_one_piece_does_not_keep_its_prefill_booked(
    start_worker, start_halves, answer, silence, until, monkeypatch
):
    monkeypatch.setattr(held, "FETCHED_S", 0.01)
    prefill, decode = await start_worker(answer(PREFILLED)), await start_worker(silence())
    proxy, ask = await start_halves([prefill.url], [decode.url])
    asking = asyncio.create_task(ask())
    await until(lambda: decode.requests)
    await until(lambda: not any(handover(proxy).group.group.dispatcher.ledger.kv_tokens))
    assert not asking.done()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await proxy.idle()
