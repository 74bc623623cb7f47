"""Engines are asked for their load over real sockets, and decisions see what they say."""

import asyncio
import logging
from collections import Counter

import orjson
import pytest

from brproxy.proxy import polling
from brproxy.roster import WorkerLimits
from brproxy.signals import GroupSignals
from loadgen.cluster import ClusterSettings
from loadgen.emulator.server import EmulatorSettings, running_emulator

LONG = 10_000
IN_FLIGHT = 1000
"""More than an engine can have decoded that the proxy has not read yet, here (tokens)."""
FAST = {"enabled": True, "interval_s": 0.02, "timeout_s": 60, "lag_s": 0.05, "stale_s": 3600}


@pytest.fixture
def start_engines(stack):
    """Return a function that starts an emulated deployment with a KV cache."""

    async def start(workers=2, kv_capacity_tokens=1_000_000, **settings):
        cluster = ClusterSettings(workers, 64, kv_capacity_tokens, 0.02, 0.0)
        return await stack.enter_async_context(
            running_emulator(EmulatorSettings(cluster, speed=1.0, **settings))
        )

    return start


@pytest.fixture
def stream(stack, client):
    """Return a function that begins a long stream and has it run until the test ends."""
    running = []

    async def begin(url, prompt_tokens):
        document = {
            "model": "emulated",
            "prompt": [7] * prompt_tokens,
            "max_tokens": LONG,
            "stream": True,
        }
        response = await client.post(url + "/v1/completions", json=document)
        running.append(response)
        await response.content.readany()

    yield begin
    for response in running:
        response.close()


@pytest.fixture
def told(monkeypatch):
    """Return what polls were told: the first member's name, what its engine holds, and its offset before."""
    found = []
    take_in = GroupSignals.told

    def told(self, members, reading, now_s):
        report = next(iter(reading.reports.values()))
        found.append((members[0].key, report.kv_used_tokens, self.offsets()[members[0].index]))
        take_in(self, members, reading, now_s)

    monkeypatch.setattr(GroupSignals, "told", told)
    return found


async def metrics(client, proxy):
    async with client.get(proxy.url + "/metrics") as response:
        return await response.text()


@pytest.mark.parametrize("sglang", [False, True])
@pytest.mark.parametrize("policy", ["br-0", "br-h", "least-kv"])
async def test_traffic_past_the_proxy_is_found_within_two_polls_and_avoided(
    policy, sglang, start_engines, start_proxy, stream, client, until, told
):
    engines = await start_engines(sglang=sglang)
    engine = {"engine": "sglang" if sglang else "vllm"}
    proxy = await start_proxy(engines.urls, telemetry=FAST, routing={"policy": policy}, worker=engine)
    first = proxy.groups[0].roster.member(0).key
    # Half of the traffic goes past the proxy, all of it to one worker.
    for _ in range(6):
        await stream(engines.urls[0], 5000)

    def offsets_with_all_of_it():
        return [offset for key, used, offset in told if key == first and (used or 0) >= 30_000]

    await until(lambda: len(offsets_with_all_of_it()) >= 3)
    assert offsets_with_all_of_it()[1] < 30_000 <= offsets_with_all_of_it()[2], "the second is believed"
    for _ in range(6):
        await stream(proxy.url, 1000)
    assert proxy.ledger.requests == (0, 6)
    assert abs(proxy.ledger.offset[1]) < IN_FLIGHT
    # What did not pass through is in no book.
    assert proxy.ledger.kv_tokens[0] == 0
    text = await metrics(client, proxy)
    labels = f'{{group="default",worker="{first}"}}'
    for name in ("worker_offset_kv_tokens", "engine_kv_used_tokens", "engine_signal_age_seconds"):
        assert f"brproxy_{name}{labels}" in text
    assert f"brproxy_engine_kv_capacity_tokens{labels} 1e+06" in text
    assert f"brproxy_engine_running_requests{labels} 6.0" in text


async def test_without_telemetry_the_same_traffic_goes_to_both(start_engines, start_proxy, stream, client):
    engines = await start_engines()
    proxy = await start_proxy(engines.urls, routing={"policy": "least-kv"})
    for _ in range(6):
        await stream(engines.urls[0], 5000)
    for _ in range(6):
        await stream(proxy.url, 1000)
    assert proxy.ledger.requests == (3, 3)
    assert proxy.ledger.offset == (0, 0)
    assert "brproxy_engine_kv_used_tokens{" not in await metrics(client, proxy)


async def test_a_worker_that_foreign_traffic_fills_is_given_nothing(
    start_engines, start_proxy, stream, until, told
):
    engines = await start_engines(kv_capacity_tokens=200_000)
    proxy = await start_proxy(engines.urls, telemetry=FAST)
    await until(lambda: proxy.ledger.kv_capacity_tokens_max == 200_000)
    await stream(engines.urls[0], 90_000)
    await until(lambda: proxy.ledger.offset[0] >= 90_000)
    await stream(proxy.url, 95_000)
    assert proxy.ledger.requests == (0, 1)
    # Each has room for it by the books, the first even for two.
    waits = asyncio.create_task(stream(proxy.url, 115_000))
    await until(lambda: proxy.waiting == 1)
    told.clear()
    await until(lambda: len(told) >= 6)
    assert proxy.waiting == 1
    waits.cancel()
    await asyncio.gather(waits, return_exceptions=True)
    await until(lambda: proxy.waiting == 0)


async def test_what_is_served_through_the_proxy_is_no_offset(start_engines, start_proxy, stream, until, told):
    engines = await start_engines()
    # All that is booked within so long may be what an engine says.
    proxy = await start_proxy(engines.urls, telemetry=FAST | {"lag_s": 60})
    for prompt_tokens in (100, 7000, 300, 2000):
        await stream(proxy.url, prompt_tokens)
        count = len(told)
        await until(lambda count=count: len(told) >= count + 6)
        assert max(map(abs, proxy.ledger.offset)) < IN_FLIGHT
    assert max(used for _, used, _ in told) >= 7000


async def test_the_capacity_that_the_file_leaves_out_is_found(
    start_engines, start_proxy, client, until, caplog
):
    caplog.set_level(logging.INFO)
    engines = await start_engines(1, kv_capacity_tokens=5000)
    proxy = await start_proxy(engines.urls, telemetry=FAST)
    await until(lambda: proxy.ledger.kv_capacity_tokens_max == 5000)
    async with client.post(
        proxy.url + "/v1/completions", json={"model": "emulated", "prompt": [1] * 5001}
    ) as response:
        assert response.status == 400
        assert "more than the KV capacity of any worker (5000 tokens)" in await response.text()
    assert "has a KV capacity of 5000 tokens, says its engine" in caplog.text


async def test_a_capacity_that_contradicts_the_engine_is_one_warning_and_counts(
    start_engines, start_proxy, until, caplog, told
):
    engines = await start_engines(2, kv_capacity_tokens=5000)
    workers = [
        {"url": url, "name": name, "kv_capacity_tokens": tokens}
        for url, (name, tokens) in zip(engines.urls, {"far": 7000, "near": 5400}.items(), strict=True)
    ]
    proxy = await start_proxy([], telemetry=FAST, workers=workers)
    await until(lambda: min(Counter(key for key, _, _ in told)[name] for name in ("far", "near")) >= 3)
    (warning,) = [record.getMessage() for record in caplog.records if "configured" in record.getMessage()]
    assert warning.startswith("worker far: kv_capacity_tokens = 7000 is configured, and its engine says 5000")
    assert proxy.ledger.kv_capacity_tokens_max == 7000


PAGES = {
    "404": (b"Not Found", "404 Not Found", "/metrics answers 404"),
    "another page": (b"<html>", "200 OK", "/metrics is no page of this engine"),
    "too long": (b"x" * 5000, "200 OK", "/metrics: its response is longer than 4096 bytes"),
}


@pytest.mark.parametrize("kind", PAGES)
async def test_a_worker_without_a_page_is_left_alone_and_told_once(
    kind, start_worker, start_proxy, client, until, answer, fixed, caplog
):
    body, status, message = PAGES[kind]
    worker = await start_worker(answer(fixed(body, status=status)))
    proxy = await start_proxy([worker.url], telemetry=FAST, limits={"control_bytes_max": 4096})
    await until(lambda: "does not tell its load" in caplog.text)
    await asyncio.sleep(0.2)
    # Once as well for its adapters, which have nothing to do with its load.
    assert sorted(line for line, _, _ in worker.requests) == [
        "GET /metrics HTTP/1.1",
        "GET /v1/models HTTP/1.1",
    ]
    (record,) = [r for r in caplog.records if r.name == "brproxy.signals"]
    assert message in record.getMessage()
    assert record.getMessage().endswith("the booked load alone stands in")
    text = await metrics(client, proxy)
    missing = [line for line in text.split("\n") if line.startswith("brproxy_engine_signal_missing{")]
    assert len(missing) == 5
    assert 'signal="kv_used_tokens"' in "".join(missing)
    for name in ("kv_used_tokens", "waiting_requests", "signal_age_seconds", "preemptions_total"):
        assert f"brproxy_engine_{name}{{" not in text, "absent is not zero"


async def test_it_is_asked_again_after_a_while(start_worker, start_proxy, until, answer, fixed, monkeypatch):
    monkeypatch.setattr(polling, "UNANSWERED_S", 0.1)
    worker = await start_worker(answer(fixed(b"", status="404 Not Found")))
    await start_proxy([worker.url], telemetry=FAST)
    await until(lambda: len(worker.requests) >= 3)


@pytest.fixture
def scripts(answer, fixed, reset, silence):
    return {
        "500": answer(fixed(b"", status="500 Oh")),
        "cut": answer(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx"),
        "reset": reset(),
        "silent": silence(),
    }


@pytest.mark.parametrize("kind", ["500", "cut", "reset", "silent", "refused"])
async def test_one_that_fails_is_asked_again_at_the_next_interval(
    kind, start_worker, start_proxy, until, scripts, unused_tcp_port, caplog
):
    if kind == "refused":
        await start_proxy([f"http://127.0.0.1:{unused_tcp_port}"], telemetry=FAST)
    else:
        worker = await start_worker(scripts[kind])
        await start_proxy([worker.url], telemetry=FAST | {"timeout_s": 0.05})
        await until(lambda: worker.connections >= 3)
    await until(lambda: "did not say its load" in caplog.text)
    assert "does not tell its load" not in caplog.text


async def test_the_offset_fades_when_the_worker_says_nothing_more(
    start_worker, start_proxy, until, fixed, monkeypatch
):
    page = "\n".join(
        f'vllm:{name}{{engine="0"{labels}}} {value}'
        for name, labels, value in (
            ("kv_cache_usage_perc", "", 0.5),
            ("cache_config_info", ',kv_cache_size_tokens="1000"', 1),
            ("num_requests_waiting", "", 0),
        )
    )
    answers = [fixed(page.encode())] * 3

    async def script(writer):
        writer.write(answers.pop() if answers else fixed(b"", status="503 No"))
        await writer.drain()
        return True

    worker = await start_worker(script)
    fading = FAST | {"stale_s": 0.01, "half_life_s": 0.05}
    proxy = await start_proxy([worker.url], telemetry=fading)
    await until(lambda: proxy.ledger.offset[0] > 0)
    assert proxy.ledger.offset[0] <= 500
    await until(lambda: proxy.ledger.offset[0] == 0)


async def test_one_page_tells_of_all_members_behind_one_endpoint(start_worker, start_proxy, until, fixed):
    loads = [
        {"dp_rank": rank, "num_used_tokens": 100 * rank, "max_total_num_tokens": 1000, "num_waiting_reqs": 0}
        for rank in range(4)
    ]

    async def script(writer):
        writer.write(fixed(orjson.dumps({"loads": loads})))
        await writer.drain()
        return True

    worker = await start_worker(script)
    proxy = await start_proxy([worker.url], telemetry=FAST, worker={"engine": "sglang"})
    roster = proxy.groups[0].roster
    await until(lambda: proxy.ledger.offset == (600,))
    assert roster.member(0).limits.kv_capacity_tokens == 4000, "one that is all of them"
    roster.member(0).rank = 0
    for rank in (1, 2, 3):
        roster.add(f"rank-{rank}", WorkerLimits(8), worker.url).rank = rank
    await until(lambda: proxy.ledger.offset == (0, 100, 200, 300))
    assert [member.limits.kv_capacity_tokens for member in roster.members] == [1000] * 4
    assert worker.connections <= 2, "one question for all, beside the one for adapters"


async def test_who_comes_is_asked_and_who_has_gone_is_not(start_engines, start_proxy, client, until, told):
    first, second = await start_engines(1), await start_engines(1)
    proxy = await start_proxy(first.urls, telemetry=FAST)
    group = proxy.groups[0]
    key = group.roster.member(0).key
    group.add("late", WorkerLimits(8), second.urls[0])
    await until(lambda: ("late", 0, 0) in told)
    group.remove(key)
    await asyncio.sleep(0.05)
    told.clear()
    await until(lambda: len(told) >= 3)
    assert {name for name, _, _ in told} == {"late"}
    assert f'worker="{key}"' not in await metrics(client, proxy)
    # The same origin again, in the same turn of the loop in which its last member goes.
    group.remove("late")
    group.add("again", WorkerLimits(8), second.urls[0])
    await until(lambda: ("again", 0, 0) in told)
