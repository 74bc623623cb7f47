"""The proxy's own errors in the words of the API that the client speaks, streaming and not."""

import orjson
import pytest

from tests.brproxy.proxy.test_semantics import CHUNKED_STREAM, STREAM, fixed
from tests.brproxy.wire import WireError, as_chunk, post

ASK = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"x"}],"input":"x","max_tokens":5}'
BEGUN = b'event: message_start\ndata: {"type":"message_start"}\n\n'
BROKE = "The worker's response broke off before it was complete."


@pytest.mark.parametrize(
    ("path", "event"),
    [
        ("/v1/messages", b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":'),
        ("/v1/responses", b'event: error\ndata: {"type":"error","code":"502","message":'),
        ("/v1/chat/completions", b'data: {"error":{"message":'),
        ("/generate", b'data: {"error":{"message":'),
    ],
)
@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_stream_that_breaks_says_so_in_the_words_of_its_path(
    path, event, version, raw_worker, answering, start_proxy, raw
):
    worker = await raw_worker(answering(CHUNKED_STREAM + as_chunk(BEGUN), close=True))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(post(path, ASK, version=version))
    try:
        body = (await client.answer()).body
    except WireError as error:
        body = error.answer.body
    assert body.startswith(BEGUN + event)
    assert BROKE in body.decode()
    await proxy.idle()


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("/v1/messages", ("type", "error")),
        ("/v1/chat/completions", ("error", None)),
        ("/v1/responses", ("error", None)),
    ],
)
async def test_an_answer_of_the_proxy_s_own_speaks_the_words_of_its_path(
    path, where, start_proxy, raw, unused_tcp_port
):
    proxy = await start_proxy([f"http://127.0.0.1:{unused_tcp_port}"])
    client = await raw(proxy)
    client.send(post(path, ASK))
    answer = await client.answer()
    document = orjson.loads(answer.body)
    assert (answer.status, answer.one(b"Content-Type")) == (502, b"application/json")
    assert document["error"]["message"].startswith("No worker took the request")
    assert where[0] in document
    assert where[1] is None or document[where[0]] == where[1]


DEAD = (
    b'{"error":{"message":"EngineCore encountered an issue. See stack trace (above) for the root cause.",'
    b'"type":"InternalServerError","param":null,"code":500}}'
)


@pytest.mark.parametrize("how", ["status", "event"])
async def test_a_dead_engine_s_last_words_move_the_request(how, raw_worker, answering, start_proxy, raw):
    last_words = (
        fixed(DEAD, b"Content-Type: application/json", status=b"500 Internal Server Error")
        if how == "status"
        else CHUNKED_STREAM
        + as_chunk(b"data: " + DEAD + b"\n\n")
        + as_chunk(b"data: [DONE]\n\n")
        + b"0\r\n\r\n"
    )
    served = STREAM + b"Content-Length: 14\r\n\r\ndata: [DONE]\n\n"
    workers = [await raw_worker(answering(last_words)), await raw_worker(answering(served))]
    proxy = await start_proxy([worker.url for worker in workers], routing={"policy": "round-robin"})
    client = await raw(proxy)
    client.send(post("/v1/chat/completions", ASK))
    answer = await client.answer()
    assert (answer.status, answer.body) == (200, b"data: [DONE]\n\n")
    assert [len(worker.requests) for worker in workers] == [1, 1]
    await proxy.idle()


@pytest.mark.parametrize("how", ["status", "event"])
async def test_a_dead_engine_s_last_words_are_the_answer_where_nobody_else_is(
    how, raw_worker, answering, start_proxy, raw
):
    event = b"data: " + DEAD + b"\n\n"
    answers = {
        "status": fixed(DEAD, b"Content-Type: application/json", status=b"500 Internal Server Error"),
        "event": CHUNKED_STREAM + as_chunk(event) + b"0\r\n\r\n",
    }
    worker = await raw_worker(answering(answers[how]))
    proxy = await start_proxy([worker.url])
    client = await raw(proxy)
    client.send(post("/v1/chat/completions", ASK))
    answer = await client.answer()
    assert (answer.status, answer.body) == ((500, DEAD) if how == "status" else (200, event))
    await proxy.idle()


async def test_any_other_500_is_the_client_s(raw_worker, answering, start_proxy, raw):
    other = b'{"error":{"message":"out of luck","type":"InternalServerError","code":500}}'
    workers = [
        await raw_worker(answering(fixed(other, b"Content-Type: application/json", status=b"500 No")))
        for _ in range(2)
    ]
    proxy = await start_proxy([worker.url for worker in workers])
    client = await raw(proxy)
    client.send(post("/v1/chat/completions", ASK))
    answer = await client.answer()
    assert (answer.status, answer.body) == (500, other)
    assert sum(len(worker.requests) for worker in workers) == 1


@pytest.fixture
async def two_groups(raw_worker, start_proxy):
    async def script(worker, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        worker.requests.append(head)
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        await reader.readexactly(length)
        writer.write(fixed(b"{}"))
        await reader.read()

    workers = [await raw_worker(script) for _ in range(2)]
    tables = [
        {"url": worker.url, "group": name, "model": name} for worker, name in zip(workers, "ab", strict=True)
    ]
    return await start_proxy([], workers=tables), workers


@pytest.mark.parametrize("file_bytes", [10, 3 << 20, 5 << 20])
async def test_the_model_behind_a_file_finds_its_group(file_bytes, two_groups, raw):
    proxy, workers = two_groups
    body = (
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="model"\r\n\r\n'
        + bytes(file_bytes)
        + b'\r\n--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nb\r\n--B--\r\n'
    )
    client = await raw(proxy)
    client.send(post("/v1/audio/transcriptions", body, media_type="multipart/form-data; boundary=B"))
    assert (await client.answer()).status == 200
    assert [len(worker.requests) for worker in workers] == [0, 1]
    await proxy.idle()


@pytest.mark.parametrize(
    "body", [b"\xef\xbb\xbf" + ASK.replace(b'"m"', b'"b"'), b'{"model":"b","x":NaN,"y":"\\ud800"}']
)
async def test_what_engines_take_for_json_finds_its_group(body, two_groups, raw):
    proxy, workers = two_groups
    client = await raw(proxy)
    client.send(post("/v1/chat/completions", body))
    assert (await client.answer()).status == 200
    assert [len(worker.requests) for worker in workers] == [0, 1]


@pytest.mark.parametrize("body", [b"{", b"[1]", b'{"model":}'])
async def test_what_is_no_json_is_told_so_where_several_groups_are(body, two_groups, raw):
    proxy, workers = two_groups
    client = await raw(proxy)
    client.send(post("/v1/chat/completions", body))
    answer = await client.answer()
    assert (answer.status, "JSON" in answer.body.decode()) == (400, True)
    assert [len(worker.requests) for worker in workers] == [0, 0]
