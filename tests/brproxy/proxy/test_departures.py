"""Workers that go out or away while requests are with them, over real sockets."""

import asyncio

import pytest

from brproxy.relay.endpoint import Endpoint
from brproxy.relay.errors import WorkerFailedError
from tests.brproxy.proxy.test_semantics import ASK, CHAT, CHUNK, CHUNKED_STREAM, DONE, chunks, fixed
from tests.brproxy.wire import WireError, as_chunk, post

BOTH_LOOPS = True
IN_TURN = {"routing": {"policy": "round-robin"}}


class Switch:
    """A worker that answers checks while it is on, and requests with what it is told to, or nothing."""

    def __init__(self, *answer):
        self.is_on = True
        self.answer = answer
        self.has_request = asyncio.Event()

    async def __call__(self, worker, reader, writer):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET /health"):
                if not self.is_on:
                    await asyncio.Event().wait()
                writer.write(fixed(b"ok"))
                continue
            worker.requests.append(head)
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            self.has_request.set()
            for piece in self.answer:
                writer.write(piece)


@pytest.fixture
def start(raw_worker, start_proxy):
    async def start(*switches, ejected_share_max=1.0, **tables):
        workers = [await raw_worker(switch) for switch in switches]
        checks = {"interval_s": 0.05, "timeout_s": 0.2, "unhealthy_after": 2}
        checks["ejected_share_max"] = ejected_share_max
        proxy = await start_proxy(
            [worker.url for worker in workers], health=True, health_table=checks, **IN_TURN | tables
        )
        return proxy, workers

    return start


async def test_what_a_worker_that_goes_out_has_not_answered_moves(start, raw):
    hung, other = Switch(), Switch(CHUNKED_STREAM + chunks(CHUNK, DONE))
    proxy, workers = await start(hung, other)
    client = await raw(proxy)
    client.send(post(CHAT, ASK))
    await hung.has_request.wait()
    hung.is_on = False
    assert (await client.answer()).body == CHUNK + DONE
    assert [len(worker.requests) for worker in workers] == [1, 1]
    await proxy.idle()


async def test_what_a_worker_has_that_is_out_only_as_others_come_back_moves(start, raw, until):
    answer = CHUNKED_STREAM + chunks(CHUNK, DONE)
    hung, other, third = Switch(), Switch(answer), Switch(answer)
    proxy, workers = await start(hung, other, third, ejected_share_max=0.5)
    roster = proxy.groups[0].roster
    hung.is_on = other.is_on = False
    # With two of three unhealthy all may be chosen.
    await until(lambda: [member.is_routable for member in roster.members] == [False, False, True])
    clients = [await raw(proxy) for _ in workers]
    for client in clients:
        client.send(post(CHAT, ASK))
    await hung.has_request.wait()
    other.is_on = True
    for client in clients:
        assert (await client.answer()).body == CHUNK + DONE
    assert sum(len(worker.requests) for worker in workers) == 4
    await proxy.idle()


@pytest.mark.parametrize("others", [0, 1])
async def test_who_goes_out_while_it_is_connected_to_gets_nothing_if_another_can(
    others, start, raw, until, monkeypatch
):
    answer = CHUNKED_STREAM + chunks(CHUNK, DONE)
    switches = [Switch(answer) for _ in range(1 + others)]
    # Each request connects.
    proxy, workers = await start(*switches, limits={"idle_connections_max": 0})
    roster, connect, gate = proxy.groups[0].roster, Endpoint.connect, asyncio.Event()

    async def late(endpoint):
        if endpoint.origin == workers[0].url:
            await gate.wait()
        return await connect(endpoint)

    await until(lambda: all(roster.routable()))
    monkeypatch.setattr(Endpoint, "connect", late)
    asking = []
    for _ in range(1 + others):
        asking.append(await raw(proxy))
        asking[-1].send(post(CHAT, ASK))
    await until(lambda: proxy.ledger.requests[0])
    roster.accuse(roster.members[0], "it was told so", 0.0)
    gate.set()
    for client in asking:
        assert (await client.answer()).body == CHUNK + DONE
    assert [len(worker.requests) for worker in workers] == ([0, 2] if others else [1])
    await proxy.idle()


async def test_the_only_worker_s_request_waits_for_it_to_return(start, raw, until):
    hung = Switch()
    proxy, workers = await start(hung)
    client = await raw(proxy)
    client.send(post(CHAT, ASK))
    await hung.has_request.wait()
    hung.is_on = False
    await until(lambda: proxy.waiting == 1)
    hung.answer = (CHUNKED_STREAM + chunks(CHUNK, DONE),)
    hung.is_on = True
    assert (await client.answer()).body == CHUNK + DONE
    assert len(workers[0].requests) == 2
    await proxy.idle()


async def test_what_does_not_generate_is_not_sent_twice(start, raw):
    hung, other = Switch(), Switch(fixed(b"{}"))
    proxy, workers = await start(hung, other)
    client = await raw(proxy)
    while not workers[0].requests:
        client.send(post("/reset_prefix_cache", ASK))
        if not hung.has_request.is_set():
            await asyncio.sleep(0.05)
        if not hung.has_request.is_set():
            assert (await client.answer()).status == 200
    hung.is_on = False
    answer = await client.answer()
    assert (answer.status, b"unhealthy" in answer.body) == (502, True)
    await proxy.idle()


async def test_a_stream_that_has_begun_stays_with_a_worker_that_goes_out(start, raw, until):
    slow = Switch(CHUNKED_STREAM + as_chunk(CHUNK))
    proxy, _ = await start(slow, Switch())
    client = await raw(proxy)
    client.send(post(CHAT, ASK))
    while CHUNK not in client.received:
        client.received += await client.reader.read(1 << 16)
    slow.is_on = False
    await until(lambda: not all(proxy.groups[0].roster.routable()))
    assert sum(proxy.ledger.requests) == 1
    client.writer.close()
    await proxy.idle()


@pytest.mark.parametrize("begun", [True, False])
async def test_a_worker_that_refuses_and_is_silent_is_gone(begun, start, raw, monkeypatch):
    dead = Switch(CHUNKED_STREAM + as_chunk(CHUNK)) if begun else Switch()
    # Checks that take long: by them alone it would be a while.
    proxy, workers = await start(dead, timeouts={"gone_s": 0.3, "keepalive_s": 1.0})
    endpoint = proxy.running.service.groups["default"].endpoint(0)
    client = await raw(proxy)
    client.send(post(CHAT, ASK))
    await dead.has_request.wait()
    if begun:
        while CHUNK not in client.received:
            client.received += await client.reader.read(1 << 16)

    async def refuse():
        raise WorkerFailedError("refused", unreachable=True, refused=True)

    monkeypatch.setattr(endpoint, "connect", refuse)
    if begun:
        with pytest.raises(WireError) as caught:
            await client.answer()
        assert b"broke off before it was complete" in caught.value.answer.body
    else:
        while proxy.waiting == 0:
            await asyncio.sleep(0.01)
        client.writer.close()
    await proxy.idle()
    assert len(workers[0].requests) == 1


async def test_a_worker_that_refuses_but_streams_is_not(start, raw, until, monkeypatch):
    busy = Switch(CHUNKED_STREAM + as_chunk(CHUNK))
    proxy, _ = await start(busy, timeouts={"gone_s": 0.3, "keepalive_s": 1.0})
    member = proxy.groups[0].roster.member(0)
    client = await raw(proxy)
    client.send(post(CHAT, ASK))
    while CHUNK not in client.received:
        client.received += await client.reader.read(1 << 16)

    async def refuse():
        raise WorkerFailedError("refused", unreachable=True, refused=True)

    endpoint = proxy.running.service.groups["default"].endpoint(0)
    monkeypatch.setattr(endpoint, "connect", refuse)
    await until(lambda: member.refuses_since_s is not None)
    monkeypatch.undo()
    await until(lambda: member.refuses_since_s is None)
    assert sum(proxy.ledger.requests) == 1
    client.writer.close()
    await proxy.idle()
