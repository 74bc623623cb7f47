"""Requests of one session find the worker that has it, over real sockets."""

import pytest

AFFINITY = {"enabled": True, "block_tokens": 1}
REPLY = b'{"id":"resp_%d","usage":{"input_tokens":30,"output_tokens":20}}'


@pytest.fixture
def three(start_worker, fixed):
    """Return a function that starts workers which answer with ids of their own, as a stream or not."""

    async def start(stream=None):
        workers = []
        for number in range(3):

            async def script(writer, number=number):
                writer.write(stream(number) if stream else fixed(REPLY % number))
                return True

            workers.append(await start_worker(script))
        return workers

    return start


async def asks(client, proxy, path="/v1/chat/completions", headers=None, **document):
    async with client.post(
        proxy.url + path, json={"model": "m"} | document, headers=headers or {}
    ) as response:
        assert response.status == 200
        return await response.read()


def served(workers):
    return sorted(len(worker.requests) for worker in workers)


@pytest.mark.parametrize("named", ["header", "body"])
async def test_a_named_session_stays(named, three, start_proxy, client):
    workers = await three()
    proxy = await start_proxy([w.url for w in workers], affinity=AFFINITY)
    for _ in range(6):
        if named == "header":
            await asks(client, proxy, headers={"x-session-id": "a"}, prompt="x" * 400)
        else:
            await asks(client, proxy, session_id="a", prompt="x" * 400)
    assert served(workers) == [0, 0, 6]
    (worker,) = (w for w in workers if w.requests)
    _, headers, body = worker.requests[-1]
    # The engine is told as well.
    assert headers["x-session-id"] == "a" if named == "header" else b'"session_id"' in body
    async with client.get(proxy.url + "/metrics") as response:
        text = await response.text()
    assert 'brproxy_session_requests_total{group="default",went="home"} 5.0' in text
    assert 'brproxy_session_requests_total{group="default",went="new"} 1.0' in text


async def test_a_conversation_that_nobody_names_stays_where_that_is_asked_for(three, start_proxy, client):
    workers = await three()
    proxy = await start_proxy([w.url for w in workers], affinity=AFFINITY | {"by_messages": True})
    said = []
    for turn in range(5):
        said += [{"role": "user", "content": f"{turn}" * 400}]
        await asks(client, proxy, messages=said)
        said += [{"role": "assistant", "content": "yes"}]
    assert served(workers) == [0, 0, 5]


def created(chunked):
    def stream(number):
        first = b'data: {"type":"response.created","response":{"id":"resp_%d"}}\n\n' % number
        text = b'data: {"type":"response.output_text.delta","delta":"a"}\n\n'
        last = b'data: {"type":"response.completed","response":{"usage":{"input_tokens":9}}}\n\n'
        return b"".join(chunked(first, text, last))

    return stream


@pytest.mark.parametrize("streams", [False, True])
async def test_a_response_goes_on_where_the_last_one_was(streams, three, start_proxy, client, chunked):
    workers = await three(created(chunked) if streams else None)
    proxy = await start_proxy([w.url for w in workers], affinity=AFFINITY)
    before = {}
    for _ in range(5):
        await asks(client, proxy, "/v1/responses", input="x" * 40, stream=streams, **before)
        number = next(n for n, w in enumerate(workers) if w.requests)
        before = {"previous_response_id": f"resp_{number}"}
    assert served(workers) == [0, 0, 5]
    sessions = proxy.groups[0].dispatcher.sessions
    # The first names no session: nobody knows yet that others will go on from it.
    assert (sessions.new, sessions.hits, sessions.moved) == (0, 4, 0)


async def test_by_default_nothing_is_remembered(three, start_proxy, client):
    workers = await three()
    proxy = await start_proxy([w.url for w in workers])
    for _ in range(6):
        await asks(client, proxy, session_id="a", prompt="x" * 400)
    assert proxy.groups[0].dispatcher.sessions is None
    async with client.get(proxy.url + "/metrics") as response:
        assert "brproxy_session_requests_total{" not in await response.text()
