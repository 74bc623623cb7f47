"""Whole deployments: health checks, many streams, several models, the OpenAI SDK."""

import asyncio
import re

import openai
import pytest

from brproxy.app import running_proxy
from brproxy.config import parse_config
from brproxy.ledger import Ledger
from brproxy.routing.policy import POLICIES
from loadgen.client import ClientSettings, Lengths, Replay
from loadgen.cluster import ClusterSettings
from loadgen.emulator.server import EmulatorSettings, running_emulator
from loadgen.workload import TraceRequest, Workload


async def test_the_openai_sdk_streams_and_lists_models(start_emulator, start_proxy, stack):
    proxy = await start_proxy((await start_emulator(2)).urls)
    sdk = await stack.enter_async_context(openai.AsyncOpenAI(base_url=proxy.url + "/v1", api_key="k"))
    assert [model.id async for model in sdk.models.list()] == ["emulated"]
    messages = [{"role": "user", "content": "count to five"}]
    stream = await sdk.chat.completions.create(model="emulated", messages=messages, max_tokens=5, stream=True)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == " 1 2 3 4 5"
    whole = await sdk.chat.completions.create(model="emulated", messages=messages, max_tokens=3)
    assert (whole.choices[0].message.content, whole.usage.prompt_tokens) == (" 1 2 3", 3)
    with pytest.raises(openai.NotFoundError, match="`nope` does not exist"):
        await sdk.completions.create(model="nope", prompt="x")
    await proxy.idle()


@pytest.mark.parametrize("policy", POLICIES.names())
async def test_many_streams_under_every_policy(policy, start_emulator, start_proxy):
    emulator = await start_emulator(4, slots=6, speed=10.0)
    proxy = await start_proxy(emulator.urls, worker={"slots": 6}, routing={"policy": policy})
    # More than are served at once: with early binding they wait in the workers.
    requests = tuple(TraceRequest(i * 0.02, 5 + 40 * (i % 7), 10 + i % 13) for i in range(60))
    settings = ClientSettings(proxy.url, speed=10.0, lengths=Lengths.HIDDEN, verify=True)
    outcomes = await Replay(Workload("mixed", requests), settings, lambda _: None).run()
    assert [outcome.failure for outcome in outcomes] == [None] * 60
    assert [outcome.output_tokens for outcome in outcomes] == [r.output_tokens for r in requests]
    await proxy.idle()


async def test_with_a_free_slot_and_an_empty_pool_nobody_waits_for_a_tick(
    start_emulator, start_proxy, client, monkeypatch
):
    bound_by = []
    bind = Ledger.bind

    def noting(self, *arguments, **more):
        bound_by.append(asyncio.current_task())
        return bind(self, *arguments, **more)

    monkeypatch.setattr(Ledger, "bind", noting)
    proxy = await start_proxy((await start_emulator(1)).urls)
    document = {"model": "emulated", "prompt": "x", "max_tokens": 1}
    for _ in range(3):
        async with client.post(proxy.url + "/v1/completions", json=document) as response:
            assert response.status == 200
    assert len(bound_by) == 3
    assert None not in bound_by, "a tick is a callback of the loop, no handler's task"


async def test_a_burst_is_decided_in_rounds(start_worker, start_proxy, client, fixed, until):
    go_on = asyncio.Event()

    async def script(writer):
        await go_on.wait()
        writer.write(fixed(b"{}"))
        return True

    proxy = await start_proxy(
        [(await start_worker(script)).url], worker={"slots": 4}, routing={"tick_ms": 100}
    )
    document = {"model": "emulated", "prompt": "x", "max_tokens": 10}

    async def ask():
        async with client.post(proxy.url + "/v1/completions", json=document) as response:
            return response.status

    asked = asyncio.gather(*(ask() for _ in range(20)))
    await until(lambda: (proxy.ledger.bound, proxy.waiting) == (4, 16))
    # Four end within a turn of the loop or two, and their slots go to others at the next tick.
    go_on.set()
    assert set(await asked) == {200}
    async with client.get(proxy.url + "/metrics") as response:
        text = await response.text()
    admitted = re.search(r'brproxy_admitted_total{group="default"} (\S+)', text)[1]
    rounds = re.search(r'brproxy_round_seconds_count{group="default"} (\S+)', text)[1]
    assert float(admitted) == 20
    assert float(rounds) < 20
    await proxy.idle()


async def test_the_model_picks_the_barrier_group(start_emulator, start_proxy, client):
    small, large = await start_emulator(2, model="small"), await start_emulator(1, model="large")
    workers = [
        *({"url": url, "group": "s", "model": "small"} for url in small.urls),
        *({"url": url, "group": "l", "model": ["large"]} for url in large.urls),
    ]
    proxy = await start_proxy((), workers=workers)
    for model in ("small", "large", "small"):
        document = {"model": model, "prompt": "x", "max_tokens": 2}
        async with client.post(proxy.url + "/v1/completions", json=document) as response:
            assert (await response.json())["model"] == model
    async with client.get(proxy.url + "/v1/models") as response:
        assert [entry["id"] for entry in (await response.json())["data"]] == ["small", "large"]
    async with client.get(proxy.url + "/metrics") as response:
        text = await response.text()
    assert 'brproxy_requests_total{group="s",outcome="finished"} 2.0' in text
    assert 'brproxy_requests_total{group="l",outcome="finished"} 1.0' in text


async def test_a_worker_goes_out_and_comes_back(start_emulator, start_proxy, client, until, stack):
    settings = EmulatorSettings(ClusterSettings(workers=1, step_base_s=0.01))
    first = running_emulator(settings)
    running = await first.__aenter__()
    port = int(running.urls[0].rsplit(":", 1)[1])
    other = await start_emulator(1)
    proxy = await start_proxy([*running.urls, *other.urls], health=True, health_table={"unhealthy_after": 2})
    health = proxy.groups[0].roster
    assert health.routable() == (True, True)
    await first.__aexit__(None, None, None)
    await until(lambda: health.routable() == (False, True))
    for _ in range(4):
        async with client.post(
            proxy.url + "/v1/completions", json={"model": "emulated", "prompt": "x", "max_tokens": 1}
        ) as response:
            assert response.status == 200
    again = EmulatorSettings(settings.cluster, base_port=port)
    await stack.enter_async_context(running_emulator(again))
    await until(lambda: health.routable() == (True, True))


async def test_a_request_waits_for_the_first_worker_to_come_up(
    start_proxy, client, stack, unused_tcp_port, until
):
    url = f"http://127.0.0.1:{unused_tcp_port}"
    proxy = await start_proxy([url], health=True)
    document = {"model": "emulated", "prompt": "x", "max_tokens": 1}
    asked = asyncio.create_task(client.post(proxy.url + "/v1/completions", json=document))
    await until(lambda: proxy.waiting == 1)
    settings = EmulatorSettings(ClusterSettings(workers=1, step_base_s=0.01), base_port=unused_tcp_port)
    await stack.enter_async_context(running_emulator(settings))
    response = await asked
    assert response.status == 200
    response.close()
    await proxy.idle()


async def ask_for(client, url, tokens, prompt="x"):
    document = {"model": "emulated", "prompt": prompt, "max_tokens": tokens}
    async with client.post(url + "/v1/completions", json=document) as response:
        assert response.status == 200
        await response.read()


async def test_what_was_learnt_survives_a_restart(start_emulator, client, tmp_path):
    emulator = await start_emulator(1)
    document = {
        "listen": {"port": 0},
        "worker": [{"url": emulator.urls[0]}],
        "prediction": {"state_file": str(tmp_path / "state.json")},
    }
    config = parse_config(document, "test")
    async with running_proxy(config) as first:
        for _ in range(3):
            await ask_for(client, f"http://127.0.0.1:{first.port}", 7)
    async with running_proxy(config) as second:
        before, after = (server.service.fleet.groups[0].dispatcher.predictor for server in (first, second))
        # Cut by their limits: each would have been longer than that.
        assert after.state() == before.state() == {"lengths": [-1 - 7] * 3}
        # But that is how long they stayed.
        assert after.mean_output_tokens == before.mean_output_tokens == 7


async def test_prompts_that_come_again_are_known(start_emulator, start_proxy, client):
    emulator = await start_emulator(1)
    proxy = await start_proxy(
        emulator.urls, routing={"policy": "br-h"}, prediction={"predictor": "exact-match"}
    )
    for _ in range(4):
        await ask_for(client, proxy.url, 9, "the same prompt")
        await ask_for(client, proxy.url, 40, "another prompt")
    predictor = proxy.groups[0].dispatcher.predictor
    known = dict(predictor.state()["levels"][0])
    # Cut by their limits: each would have been longer than that.
    assert sorted(known.values()) == [[-1 - 40] * 4, [-1 - 9] * 4]


async def test_metrics_tell_how_good_predictions_are(start_emulator, start_proxy, client):
    # Enough slots that some request runs whenever a round samples one, also on a slow machine.
    emulator = await start_emulator(1, slots=4)
    proxy = await start_proxy(
        emulator.urls, worker={"slots": 4}, routing={"policy": "br-h", "br-h": {"horizon_steps": 20}}
    )
    await asyncio.gather(*(ask_for(client, proxy.url, 10 + i % 30) for i in range(150)))
    async with client.get(proxy.url + "/metrics") as response:
        samples = re.search(r'brproxy_prediction_samples{group="default"} (\S+)', await response.text())
    assert float(samples[1]) > 0
