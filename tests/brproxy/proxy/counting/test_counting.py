"""Prompts counted beside their requests, over real sockets: what it changes, and that nobody waits for it."""

import logging

import pytest

from brproxy.lifecycle import State
from tests.brproxy.proxy.counting.conftest import CHAT, ENGINE, TEXT, WORDS, counting, ok, prompts


def entries(proxy, state):
    dispatcher = proxy.groups[0].dispatcher
    every = [*dispatcher.waiting.in_turn(), *dispatcher.ledger._rows]
    return [entry for entry in every if entry.state is state]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
async def test_who_is_with_a_worker_is_booked_by_its_count(engine, start, ask, until, kind):
    engine.answers.clear()
    proxy = await start(worker={"engine": kind})
    task = ask(proxy)
    await until(lambda: proxy.ledger.kv_tokens == (7,))
    assert proxy.ledger.prefill_tokens == (7,)
    assert engine.asked == [{"prompt": WORDS, "model": "m"}]
    engine.answers.set()
    assert await task == 200
    await proxy.idle()
    assert len(counting(proxy).counts) == 0


async def test_who_waits_in_the_pool_is_measured_anew(engine, start, ask, until):
    engine.answers.clear()
    proxy = await start()
    first = ask(proxy)
    await until(lambda: proxy.ledger.bound == 1)
    engine.counts.clear()
    second = ask(proxy, prompt=WORDS * 10)
    await until(lambda: len(entries(proxy, State.PENDING)) == 1)
    (entry,) = entries(proxy, State.PENDING)
    estimate = entry.prompt_tokens
    engine.counts.set()
    await until(lambda: entry.prompt_tokens == len((WORDS * 10).split()))
    assert estimate != entry.prompt_tokens
    engine.answers.set()
    assert [await first, await second] == [200, 200]
    await proxy.idle()


async def test_nobody_waits_for_a_count(engine, start, ask, until):
    engine.counts.clear()
    proxy = await start()
    assert await ask(proxy) == 200
    await proxy.idle()
    await until(lambda: engine.asked)
    # What comes when the request is over teaches, and books nothing.
    engine.counts.set()
    await until(lambda: prompts(proxy)["answered"] == 1)
    await proxy.idle()


async def test_who_is_to_wait_for_it_does_so_for_a_bounded_time(engine, start, ask, until):
    engine.counts.clear()
    proxy = await start(ENGINE | {"wait_s": 0.05, "timeout_s": 600})
    assert await ask(proxy) == 200
    engine.counts.set()
    await proxy.idle()


async def test_who_waits_for_it_arrives_with_it(engine, start, ask, until):
    engine.answers.clear()
    engine.counts.clear()
    proxy = await start(ENGINE | {"wait_s": 60})
    task = ask(proxy)
    await until(lambda: engine.asked)
    assert (engine.served, proxy.ledger.bound, proxy.waiting) == ([], 0, 0)
    engine.counts.set()
    await until(lambda: engine.served)
    assert proxy.ledger.kv_tokens == (7,)
    engine.answers.set()
    assert await task == 200


async def test_whose_group_is_removed_while_it_waits_is_not_brought_there(engine, start, ask, until):
    engine.counts.clear()
    proxy = await start(ENGINE | {"wait_s": 60})
    task = ask(proxy)
    await until(lambda: engine.asked)
    groups = proxy.running.service.groups
    groups.retire(groups.each()[0])
    engine.counts.set()
    # There is no other for its model.
    assert await task == 404


async def test_who_leaves_while_it_waits_leaves_nothing_behind(engine, start, ask, until):
    engine.counts.clear()
    proxy = await start(ENGINE | {"wait_s": 60})
    task = ask(proxy)
    await until(lambda: engine.asked)
    task.cancel()
    await until(lambda: len(counting(proxy).counts) == 0)
    assert engine.served == []
    engine.counts.set()
    await until(lambda: prompts(proxy)["answered"] == 1)


@pytest.mark.parametrize(
    ("path", "more", "is_asked"),
    [
        (TEXT, {}, True),
        (TEXT, {"prompt": [1, 2, 3]}, False),
        (TEXT, {"prompt": ["a", "b"]}, False),
        (TEXT, {"prompt_embeds": "AAAA"}, False),
        (TEXT, {"truncate_prompt_tokens": 5}, False),
        (CHAT, {"messages": [{"role": "user", "content": "a b"}]}, True),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            False,
        ),
        ("/v1/embeddings", {"input": "a"}, False),
        ("/v1/responses", {"input": "a"}, False),
    ],
)
async def test_only_prompts_of_text_are_asked_about(engine, start, ask, settled, path, more, is_asked):
    proxy = await start()
    assert await ask(proxy, path=path, **more) == 200
    assert await settled(lambda: len(engine.asked)) == is_asked
    await proxy.idle()


async def test_a_client_s_credentials_go_with_the_question(engine, start, ask, until):
    proxy = await start()
    headers = {"Authorization": "Bearer KEY", "Cookie": "a=b", "X-Other": "c"}
    assert await ask(proxy, headers=headers) == 200
    await until(lambda: engine.asked_lines)
    (head,) = engine.asked_lines
    assert b"\r\nauthorization: bearer key\r\n" in head
    assert b"cookie" not in head
    assert b"x-other" not in head


async def test_each_of_the_workers_is_asked_in_turn(engine, start, ask, until):
    proxy = await start(workers=2)
    for _ in range(4):
        assert await ask(proxy) == 200
    await until(lambda: prompts(proxy)["answered"] == 4)
    by_host = {line.partition(b"\r\nhost: ")[2].partition(b"\r\n")[0] for line in engine.asked_lines}
    assert len(by_host) == 2


FAILURES = [
    ok(b'{"detail":"Not Found"}', "404 Not Found"),
    ok(b"no", "500 Internal Server Error"),
    ok(b'{"no": "count"}'),
    b"HTTP/1.1 nonsense\r\n\r\n",
]


@pytest.mark.parametrize("answer", FAILURES)
async def test_who_cannot_count_is_left_alone_and_named_once(engine, start, ask, until, caplog, answer):
    engine.answer = answer
    proxy = await start(ENGINE | {"failures_max": 2, "pause_s": 600})
    with caplog.at_level(logging.WARNING):
        for number in range(1, 6):
            assert await ask(proxy) == 200
            await until(lambda number=number: prompts(proxy)["failed"] + prompts(proxy)["dropped"] == number)
    assert prompts(proxy) == {"asked": 5, "answered": 0, "failed": 2, "dropped": 3}
    assert len(engine.asked) == 2
    assert len([r for r in caplog.records if "does not count prompts" in r.message]) == 1


async def test_a_request_at_fault_is_no_fault_of_the_worker(engine, start, ask, until):
    engine.answer = ok(b'{"error": {"code": 400}}', "400 Bad Request")
    proxy = await start(ENGINE | {"failures_max": 1, "pause_s": 600})
    for number in range(1, 4):
        assert await ask(proxy) == 200
        await until(lambda number=number: prompts(proxy)["failed"] == number)
    assert len(engine.asked) == 3


async def test_what_takes_too_long_is_given_up(engine, start, ask, until):
    engine.counts.clear()
    proxy = await start(ENGINE | {"timeout_s": 0.05, "failures_max": 1, "pause_s": 600})
    assert await ask(proxy) == 200
    await until(lambda: prompts(proxy)["failed"] == 1)
    assert await ask(proxy) == 200
    await until(lambda: prompts(proxy)["dropped"] == 1)


@pytest.mark.parametrize("limit", ["in_flight_max", "per_second_max"])
async def test_more_than_may_be_asked_are_not(engine, start, ask, until, limit):
    engine.counts.clear()
    proxy = await start(ENGINE | {limit: 1})
    assert [await ask(proxy), await ask(proxy)] == [200, 200]
    if limit == "in_flight_max":
        assert prompts(proxy)["dropped"] == 1
    assert prompts(proxy)["asked"] <= 2
    engine.counts.set()
    await until(lambda: prompts(proxy)["answered"] >= 1)


async def test_a_longer_body_than_may_be_is_not_counted(engine, start, ask):
    proxy = await start(ENGINE | {"body_bytes_max": 1024})
    assert await ask(proxy, prompt="a" * 2000) == 200
    assert prompts(proxy) == {"asked": 0, "answered": 0, "failed": 0, "dropped": 1}


async def test_counts_teach_the_estimate(engine, start, ask, until):
    proxy = await start()
    estimator = proxy.running.service.estimator
    # A word for each letter: far more than its bytes say elsewhere.
    prompt, text = "x " * 200, (200, 200, 0, 0, 0, 0, 0, 0)
    before = estimator.prompt_tokens("m", "", text)
    for number in range(1, 10):
        assert await ask(proxy, prompt=prompt) == 200
        await until(lambda number=number: prompts(proxy)["answered"] == number)
    assert before < 100
    assert abs(estimator.prompt_tokens("m", "", text) - 200) < 10


async def test_metrics_tell_what_came_of_it(engine, start, ask, until, client):
    proxy = await start()
    assert await ask(proxy) == 200
    await until(lambda: prompts(proxy)["answered"] == 1)
    async with client.get(proxy.url + "/metrics") as response:
        text = await response.text()
    estimated = counting(proxy).stats.estimated_tokens
    assert 'brproxy_prompt_counts_total{outcome="asked"} 1.0' in text
    assert 'brproxy_prompt_counts_total{outcome="answered"} 1.0' in text
    assert "brproxy_prompt_counted_tokens_total 7.0" in text
    assert f"brproxy_prompt_estimated_tokens_total {estimated:.1f}" in text
    assert f"brproxy_prompt_estimate_error_tokens_total {abs(estimated - 7):.1f}" in text


@pytest.mark.parametrize("worker", [None, {"engine": "openai"}])
async def test_where_it_is_off_or_unknown_nobody_is_asked(engine, start, ask, settled, worker):
    proxy = await start({} if worker is None else ENGINE, worker=worker)
    assert await ask(proxy) == 200
    assert await settled(lambda: len(engine.asked)) == 0
