"""Decode workers of vllm-ascend that run out of room: requests that they give up are prefilled again."""

import json

import pytest

from tests.brproxy.proxy.test_going_on import ASK, WORDS, Engine, sse, text

TRANSFERS = ["ascend", "ascend-layerwise"]
TOKENS = 6
NEVER_ENOUGH = {"decode_settings": {"recomputed_share": 1.0}}
SOMETIMES = {"decode_settings": {"recomputed_share": 0.5}}
CHATS = {"path": "/v1/chat/completions", "messages": [{"role": "user", "content": "one two three"}]}


def documents(body):
    events = [event for event in body.split(b"\n\n") if event.startswith(b"data: ")]
    return [json.loads(event[6:]) for event in events if event != b"data: [DONE]"]


def is_told(body):
    """Tell whether a client has been told what only the proxy should know."""
    return b'recomputed"' in body


@pytest.mark.parametrize("transfer", TRANSFERS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_completion_goes_on(start_pair, transfer, stream):
    pair = await start_pair(transfer, **SOMETIMES)
    more = {"stream_options": {"include_usage": True}} if stream else {}
    for _ in range(12):
        status, body = await pair.ask(stream=stream, max_tokens=TOKENS, **more)
        assert status == 200
        assert not is_told(body)
        found = documents(body) if stream else [json.loads(body)]
        text = "".join(choice["text"] for document in found for choice in document["choices"])
        assert len(text.split()) == TOKENS
        assert found[-1]["usage"] == {"prompt_tokens": 5, "total_tokens": 11, "completion_tokens": TOKENS}
        reasons = [choice["finish_reason"] for document in found for choice in document["choices"]]
        assert [reason for reason in reasons if reason] == ["length"]
        assert len({document["id"] for document in found}) == 1
    assert pair.counts["split"] == 12 + pair.counts["recomputed"] > 12
    await pair.proxy.idle()


@pytest.mark.parametrize("transfer", TRANSFERS)
async def test_a_stream_of_a_chat_ends_with_an_error(start_pair, transfer):
    pair = await start_pair(transfer, **NEVER_ENOUGH)
    received = await pair.broken(**CHATS, max_tokens=TOKENS, stream=True)
    assert documents(received)[-1]["error"]["code"] == 503
    await pair.proxy.idle()


@pytest.mark.parametrize("transfer", TRANSFERS)
async def test_a_reply_to_a_chat_is_generated_from_the_beginning(start_pair, transfer):
    pair = await start_pair(transfer, **SOMETIMES)
    for _ in range(8):
        status, body = await pair.ask(**CHATS, max_tokens=TOKENS)
        assert status == 200
        (choice,) = json.loads(body)["choices"]
        assert choice["message"]["content"] == " 1 2 3 4 5 6"
        assert choice["finish_reason"] == "length"
    assert pair.counts["split"] > 8
    await pair.proxy.idle()


@pytest.mark.parametrize("document", [{}, CHATS])
async def test_it_is_prefilled_again_only_so_often(start_pair, document):
    pair = await start_pair("ascend", prefill_decode={"recomputed_max": 2}, **NEVER_ENOUGH)
    status, body = await pair.ask(**document, max_tokens=50)
    assert (status, json.loads(body)["error"]["code"]) == (503, 503)
    assert pair.counts["split"] == 3
    await pair.proxy.idle()


HANDLES = {"do_remote_prefill": True, "remote_block_ids": [1], "remote_engine_id": "e"}
GIVEN_UP = {"index": 0, "text": "", "finish_reason": "stop", "stop_reason": "recomputed"}


class GivesUp(Engine):
    """A decode worker that gives a request up after so many events, which it counts at the end alone."""

    after = None

    def events(self, asked, request_id):
        left, self.after = self.after, None
        events = super().events(asked, request_id)
        if left is None:
            yield from events
            return
        for _ in range(left):
            yield next(events)
        yield sse({"id": "cmpl-x", "choices": [GIVEN_UP]})
        usage = {"prompt_tokens": 1, "completion_tokens": left, "total_tokens": 1 + left}
        yield sse({"id": "cmpl-x", "choices": [], "usage": usage})
        yield sse(b"[DONE]")


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("after", [0, 1, 5])
async def test_a_stream_reads_as_if_nothing_had_happened(
    start_worker, start_proxy, client, fixed, after, running
):
    async def prefill(writer):
        writer.write(fixed(json.dumps({"choices": [], "kv_transfer_params": HANDLES}).encode()))
        return True

    prefiller, engine = await start_worker(prefill), GivesUp(start_worker)
    engine.after, engine.running_usage = after, running
    common = {"transfer": "ascend", "slots": 8}
    workers = [common | {"url": prefiller.url, "role": "prefill"}]
    workers += [common | {"url": (await engine.start()).url, "role": "decode"}]
    proxy = await start_proxy([], workers=workers)
    async with client.post(proxy.url + "/v1/completions", json=ASK) as response:
        received = await response.read()
        assert "X-Brproxy-Failover" not in response.headers
    assert received.endswith(b"data: [DONE]\n\n")
    assert not is_told(received)
    assert text(documents(received)) == "".join(WORDS)
    prompts = [json.loads(body)["prompt"] for _, _, body in prefiller.requests]
    assert prompts == [asked["prompt"] for asked in engine.asked] == ["go", "go" + "".join(WORDS[:after])]
    assert engine.asked[1]["max_tokens"] == 6 - after
    await proxy.idle()
