"""What clients ask of an engine, and what its answers say."""

import asyncio
import re
import time
from typing import NamedTuple

import orjson

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
OWN = re.compile(rb'"(?:id|created)":\s*(?:"[^"]*"|\d+)')
"""What differs from one answer to the next."""


def chat(engine, text="Hello", tokens=8, **more):
    messages = [{"role": "user", "content": text}]
    return {"model": engine.model, "messages": messages, "max_tokens": tokens, "temperature": 0, **more}


async def answer(session, url, path, body):
    async with session.post(url + path, json=body) as response:
        own = await response.read()
        return response.status, response.headers["Content-Type"], OWN.sub(b'"_":0', own)


async def leave(session, engine, proxy, path, body):
    """Have a client leave a request that runs; return how long the engine then took to be idle (ms)."""
    asking = asyncio.create_task(answer(session, proxy.url, path, body))
    async with asyncio.timeout(60):
        while not (await engine.gauges())[1]:
            await asyncio.sleep(0.01)
    asking.cancel()
    left_s = time.monotonic()
    await asyncio.gather(asking, return_exceptions=True)
    await engine.idle()
    return 1000 * (time.monotonic() - left_s)


class Said(NamedTuple):
    """What an answer says: its texts by choice, why each ends, its last usage, and a stream's last event."""

    texts: dict[int, str]
    reasons: dict[int, str]
    usage: dict[str, object] | None
    end: bytes


def said(raw):
    """Return what an answer says, whole or streamed."""
    if raw.startswith(b"data: "):
        *events, end = [event.removeprefix(b"data: ") for event in raw.split(b"\n\n") if event]
    else:
        events, end = [raw], b""
    texts, reasons, usage = {}, {}, None
    for event in events:
        document = orjson.loads(event)
        usage = document.get("usage") or usage
        for choice in document["choices"]:
            index = choice["index"]
            texts[index] = texts.get(index, "") + text_in(choice)
            reasons[index] = choice.get("finish_reason") or reasons.get(index)
    return Said(texts, reasons, usage, end)


def text_in(choice):
    """Return the text of a choice: of a chat or a completion, whole or in pieces."""
    message = choice.get("message") or choice.get("delta")
    return choice["text"] if message is None else message.get("content") or ""
