"""A prefill that waits for who decodes: where it is booked, how long it lasts, and what follows its loss."""

import asyncio
import json

import pytest

from brproxy.engines.prompt import prompt_size

WORDS = "one two three four five"
DOCUMENT = {"model": "m", "prompt": WORDS, "max_tokens": 6}
HANDLES = {"do_remote_prefill": True, "remote_block_ids": [1], "remote_engine_id": "e"}


def reply(**more):
    usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
    return json.dumps({"choices": [{"index": 0, "text": " x"}], "usage": usage} | more).encode()


class Gate:
    """A worker's answers: each waits until it is let through."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self, writer):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        await self.open.wait()
        if answer is None:
            return False
        writer.write(answer)
        return True


@pytest.fixture
def start_two(start_worker, start_proxy, fixed):
    """Start a prefill worker, decode workers with a script each, and a proxy; ``more`` are its tables."""

    async def start(*decoders, prefill=None, **more):
        prefill = prefill or Gate(fixed(reply(kv_transfer_params=HANDLES)))
        workers = [await start_worker(script) for script in (prefill, *decoders)]
        tables = [{"url": workers[0].url, "role": "prefill"}]
        slots = more.pop("slots", 8)
        tables += [{"url": worker.url, "role": "decode", "slots": slots} for worker in workers[1:]]
        proxy = await start_proxy([], workers=tables, **more)
        return proxy, *workers

    return start


async def ask(client, proxy, **document):
    async with client.post(f"{proxy.url}/v1/completions", json=DOCUMENT | document) as response:
        return response.status, await response.read()


def booked(proxy):
    return {group.name: sum(group.dispatcher.ledger.kv_tokens) for group in proxy.groups}


async def test_the_worker_that_prefills_says_how_long_prompts_are(start_two, client, fixed):
    long = reply(
        kv_transfer_params=HANDLES, usage={"prompt_tokens": 40, "completion_tokens": 1, "total_tokens": 41}
    )
    proxy, *_ = await start_two(Gate(fixed(reply(usage=None))), prefill=Gate(fixed(long)))
    estimator, prompt = proxy.running.service.estimator, prompt_size({"prompt": WORDS * 4}).text
    before = estimator.prompt_tokens("m", "", prompt)
    for _ in range(5):
        assert (await ask(client, proxy, prompt=WORDS * 4))[0] == 200
    assert before < 30
    assert estimator.prompt_tokens("m", "", prompt) == pytest.approx(40, abs=3)


def counts(proxy):
    counted = proxy.running.service.groups["default"].handover.counts
    return {what: count for what, count in counted.items() if count}


async def test_it_is_booked_where_it_is_until_another_worker_answers(start_two, client, until, fixed):
    gate = Gate(fixed(reply()))
    gate.open.clear()
    proxy, prefill, decode = await start_two(gate)
    asking = asyncio.create_task(ask(client, proxy))
    await until(lambda: decode.requests)
    assert booked(proxy) == {"default/prefill": 5, "default": 5}
    (group,) = [group for group in proxy.groups if group.prefills]
    assert group.dispatcher.ledger.prefill_tokens == (0,), "it is done"
    assert not proxy.running.service.fleet.choose("m").prefills
    gate.open.set()
    assert (await asking)[0] == 200
    await proxy.idle()
    first, second = json.loads(prefill.requests[0][2]), json.loads(decode.requests[0][2])
    assert (first["max_tokens"], first["stream"]) == (1, False)
    assert second == DOCUMENT | {"kv_transfer_params": HANDLES}
    assert prefill.requests[0][1]["x-request-id"] == decode.requests[0][1]["x-request-id"]


async def test_who_waits_past_the_lease_is_prefilled_again(start_two, client, until, fixed):
    gate = Gate(fixed(reply()))
    gate.open.clear()
    proxy, prefill, decode = await start_two(gate, slots=1, prefill_decode={"lease_s": 0.05})
    first = asyncio.create_task(ask(client, proxy))
    await until(lambda: decode.requests)
    second = asyncio.create_task(ask(client, proxy, prompt=WORDS + " six"))
    await until(lambda: counts(proxy).get("expired"))
    assert booked(proxy)["default/prefill"] == 5, "of the one that is with its decode worker, which keeps it"
    gate.open.set()
    assert [(await task)[0] for task in (first, second)] == [200, 200]
    assert counts(proxy) == {"split": 2, "expired": 1, "again": 1}
    assert len(prefill.requests) == 3
    await proxy.idle()


async def test_a_decode_worker_that_dies_takes_it_along(start_two, client, until, fixed):
    proxy, prefill, *decodes = await start_two(Gate(None), Gate(fixed(reply())), Gate(fixed(reply())))
    statuses = {(await ask(client, proxy))[0] for _ in range(6)}
    assert statuses == {200}
    lost = counts(proxy)
    assert lost["again"] == lost["stranded"] == len(prefill.requests) - 6 > 0
    await until(lambda: counts(proxy).get("freed", 0) + len(decodes[0].requests) >= lost["stranded"])
    await proxy.idle()


@pytest.mark.parametrize("params", [None, {}, [], "x"])
async def test_a_prefill_that_was_not_kept_costs_only_itself(params, start_two, client, fixed):
    prefill = Gate(fixed(reply(kv_transfer_params=params)))
    proxy, _, decode = await start_two(Gate(fixed(reply())), prefill=prefill)
    assert (await ask(client, proxy))[0] == 200
    assert json.loads(decode.requests[0][2]) == DOCUMENT
    await proxy.idle()


async def test_an_answer_that_is_too_long_is_a_failure(start_two, client, fixed):
    prefill = Gate(fixed(b'{"x":"' + b"y" * 5000 + b'"}'))
    proxy, *_ = await start_two(
        Gate(fixed(reply())), prefill=prefill, limits={"response_parse_bytes_max": 4096}
    )
    status, _ = await ask(client, proxy)
    assert status == 200
    assert proxy.running.service.groups["default"].handover.counts["alone"] == 1
    await proxy.idle()


async def test_short_prompts_are_not_split_while_nobody_waits(start_two, client, fixed):
    proxy, prefill, decode = await start_two(
        Gate(fixed(reply())), prefill_decode={"split_prompt_tokens_min": 20}
    )
    assert (await ask(client, proxy))[0] == 200
    assert not prefill.requests
    assert (await ask(client, proxy, prompt=list(range(20))))[0] == 200
    assert (len(prefill.requests), len(decode.requests)) == (1, 2)
    assert counts(proxy) == {"alone": 1, "split": 1}


async def test_what_a_client_leaves_is_fetched_for_nobody(start_two, client, until, fixed):
    """It is booked until that is done; where nobody can be told it stays for the lease."""
    gate = Gate(fixed(reply()))
    gate.open.clear()
    proxy, _, decode = await start_two(gate, slots=1)
    first = asyncio.create_task(ask(client, proxy))
    await until(lambda: decode.requests)
    second = asyncio.create_task(ask(client, proxy, prompt=WORDS + " six"))
    await until(lambda: booked(proxy)["default/prefill"] == 5 + 5)
    await until(lambda: proxy.waiting + len(proxy.groups[1].dispatcher.waiting))
    second.cancel()
    await until(lambda: len(decode.requests) == 2)
    free = json.loads(decode.requests[1][2])
    assert (free["max_tokens"], free["stream"], free["kv_transfer_params"]) == (1, False, HANDLES)
    assert booked(proxy)["default/prefill"] == 5 + 5
    gate.open.set()
    assert (await first)[0] == 200
    await proxy.idle()
    assert counts(proxy) == {"split": 2, "stranded": 1, "freed": 1}


async def test_metrics_tell_what_became_of_prefills(start_two, client, fixed):
    proxy, *_ = await start_two(Gate(fixed(reply())))
    await ask(client, proxy)
    async with client.get(proxy.url + "/metrics") as response:
        text = await response.text()
    assert 'brproxy_prefills_split_total{group="default"} 1.0' in text
    assert 'brproxy_requests_total{group="default/prefill",outcome="finished"} 1.0' in text


async def test_what_the_worker_that_prefills_had_cached_is_noted(start_two, client, until, fixed):
    usage = {"prompt_tokens": 40, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 32}}
    gate = Gate(fixed(reply()))
    gate.open.clear()
    proxy, _, decode = await start_two(
        gate, prefill=Gate(fixed(reply(kv_transfer_params=HANDLES, usage=usage)))
    )
    asking = asyncio.create_task(ask(client, proxy))
    await until(lambda: decode.requests)
    (group,) = [group for group in proxy.groups if group.prefills]
    ledger = group.dispatcher.ledger
    (entry,) = (ledger.entry(request_id) for request_id in ledger.row_ids().tolist())
    assert (entry.uncached_tokens, ledger.prefill_tokens, ledger.kv_tokens) == (8, (0,), (40,))
    gate.open.set()
    assert (await asking)[0] == 200
    await proxy.idle()
