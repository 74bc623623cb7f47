"""Prompts counted beside their requests, over real sockets: what it changes, and that nobody waits for it."""

import asyncio
import logging

import orjson
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from brproxy.app import running_proxy
from brproxy.config import parse_config
from brproxy.lifecycle import State
from brproxy.types import InvalidInputError
from brproxy.validation import ConfigError

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
ENGINE = {"exact": "engine", "timeout_s": 600}
WORDS = "one two three four five six seven"
REPLY = orjson.dumps({"choices": [{"index": 0, "text": " x", "finish_reason": "stop"}]})


def ok(body, status="200 OK"):
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Engine:
    """A worker that answers requests when it is let, and counts words when it may."""

    def __init__(self):
        self.answers, self.counts = asyncio.Event(), asyncio.Event()
        self.answers.set()
        self.counts.set()
        self.answer = None
        self.asked = []
        self.served = []
        self.asked_lines = []

    async def script(self, worker, reader, writer):
        while True:
            body = await worker.read_request(reader)
            head = worker.requests[-1]
            if head.startswith(b"POST /tokenize "):
                self.asked.append(orjson.loads(body))
                self.asked_lines.append(head.lower())
                await self.counts.wait()
                writer.write(self.answer or self.counted(self.asked[-1]))
            else:
                self.served.append(body)
                await self.answers.wait()
                writer.write(ok(REPLY))

    @staticmethod
    def counted(document):
        texts = [m["content"] for m in document.get("messages", [])] or [document["prompt"]]
        count = sum(len(text.split()) for text in texts)
        return ok(orjson.dumps({"count": count, "max_model_len": 9, "tokens": list(range(count))}))


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def start(engine, raw_worker, start_proxy):
    async def start(prompts=ENGINE, workers=1, worker=None, **tables):
        urls = [(await raw_worker(engine.script)).url for _ in range(workers)]
        return await start_proxy(urls, prompts=prompts, worker={"slots": 1} | (worker or {}), **tables)

    return start


@pytest.fixture
def ask(client):
    """Return a function that sends a request and returns what becomes of it, as a task."""

    def ask(proxy, prompt=WORDS, path=TEXT, headers=None, **more):
        async def status():
            document = {"model": "m", "prompt": prompt} if path == TEXT else {"model": "m"}
            async with client.post(proxy.url + path, json=document | more, headers=headers) as response:
                await response.read()
                return response.status

        return asyncio.create_task(status())

    return ask


def counting(proxy):
    return proxy.running.service.counting


def prompts(proxy):
    return counting(proxy).stats.prompts


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


# By a file.


@pytest.fixture
def tokenizer(tmp_path):
    """Return the file of a tokenizer that makes a token of each word, and puts one in front of a text."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "<s>": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    return {"exact": "file", "tokenizer": str(file), "timeout_s": 600}


@pytest.mark.parametrize(("more", "tokens"), [({}, 8), ({"add_special_tokens": False}, 7)])
async def test_a_text_is_counted_by_a_file(engine, start, ask, until, tokenizer, more, tokens):
    engine.answers.clear()
    proxy = await start(tokenizer)
    task = ask(proxy, **more)
    await until(lambda: proxy.ledger.kv_tokens == (tokens,))
    engine.answers.set()
    assert await task == 200
    assert engine.asked == []


async def test_a_chat_s_text_is_counted_and_its_template_estimated(engine, start, ask, until, tokenizer):
    engine.answers.clear()
    proxy = await start(tokenizer)
    estimator = proxy.running.service.estimator
    messages = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": "eight"}]
    task = ask(proxy, path=CHAT, messages=messages)
    # Words of both, their roles, and what stands around two messages.
    counted = 7 + 1 + 2 + estimator.template_tokens("m", (0, 0, 0, 0, 0, 0, 2, 1))
    await until(lambda: proxy.ledger.kv_tokens == (counted,))
    assert estimator.prompt_tokens("m", "", (40, 0, 0, 0, 0, 0, 2, 1)) == estimator.prompt_tokens(
        "other", "", (40, 0, 0, 0, 0, 0, 2, 1)
    ), "what is partly an estimate teaches nothing"
    engine.answers.set()
    assert await task == 200


@pytest.mark.parametrize("model", ["m", "other"])
async def test_a_file_is_of_one_model_if_it_says_so(engine, start, ask, until, tokenizer, model):
    proxy = await start(tokenizer | {"tokenizer_model": model})
    assert await ask(proxy) == 200
    await until(lambda: prompts(proxy)["answered"] == (model == "m"))
    assert prompts(proxy)["asked"] == (model == "m")


async def test_halves_of_characters_are_left_to_the_engine(engine, start, client, until, tokenizer, caplog):
    proxy = await start(tokenizer)
    body = b'{"model": "m", "prompt": "a \\ud800 b"}'
    async with client.post(proxy.url + TEXT, data=body, headers={"Content-Type": "application/json"}) as got:
        assert got.status == 200
    await until(lambda: prompts(proxy)["dropped"] == 1)
    assert not caplog.records


async def test_a_file_that_cannot_be_read_is_said_at_start(tmp_path):
    document = {
        "listen": {"port": 0},
        "worker": [{"url": "http://127.0.0.1:1"}],
        "prompts": {"exact": "file", "tokenizer": str(tmp_path / "none.json")},
    }
    with pytest.raises(InvalidInputError, match=r"none\.json is no tokenizer\.json that can be read"):
        async with running_proxy(parse_config(document, "test")):
            pass


def test_a_file_must_be_named():
    document = {"worker": [{"url": "http://127.0.0.1:1"}], "prompts": {"exact": "file"}}
    with pytest.raises(ConfigError, match="needs tokenizer, which is not given"):
        parse_config(document, "test")
