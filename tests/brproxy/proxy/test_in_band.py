"""Load that comes with responses: asked for, taken up, and seen by no client that did not ask."""

import orjson
import pytest

ASK = {"model": "m", "prompt": "hi"}
POLLED = {"enabled": True, "interval_s": 3600, "timeout_s": 60, "lag_s": 0.05, "stale_s": 3600}
ON = POLLED | {"in_band": True}
FIELD = "endpoint-load-metrics"
FORMAT = "endpoint-load-metrics-format"
SAYS = 'JSON {"named_metrics": {"kv_cache_usage_perc": 0.5, "num_requests_waiting": 7.0}}'


def page(*ranks):
    lines = []
    for rank in ranks:
        lines += [
            f'vllm:num_requests_waiting{{engine="{rank}"}} 0',
            f'vllm:num_requests_running{{engine="{rank}"}} 0',
            f'vllm:kv_cache_usage_perc{{engine="{rank}"}} 0',
            f'vllm:cache_config_info{{engine="{rank}",kv_cache_size_tokens="1000"}} 1',
        ]
    return "\n".join(lines).encode()


class Engine:
    """An engine that says its load with each answer."""

    def __init__(self):
        self.ranks = ("0",)
        self.says = SAYS
        self.heads = []

    async def script(self, worker, reader, writer):
        while True:
            await worker.read_request(reader)
            head = worker.requests[-1]
            if head.startswith(b"GET "):
                self.write(writer, page(*self.ranks))
            else:
                self.heads.append(head.lower())
                line = f"Endpoint-Load-Metrics: {self.says}\r\n" if self.says else ""
                self.write(writer, orjson.dumps({"choices": []}), line)

    def write(self, writer, body, line=""):
        framing = (
            f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{line}"
        )
        writer.write(framing.encode() + b"\r\n" + body)


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def start(engine, raw_worker, start_proxy, until):
    async def start(telemetry=ON, worker=None):
        one = await raw_worker(engine.script)
        proxy = await start_proxy([one.url], telemetry=telemetry, worker=worker)
        if telemetry["enabled"] and worker is None:
            await until(lambda: report(proxy) is not None)
        return proxy

    return start


def signals(proxy):
    return proxy.running.service.groups["default"].signals


def report(proxy):
    ((_, known),) = signals(proxy).known()
    return known.report


async def ask(client, proxy, **headers):
    async with client.post(proxy.url + "/v1/completions", json=ASK, headers=headers) as response:
        assert response.status == 200
        assert orjson.loads(await response.read()) == {"choices": []}
        return response.headers


async def test_it_is_asked_for_and_taken_up_and_no_client_sees_it(engine, start, client):
    proxy = await start()
    assert FIELD not in await ask(client, proxy)
    (head,) = engine.heads
    assert head.count(b"\r\n" + FORMAT.encode() + b": json\r\n") == 1
    assert (report(proxy).waiting, report(proxy).kv_used_tokens, report(proxy).running) == (7, 500, 0)
    assert signals(proxy).in_band == {"taken": 1, "bad": 0}
    async with client.get(proxy.url + "/metrics") as response:
        text = await response.text()
    assert 'brproxy_engine_in_band_total{group="default",result="taken"} 1.0' in text


async def test_a_client_that_asks_by_itself_gets_what_it_asked_for(engine, start, client):
    engine.says = "TEXT named_metrics.num_requests_waiting=4.0"
    proxy = await start()
    headers = await ask(client, proxy, **{"Endpoint-Load-Metrics-Format": "TEXT"})
    assert headers[FIELD] == engine.says
    (head,) = engine.heads
    assert head.count(FORMAT.encode()) == 1
    assert b": text\r\n" in head
    assert report(proxy).waiting == 4
    assert report(proxy).kv_used_tokens == 0, "what is absent is not zero: it is as it was"


async def test_what_is_bad_is_counted_and_changes_nothing(engine, start, client):
    engine.says = 'JSON {"named_metrics": {"num_requests_waiting": -4}}'
    proxy = await start()
    before = report(proxy)
    assert FIELD not in await ask(client, proxy)
    assert report(proxy) == before
    assert signals(proxy).in_band == {"taken": 0, "bad": 1}


async def test_what_does_not_come_changes_nothing(engine, start, client):
    engine.says = ""
    proxy = await start()
    before = report(proxy)
    await ask(client, proxy)
    assert report(proxy) == before
    assert signals(proxy).in_band == {"taken": 0, "bad": 0}


async def test_of_several_engines_behind_one_url_nobody_knows_whose_it_is(engine, start, client):
    engine.ranks = ("0", "1")
    proxy = await start()
    before = report(proxy)
    assert FIELD not in await ask(client, proxy)
    assert report(proxy) == before


@pytest.mark.parametrize("telemetry", [POLLED, {"enabled": False, "in_band": True}])
async def test_where_it_is_off_all_passes_as_it_is(telemetry, engine, start, client):
    proxy = await start(telemetry)
    assert (await ask(client, proxy))[FIELD] == SAYS
    assert FORMAT.encode() not in engine.heads[0]


async def test_another_engine_is_not_asked(engine, start, client):
    proxy = await start(worker={"engine": "sglang"})
    assert (await ask(client, proxy))[FIELD] == SAYS
    assert FORMAT.encode() not in engine.heads[0]
