"""Requests in two legs that ask about their prompt: the answer has what only the prefill worker knows."""

import asyncio
import json

import pytest

ASK = {"text": "a b", "return_logprob": True, "logprob_start_len": 0}
OF_PROMPT = [[None, 5, None], [-1.25, 7, None]]
EVENTS = 3


class Sglang:
    """A worker of either kind: it tells of the prompt if it prefills, and is let to answer."""

    def __init__(self, fixed, chunked, *, prefills):
        self.fixed, self.chunked = fixed, chunked
        self.prefills = prefills
        self.worker = None
        self.asked = []
        self.begins = asyncio.Event()
        self.begins.set()
        self.status = "200 OK"
        self.dies_after = None
        self.ends_short = False
        self.has_length = False
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    def answer(self, number, of_prompt):
        lists = {"input_token_logprobs": of_prompt, "output_token_logprobs": [[-1.0, 1, None]] * number}
        finish = {"type": "length"} if number == EVENTS else None
        counts = {"prompt_tokens": 2, "completion_tokens": number}
        return {"text": "x" * number, "meta_info": {"id": "r", "finish_reason": finish, **counts, **lists}}

    async def __call__(self, writer):
        asked = json.loads(self.worker.requests[-1][2])
        self.asked.append(asked)
        await self.begins.wait()
        of_prompt = OF_PROMPT if self.prefills and asked.get("return_logprob") else []
        if asked.get("stream"):
            events = [self.answer(number, of_prompt) for number in range(1, EVENTS + 1)]
            parts = [b"data: %b\n\n" % json.dumps(event).encode() for event in events] + [b"data: [DONE]\n\n"]
            if self.ends_short:
                parts = [*parts[:-2], parts[-2].rstrip()]
            if self.has_length:
                writer.write(self.fixed(b"".join(parts), content_type="text/event-stream"))
                await writer.drain()
                return True
            for part in self.chunked(*parts[: self.dies_after], end=self.dies_after is None):
                writer.write(part)
                await writer.drain()
                if b"data: " in part:
                    await self.goes_on.wait()
            return self.dies_after is None
        body = self.answer(EVENTS, of_prompt)
        count = len(asked["text"]) if isinstance(asked["text"], list) else None
        whole = body if count is None else [body] * count
        writer.write(self.fixed(json.dumps(whole).encode(), status=self.status))
        await writer.drain()
        return True


@pytest.fixture
def start(start_worker, start_proxy, fixed, chunked):
    async def start(prefills=1, **tables):
        sides = [Sglang(fixed, chunked, prefills=i < prefills) for i in range(prefills + 1)]
        workers = []
        for side in sides:
            side.worker = await start_worker(side)
            role = "prefill" if side.prefills else "decode"
            common = {"engine": "sglang", "transfer": "sglang", "slots": 8}
            workers.append(common | {"url": side.worker.url, "role": role})
        return await start_proxy([], workers=workers, **tables), *sides

    return start


async def ask(client, proxy, **more):
    async with client.post(proxy.url + "/generate", json=ASK | more) as response:
        body = await response.read()
        return response.status, body


def told(status, body, *, stream):
    """Return the lists of the prompt in each event, or in the reply."""
    assert status == 200, body
    if not stream:
        return [json.loads(body)["meta_info"]["input_token_logprobs"]]
    *events, done = [event.removeprefix(b"data: ") for event in body.split(b"\n\n")[:-1]]
    assert done == b"[DONE]"
    return [json.loads(event)["meta_info"]["input_token_logprobs"] for event in events]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("first", ["prefill", "decode"])
async def test_the_answer_has_it_whoever_answers_first(start, client, until, settled, stream, first):
    proxy, prefill, decode = await start()
    late = decode if first == "prefill" else prefill
    late.begins.clear()
    asking = asyncio.create_task(ask(client, proxy, stream=stream))
    await until(lambda: late.asked)
    assert not await settled(asking.done)
    late.begins.set()
    status, body = await asking
    assert told(status, body, stream=stream) == [OF_PROMPT] * (EVENTS if stream else 1)
    assert len(prefill.asked) == len(decode.asked) == 1
    await proxy.idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_it_is_there_also_where_streams_may_go_on_elsewhere(start, client, stream):
    proxy, *_ = await start(limits={"failovers_max": 2}, timeouts={"keepalive_comments_s": 3600})
    status, body = await ask(client, proxy, stream=stream)
    assert told(status, body, stream=stream) == [OF_PROMPT] * (EVENTS if stream else 1)
    await proxy.idle()


async def test_each_of_several_prompts_has_its_own(start, client):
    proxy, *_ = await start()
    status, body = await ask(client, proxy, text=["a", "b"])
    assert status == 200
    assert [each["meta_info"]["input_token_logprobs"] for each in json.loads(body)] == [OF_PROMPT] * 2
    await proxy.idle()


@pytest.mark.parametrize("more", [{"return_logprob": False}, {"logprob_start_len": -1}])
async def test_who_does_not_ask_waits_for_nothing(start, client, more):
    proxy, prefill, _ = await start()
    prefill.begins.clear()
    status, body = await ask(client, proxy, **more)
    assert told(status, body, stream=False) == [[]]
    await proxy.idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_where_the_prefill_fails_two_others_do_it(start, client, until, stream):
    proxy, one, other, decode = await start(prefills=2)
    one.status = other.status = "500 Internal Server Error"
    for side in (one, other):
        side.begins.clear()
    asking = asyncio.create_task(ask(client, proxy, stream=stream))
    await until(lambda: decode.asked and (one.asked or other.asked))
    failing, well = (one, other) if one.asked else (other, one)
    well.status = "200 OK"
    well.begins.set()
    failing.begins.set()
    status, body = await asking
    assert told(status, body, stream=stream) == [OF_PROMPT] * (EVENTS if stream else 1)
    assert len(decode.asked) == 2
    await proxy.idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prefill_that_never_answers_ends_by_its_time_out(start, client, stream):
    proxy, prefill, _ = await start(timeouts={"first_byte_s": 0.3, "stall_s": 0.3})
    prefill.begins.clear()
    status, _ = await ask(client, proxy, stream=stream)
    assert status in {502, 504}
    await proxy.idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_meanwhile_leaves_nothing(start, client, until, settled, stream):
    proxy, prefill, decode = await start()
    prefill.begins.clear()
    asking = asyncio.create_task(ask(client, proxy, stream=stream))
    await until(lambda: decode.asked and prefill.asked)
    await settled(asking.done)
    asking.cancel()
    await proxy.idle()
    await asyncio.wait_for(prefill.worker.left.wait(), 60)


async def test_a_last_event_without_its_blank_line_has_it_too(start, client):
    proxy, _, decode = await start()
    decode.ends_short = True
    status, body = await ask(client, proxy, stream=True)
    assert told(status, body.rstrip() + b"\n\ndata: [DONE]\n\n", stream=True) == [OF_PROMPT] * EVENTS
    await proxy.idle()


async def test_what_comes_after_the_prefill_comes_through(start, client, until, settled):
    proxy, prefill, decode = await start()
    prefill.begins.clear()
    decode.goes_on.clear()
    asking = asyncio.create_task(ask(client, proxy, stream=True))
    await until(lambda: decode.asked and prefill.asked)
    await settled(asking.done)
    prefill.begins.set()
    await settled(asking.done)
    decode.goes_on.set()
    assert told(*await asking, stream=True) == [OF_PROMPT] * EVENTS
    await proxy.idle()


async def test_no_length_is_promised_and_no_coding_asked_for(start, client):
    proxy, _, decode = await start()
    decode.has_length = True
    status, body = await ask(client, proxy, stream=True)
    assert told(status, body, stream=True) == [OF_PROMPT] * EVENTS
    assert decode.worker.requests[-1][1]["accept-encoding"] == "identity"
    await proxy.idle()


async def test_a_stream_that_breaks_off_is_seen_to(start, client, until):
    proxy, prefill, decode = await start()
    decode.dies_after = 2
    prefill.begins.clear()
    asking = asyncio.create_task(ask(client, proxy, stream=True))
    await until(lambda: decode.asked)
    prefill.begins.set()
    await asyncio.wait((asking,))
    assert asking.exception() is not None or asking.result()[0] >= 500
    await proxy.idle()
