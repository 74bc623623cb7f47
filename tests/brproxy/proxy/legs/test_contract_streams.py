"""What holds for each transfer whatever the worker that decodes says, and in whatever pieces that comes."""

import asyncio
import json

import aiohttp
import pytest

from brproxy.happenings import Observer
from tests.brproxy.proxy.legs.conftest import TRANSFERS
from tests.brproxy.proxy.legs.shaping import DONE, event, reply, stream
from tests.brproxy.proxy.legs.test_contract import settled_pair

pytestmark = pytest.mark.parametrize("transfer", TRANSFERS)

CHATS = "/v1/chat/completions"
CHAT = {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": 9}
AT_ONCE = 8
POSITION = "X-Position"
PATIENT = {"lease_s": 1e6}
"""What one side waits for the other: on a machine that has much to do that is long."""


def delta(reason=None, index=0, **said):
    # As short as can be: each byte of a stream is a request here.
    end = {} if reason is None else {"finish_reason": reason}
    return {"choices": [{"index": index, "delta": said} | end]}


def usage(output, prompt=3):
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


# The fields of an event, the end of a stream and of JSON as text, and bytes of one character.
SAID = ('data: [DONE]\n\ndata: {"error": 1}', 'é\u2028"}]}')
EVENTS = [
    event(delta(content=SAID[0])),
    event(delta("stop", content=SAID[1])),
    event({"choices": [], "usage": usage(5)}),
    DONE,
]
ASKS_USAGE = {"stream": True, "stream_options": {"include_usage": True}}

CALL = {"index": 0, "id": "call-1", "type": "function", "function": {"name": "f", "arguments": ""}}
CALLS = [
    event(delta(role="assistant", content=None)),
    event(delta(tool_calls=[CALL])),
    *(
        event(delta(tool_calls=[{"index": 0, "function": {"arguments": part}}]))
        for part in ('{"a', '": "data: [DONE]\\n\\n', '"}')
    ),
    event(delta("tool_calls")),
    event({"choices": [], "usage": usage(7)}),
    DONE,
]
CALLED = {
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": None, "tool_calls": [CALL]},
            "finish_reason": "tool_calls",
        }
    ],
    "usage": usage(7),
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


class Ends(Observer):
    """Keeps how many tokens of output were booked of what has ended."""

    def __init__(self):
        self.tokens = []

    def ended(self, entry, event, waited_s):
        self.tokens.append(entry.output_tokens)


@pytest.fixture
def start_watched(start_pair):
    """Return a function that starts a Pair of one worker each, and the Ends of its decodes."""

    async def start(transfer, pieces, **more):
        common = {"prefills": 1, "decodes": 1, "prefill_settings": PATIENT, "decode_settings": PATIENT}
        pair = await start_pair(transfer, pieces=pieces, **(common | more))
        ends = Ends()
        pair.proxy.running.service.groups["default"].group.dispatcher.happenings.tell(ends)
        return pair, ends

    return start


async def each(positions, ask):
    """Ask for each position, AT_ONCE at a time; return what came, in order."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(position):
        async with room:
            return await ask(position)

    return await asyncio.gather(*map(one, positions))


async def test_a_stream_split_at_any_byte_arrives_as_it_was(transfer, start_watched, until):
    whole = stream(EVENTS)

    def pieces(headers, _document):
        at = int(headers[POSITION.lower()])
        return [whole[:at], whole[at:]]

    pair, ends = await start_watched(transfer, pieces)
    # Every byte in two transfers at least: each splits at every second one.
    positions = range(1 + TRANSFERS.index(transfer) % 2, len(whole), 2)
    found = await each(positions, lambda at: pair.ask(CHATS, {POSITION: str(at)}, **CHAT, **ASKS_USAGE))
    assert set(found) == {(200, b"".join(EVENTS))}
    assert len(found) == pair.counts["split"]
    await settled_pair(pair, until)
    assert set(ends.tokens) == {5}


@pytest.mark.parametrize("more", [ASKS_USAGE, {"stream": True}, {"stream": False}])
async def test_what_comes_byte_by_byte_arrives_as_it_was(transfer, more, start_watched, until):
    whole, body = stream(EVENTS), b"".join(EVENTS)
    if not more["stream"]:
        whole, body = reply(CALLED)
    elif "stream_options" not in more:
        # What the proxy asked for by itself.
        body = b"".join(EVENTS[:-2]) + DONE
    pair, ends = await start_watched(transfer, lambda _headers, _document: [b"%c" % byte for byte in whole])
    assert await pair.ask(CHATS, **CHAT, **more) == (200, body)
    await settled_pair(pair, until)
    assert ends.tokens == [5 if more["stream"] else 7]


async def test_a_stream_cut_at_any_byte_does_not_look_whole(transfer, start_watched, until):
    whole, body = stream(EVENTS), b"".join(EVENTS)
    came = set()

    def pieces(headers, _document):
        at = headers[POSITION.lower()]
        if at in came:
            return [whole]
        came.add(at)
        return [whole[: int(at)]]

    async def ask(at):
        try:
            return await pair.ask(CHATS, {POSITION: str(at)}, **CHAT, **ASKS_USAGE)
        except aiohttp.ClientPayloadError:
            return None

    pair, _ = await start_watched(transfer, pieces, decodes=2)
    # All transfers together: every byte, but for the last line of its framing, without which it has ended.
    positions = range(TRANSFERS.index(transfer), len(whole) - 2, len(TRANSFERS))
    for at, answer in zip(positions, await each(positions, ask), strict=True):
        assert answer in {None, (200, body)}, f"cut at {at}"
        has_begun = at >= whole.index(EVENTS[0]) + len(EVENTS[0])
        assert (answer is None) == has_begun, f"cut at {at}"
    await settled_pair(pair, until)


async def test_several_tokens_in_a_chunk_are_booked_by_what_the_engine_counts(transfer, start_watched, until):
    running = [
        event(delta(content=" a b c") | {"usage": usage(3)}),
        event(delta(content="") | {"usage": usage(3)}),
    ]
    more = [event(delta("stop", content=" d e f g") | {"usage": usage(7)})]
    more += [event({"choices": [], "usage": usage(7)}), DONE]
    rest = asyncio.Event()

    class Held(list):
        """Its last piece comes once the test has looked."""

        def __iter__(self):
            yield self[0]
            while not rest.is_set():
                yield b""
            yield self[1]

    whole = stream([b"".join(running), *more])
    first = whole.index(running[-1]) + len(running[-1]) + 2
    pair, ends = await start_watched(transfer, lambda *_: Held([whole[:first], whole[first:]]))
    asking = asyncio.create_task(pair.ask(CHATS, **CHAT, **ASKS_USAGE))
    await until(lambda: sum(pair.decodes.kv_tokens) == 3 + 3)
    rest.set()
    assert await asking == (200, b"".join([*running, *more]))
    await settled_pair(pair, until)
    assert ends.tokens == [7]


async def test_calls_of_tools_arrive_as_they_were_and_are_booked(transfer, start_watched, until):
    whole, body = reply(CALLED)

    def pieces(_headers, document):
        assert document["tools"] == TOOLS
        return [stream(CALLS)] if document.get("stream") else [whole]

    pair, ends = await start_watched(transfer, pieces)
    assert await pair.ask(CHATS, **CHAT, **ASKS_USAGE, tools=TOOLS) == (200, b"".join(CALLS))
    assert await pair.ask(CHATS, **CHAT, tools=TOOLS) == (200, body)
    assert pair.counts["split"] == 2
    await settled_pair(pair, until)
    assert ends.tokens == [7, 7]


@pytest.mark.parametrize("is_stream", [True, False])
async def test_several_sequences_are_served_where_handles_of_one_are_enough(
    transfer, is_stream, start_watched, until
):
    events = [event(delta(index=i % 2, content=f" {i}")) for i in range(4)]
    events += [event({"choices": [], "usage": usage(4)}), DONE]
    choices = [{"index": i, "message": {"content": " 1 2"}, "finish_reason": "stop"} for i in range(2)]
    whole, body = reply({"choices": choices, "usage": usage(4)})
    pair, ends = await start_watched(transfer, lambda *_: [stream(events) if is_stream else whole])
    status, received = await pair.ask(CHATS, **CHAT, **(ASKS_USAGE if is_stream else {}), n=2)
    if transfer == "sglang":
        assert status == 400
        assert "n" in json.loads(received)["error"]["message"]
    else:
        assert (status, received) == (200, b"".join(events) if is_stream else body)
        assert (pair.counts["alone"], pair.counts["split"]) == (1, 0)
        assert ends.tokens == [4]
    await settled_pair(pair, until)
