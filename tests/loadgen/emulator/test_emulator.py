"""The emulator over HTTP: vLLM's wire format, the barrier in real time, clients that leave."""

import asyncio

import orjson
import pytest

from brproxy.engines.load import LoadReport
from brproxy.engines.load_pages import read_sglang_loads, read_vllm_metrics
from brproxy.types import InvalidInputError
from loadgen.cluster_settings import ClusterSettings
from loadgen.emulator.server import EmulatorSettings, running_emulator
from loadgen.emulator.wire import LENGTH_HEADER, RANK_HEADER

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def start(stack):
    async def start(workers=2, speed=50.0, kv_capacity_tokens=None, slots=4, **settings):
        cluster = ClusterSettings(workers, slots, kv_capacity_tokens, 0.03, 1e-6)
        return await stack.enter_async_context(running_emulator(EmulatorSettings(cluster, speed, **settings)))

    return start


def events(body):
    """Return the documents of a stream, and whether [DONE] ended it."""
    *data, last = [event.removeprefix(b"data: ") for event in body.split(b"\n\n")[:-1]]
    return [orjson.loads(event) for event in data], last == b"[DONE]"


async def stream(client, url, path=CHAT, headers=None, **document):
    asked = {"model": "emulated", "stream": True, **document}
    async with client.post(url + path, json=asked, headers=headers) as response:
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        return events(await response.read())


async def page(client, url):
    async with client.get(url) as response:
        return orjson.loads(await response.read()) if response.status == 200 else None


@pytest.mark.parametrize(
    ("asked", "status", "count"),
    [
        ({"prompt": "three words here"}, 200, 3),
        ({"messages": [{"role": "user", "content": "two words"}]}, 200, 2),
        ({"prompt": ["a", "b"]}, 400, None),
        ({"messages": []}, 400, None),
    ],
)
async def test_a_worker_counts_prompts(start, client, asked, status, count):
    url = (await start(1)).urls[0]
    async with client.post(url + "/tokenize", json={"model": "emulated", **asked}) as response:
        assert response.status == status
        assert orjson.loads(await response.read()).get("count") == count


@pytest.mark.parametrize("sglang", [False, True])
async def test_a_worker_says_which_engine_it_is(start, client, sglang):
    url = (await start(1, kv_capacity_tokens=5000, slots=3, sglang=sglang)).urls[0]
    (model,) = (await page(client, url + "/v1/models"))["data"]
    assert (model["id"], model["owned_by"], model["max_model_len"]) == (
        "emulated",
        "sglang" if sglang else "vllm",
        131_072,
    )
    version, info = await page(client, url + "/version"), await page(client, url + "/server_info")
    if not sglang:
        assert (version, info) == ({"version": "0.33.0"}, None)
        return
    assert (version, info["version"], info["max_total_num_tokens"]) == (None, "0.5.23", 5000)
    assert info["internal_states"][0]["effective_max_running_requests_per_dp"] == 3


async def test_a_chat_stream(start, client):
    emulator = await start()
    messages = [{"role": "user", "content": "three word prompt"}]
    headers = {"X-Request-Id": "r1", LENGTH_HEADER: "4"}
    documents, done = await stream(client, emulator.urls[0], headers=headers, messages=messages)
    assert done
    assert {d["id"] for d in documents} == {"chatcmpl-r1"}
    assert {d["object"] for d in documents} == {"chat.completion.chunk"}
    deltas = [d["choices"][0]["delta"] for d in documents]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas) == " 1 2 3 4"
    assert [d["choices"][0]["finish_reason"] for d in documents][-1] == "stop"
    assert not any("usage" in d for d in documents)


async def test_usage_at_the_end(start, client):
    emulator = await start()
    options = {"include_usage": True}
    documents, _ = await stream(
        client, emulator.urls[0], TEXT, prompt=[1, 2, 3], max_tokens=2, stream_options=options
    )
    assert documents[-1]["choices"] == []
    assert documents[-1]["usage"] == {"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2}
    assert not any("usage" in d for d in documents[:-1])
    assert documents[-2]["choices"][0]["finish_reason"] == "length"


async def test_continuous_usage(start, client):
    emulator = await start()
    options = {"include_usage": True, "continuous_usage_stats": True}
    documents, _ = await stream(
        client, emulator.urls[0], prompt=None, messages=[{"role": "user", "content": "x"}], max_tokens=3,
        stream_options=options,
    )  # fmt: skip
    counts = [d["usage"]["completion_tokens"] for d in documents]
    assert counts[0] == 0
    assert counts[-1] == 3
    assert counts == sorted(counts)


async def test_a_whole_reply(start, client):
    emulator = await start()
    document = {
        "model": "emulated",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a b"}]}],
    }
    async with client.post(emulator.urls[1] + CHAT, json=document | {"max_tokens": 3}) as response:
        reply = await response.json()
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": " 1 2 3"}
    assert reply["usage"] == {"prompt_tokens": 2, "total_tokens": 5, "completion_tokens": 3}


async def test_models_health_and_metrics(start, client):
    emulator = await start(model="tiny", kv_capacity_tokens=1000)
    url = emulator.urls[1]
    async with client.get(url + "/v1/models") as response:
        assert [m["id"] for m in (await response.json())["data"]] == ["tiny"]
    async with client.get(url + "/health") as response:
        assert (response.status, await response.read()) == (200, b"")
    async with client.post(
        url + TEXT, json={"model": "tiny", "prompt": "a b c", "max_tokens": 5}
    ) as response:
        await response.read()
    async with client.get(url + "/metrics") as response:
        text = await response.text()
    labels = '{engine="1",model_name="tiny"}'
    for line in (
        'vllm:num_requests_running{model_name="tiny",engine="1"} 0.0',
        'vllm:num_requests_waiting{model_name="tiny",engine="1"} 0.0',
        'vllm:kv_cache_usage_perc{model_name="tiny",engine="1"} 0.0',
        'vllm:num_preemptions_total{model_name="tiny",engine="1"} 0.0',
        'vllm:prompt_tokens_total{model_name="tiny",engine="1"} 3.0',
        'vllm:generation_tokens_total{model_name="tiny",engine="1"} 5.0',
    ):
        assert line in text or line.replace('{model_name="tiny",engine="1"}', labels) in text
    assert read_vllm_metrics(text.encode()).reports == {1: LoadReport(0, 1000, 0, 0, None, 0, 3)}


async def test_load_as_sglang_tells_it(start, client):
    emulator = await start(slots=1, kv_capacity_tokens=1000, sglang=True)
    url = emulator.urls[0]
    document = {"model": "emulated", "prompt": [1] * 300, "max_tokens": 400, "stream": True}
    first = await client.post(url + TEXT, json=document)
    await first.content.readany()
    second = await client.post(url + TEXT, json=document | {"prompt": [1] * 20})
    async with client.get(url + "/v1/loads") as response:
        reading = read_sglang_loads(await response.read())
    report = reading.reports[0]
    assert not reading.missing(report)
    assert (report.running, report.waiting, report.waiting_tokens) == (1, 1, 20)
    assert 300 <= report.kv_used_tokens <= 700
    assert (report.kv_capacity_tokens, report.prefill_tokens) == (1000, 320)
    async with client.get(url + "/metrics") as response:
        assert response.status == 404
    for each in (first, second):
        each.close()


async def test_a_cache_of_unknown_size_has_no_usage(start, client):
    emulator = await start()
    async with client.get(emulator.urls[0] + "/metrics") as response:
        (report,) = read_vllm_metrics(await response.read()).reports.values()
    assert (report.kv_used_tokens, report.kv_capacity_tokens, report.running) == (None, None, 0)


@pytest.mark.parametrize(
    ("path", "document", "param"),
    [
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {}, "messages"),
        (TEXT, {"prompt": 5}, "prompt"),
        (TEXT, {"prompt": "x", "max_tokens": -1}, "max_tokens"),
        (TEXT, {"prompt": "x", "n": 2}, "n"),
        (TEXT, {"prompt": "x " * 2000, "max_tokens": 5}, "prompt"),
    ],
)
async def test_bad_requests_are_answered_as_vllm_does(path, document, param, start, client):
    emulator = await start(kv_capacity_tokens=1000)
    async with client.post(emulator.urls[0] + path, json={"model": "emulated"} | document) as response:
        error = (await response.json())["error"]
    assert (response.status, error["type"], error["code"], error["param"]) == (
        400,
        "BadRequestError",
        400,
        param,
    )


async def test_not_json_and_unknown_models(start, client):
    emulator = await start()
    async with client.post(emulator.urls[0] + TEXT, data=b"{") as response:
        assert response.status == 400
    async with client.post(emulator.urls[0] + TEXT, data=b"[]") as response:
        assert response.status == 400
    headers = {LENGTH_HEADER: "many"}
    async with client.post(emulator.urls[0] + TEXT, json={"prompt": "x"}, headers=headers) as response:
        assert (await response.json())["error"]["param"] == LENGTH_HEADER
    async with client.post(emulator.urls[0] + TEXT, json={"model": "nope", "prompt": "x"}) as response:
        assert (response.status, (await response.json())["error"]["type"]) == (404, "NotFoundError")


async def test_a_client_that_leaves_frees_its_slot(start, client, until):
    emulator = await start(workers=1, slots=1, speed=10.0)
    cluster = emulator.deployment.cluster
    document = {"model": "emulated", "prompt": "x", "max_tokens": 100_000, "stream": True}
    first = asyncio.create_task(client.post(emulator.urls[0] + TEXT, json=document))
    await until(lambda: cluster.running.tolist() == [1])
    second = asyncio.create_task(client.post(emulator.urls[0] + TEXT, json=document))
    await until(lambda: cluster.queued == [1])
    (await first).close()
    await until(lambda: cluster.queued == [0] and cluster.running.tolist() == [1])
    (await second).close()
    await until(lambda: cluster.running.tolist() == [0])


async def test_a_full_queue_is_refused(start, client, until):
    emulator = await start(workers=1, slots=1, speed=1.0, queued_requests_max=1)
    document = {"model": "emulated", "prompt": "x", "max_tokens": 100_000}
    others = []
    for running, queued in ((1, 0), (1, 1)):
        others.append(asyncio.create_task(client.post(emulator.urls[0] + TEXT, json=document)))
        await until(
            lambda running=running, queued=queued: (
                emulator.deployment.cluster.running.tolist() == [running]
                and emulator.deployment.cluster.queued == [queued]
            )
        )
    async with client.post(emulator.urls[0] + TEXT, json=document) as response:
        assert (response.status, (await response.json())["error"]["type"]) == (503, "Service Unavailable")
    for other in others:
        other.cancel()


async def test_all_workers_share_the_barrier_and_the_clock(start, client, monkeypatch):
    emulator = await start(workers=2, speed=20.0)
    deployment = emulator.deployment
    # No step begins before both requests are there, however slowly they come.
    begin_step = deployment.cluster.begin_step
    monkeypatch.setattr(
        deployment.cluster,
        "begin_step",
        lambda: begin_step() if all(deployment.prompt_tokens_total) else None,
    )
    prompts = [("x " * 20_000).strip(), "x"]
    await asyncio.gather(
        *(
            stream(client, url, TEXT, prompt=p, max_tokens=40)
            for url, p in zip(emulator.urls, prompts, strict=True)
        )
    )
    async with client.get(emulator.urls[0] + "/emulator/stats") as response:
        stats = await response.json()
    # A step takes 30 ms and 1 µs for each of the heavy worker's 20,000 tokens, for the light one as well.
    assert stats["output_tokens"] == 80
    assert stats["busy_s"] / stats["steps"] == pytest.approx(0.050, rel=0.01)
    assert stats["imbalance_kv_tokens"] == pytest.approx(20_000, rel=0.1)
    assert stats["idle_fraction"] == pytest.approx(0.5, abs=0.05)
    async with client.post(emulator.urls[1] + "/emulator/reset") as response:
        assert (await response.json())["now_s"] >= stats["now_s"]
    async with client.get(emulator.urls[0] + "/emulator/stats?from_s=0&to_s=1e9") as response:
        assert (await response.json())["steps"] == 0
    async with client.get(emulator.urls[0] + "/emulator/stats?from_s=x") as response:
        assert response.status == 400


async def test_a_taken_port_is_one_line(start):
    emulator = await start(workers=1)
    port = int(emulator.urls[0].rsplit(":", 1)[1])
    with pytest.raises(InvalidInputError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
        await start(workers=1, base_port=port)


def test_impossible_speed():
    with pytest.raises(InvalidInputError, match="more than 0 and at most 1000, got 0"):
        EmulatorSettings(speed=0.0)


async def ask_rank(client, url, number, **more):
    headers = {} if number is None else {RANK_HEADER: number}
    document = {"model": "emulated", "prompt": "x", "max_tokens": 1} | more
    async with client.post(url + TEXT, json=document, headers=headers) as response:
        return response.status, await response.read()


@pytest.mark.parametrize("ranks_are_global", [False, True])
async def test_several_ranks_behind_one_port_by_number(ranks_are_global, start, client):
    emulator = await start(workers=4, ranks_per_url=2, ranks_are_global=ranks_are_global)
    assert len(emulator.urls) == 2
    url, first = emulator.urls[1], 2 if ranks_are_global else 0
    for number, served in ((first, [0, 0, 1, 0]), (first + 1, [0, 0, 1, 1])):
        assert (await ask_rank(client, url, str(number)))[0] == 200
        assert emulator.deployment.prompt_tokens_total == served
    for wrong in (first + 2, 10**20, *([first - 1] if first else [])):
        status, body = await ask_rank(client, url, str(wrong))
        assert (status, orjson.loads(body)["error"]["code"]) == (400, 400)
        status, body = await ask_rank(client, url, str(wrong), stream=True)
        documents, done = events(body)
        assert (status, [d["error"]["code"] for d in documents], done) == (200, [400], True)
    # What is no number is ignored, as if nobody had said anything.
    assert (await ask_rank(client, url, "x"))[0] == (await ask_rank(client, url, None))[0] == 200
    assert sum(emulator.deployment.prompt_tokens_total[2:]) == 4
    assert sum(emulator.deployment.prompt_tokens_total[:2]) == 0
    async with client.get(url + "/metrics") as response:
        text = await response.text()
    assert text.count("# TYPE vllm:num_requests_running ") == 1
    assert {f'engine="{rank}"' in text for rank in (2, 3)} == {True}
    assert 'engine="0"' not in text


def test_workers_fill_their_ports():
    with pytest.raises(InvalidInputError, match="behind a port must be a part of all 8, got 3"):
        EmulatorSettings(ranks_per_url=3)


async def test_an_emulation_that_cannot_keep_up_says_by_how_much_steps_are_late(start, client):
    # Steps of 30 µs, shorter than any timer.
    emulator = await start(1, speed=1000.0)
    assert emulator.deployment.late_share == 0
    body = {"model": "emulated", "prompt": [7], "max_tokens": 50}
    async with client.post(emulator.urls[0] + "/v1/completions", json=body) as response:
        assert response.status == 200
    async with client.get(emulator.urls[0] + "/emulator/stats") as response:
        assert (await response.json())["late_share"] > 1
    await client.post(emulator.urls[0] + "/emulator/reset")
    assert emulator.deployment.late_share == 0
