"""Holds what the proxy has booked under steady load to the engine's own gauge."""

import asyncio
import random

from tests.real_engines.asking import CHAT, COMPLETIONS, answer, chat
from tests.real_engines.texts import text_of

APART_MAX = 0.05
"""How far the books may be from the engine's own gauge, as a share of it.

The books have a prompt from when it is sent, the engine from when it prefills it: what has no first token yet
may be in the gauge or not, so that the books are a range. It is a fifth of them on a machine that is busy
with other things, where a prefill takes as long as ten tokens.
"""
KINDS = ["english", "code", "chinese", "tokens", "mixed"]
USERS = 6
TEACH, MEASURED = 12, 36
"""Requests that end before the first look, as a few of each kind teach, and from then to the last."""
LOOK_S = 0.2


def question(kind, engine, draw):
    """Return the path and body of one stream."""
    now = draw.choice(["english", "code", "chinese"]) if kind == "mixed" else kind
    tokens, more = draw.randrange(60, 200), {"stream": True, "ignore_eos": True}
    if now != "tokens":
        return CHAT, chat(engine, text_of(now, draw), tokens, **more)
    prompt = [draw.randrange(100, 300) for _ in range(draw.randrange(100, 400))]
    body = {"model": engine.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return COMPLETIONS, body | more


async def look(engine, proxy):
    """Return what is booked, what of it has no first token yet, and what is held; None where some wait.

    The gauge counts whole blocks: half a block a request more than tokens.
    """
    before, new_before = proxy.booked(), sum(proxy.ledger().prefill_tokens)
    held, running, waiting = await engine.gauges()
    if waiting or not running:
        return None
    booked, new = proxy.booked(), sum(proxy.ledger().prefill_tokens)
    return (before + booked) / 2, (new_before + new) / 2, held - running * (engine.block_tokens - 1) / 2


async def hold_to_the_gauge(kind, engine, proxy, session):
    draw, looks, ended = random.Random(kind), [], 0

    async def user():
        nonlocal ended
        # Until the last look as many as ever.
        while ended < TEACH + MEASURED:
            path, body = question(kind, engine, draw)
            status, _, own = await answer(session, proxy.url, path, body)
            assert status == 200, own
            ended += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(USERS):
            group.create_task(user())
        while ended < TEACH + MEASURED:
            await asyncio.sleep(LOOK_S)
            if ended >= TEACH:
                looks.append(await look(engine, proxy))
    found = [found for found in looks if found is not None]
    booked, new, held = (sum(column) / len(found) for column in zip(*found, strict=True))
    apart, begun = (f"{100 * (tokens / held - 1):+.1f} %" for tokens in (booked, booked - new))
    print(
        f"{kind}: booked {booked:.0f}, held {held:.0f} KV tokens: {apart}; {begun} without prefills", end=""
    )
    print(f", {len(found)} looks")
    assert (booked - new) * (1 - APART_MAX) <= held <= booked * (1 + APART_MAX)
    assert proxy.booked() == 0
