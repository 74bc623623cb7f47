"""LoRA adapters over real sockets: requests go to workers that have them, loads go to all."""

import orjson
import pytest

ASKED = {"telemetry": {"enabled": True, "interval_s": 600}}
OPENAI = {"engine": "openai"}


class Engine:
    """A scripted worker that lists its adapters as engines do, and loads them unless it is told to refuse."""

    def __init__(self, fixed, *adapters):
        self.fixed = fixed
        self.adapters = set(adapters)
        self.refuses = False
        self.worker = None

    @property
    def asked(self):
        return [line.split()[1] for line, _, _ in self.worker.requests]

    @property
    def served(self):
        return self.asked.count("/v1/completions")

    async def script(self, writer):
        line, _, body = self.worker.requests[-1]
        path = line.split()[1]
        status, answer = "200 OK", b'{"usage":{"prompt_tokens":1,"completion_tokens":1}}'
        if path == "/v1/models":
            entries = [{"id": "base", "parent": None}, *({"id": a, "parent": "base"} for a in self.adapters)]
            answer = orjson.dumps({"object": "list", "data": entries})
        elif path.endswith("load_lora_adapter") and self.refuses:
            status, answer = "400 Bad Request", b'{"error":"no"}'
        elif path == "/v1/load_lora_adapter":
            self.adapters.add(orjson.loads(body)["lora_name"])
        elif path == "/v1/unload_lora_adapter":
            self.adapters.discard(orjson.loads(body)["lora_name"])
        writer.write(self.fixed(answer, status))
        return True


@pytest.fixture
def engines(start_worker, fixed):
    """Return a function that starts an engine for each of the lists of adapters."""

    async def start(*lists):
        made = [Engine(fixed, *adapters) for adapters in lists]
        for engine in made:
            engine.worker = await start_worker(engine.script)
        return made

    return start


async def asks(client, proxy, model, path="/v1/completions", **document):
    async with client.post(proxy.url + path, json={"model": model, "prompt": "x"} | document) as response:
        return response.status, await response.read()


async def changes(client, proxy, what, **document):
    headers = {"Authorization": "Bearer key"}
    url = f"{proxy.url}/v1/{what}_lora_adapter"
    async with client.post(url, json=document, headers=headers) as response:
        return response.status, await response.read()


def adapters_of(proxy, group="default"):
    return proxy.running.service.groups[group].adapters


async def test_who_has_an_adapter_gets_its_requests(engines, start_proxy, client, until):
    made = await engines([], ["sql"], [])
    proxy = await start_proxy([e.worker.url for e in made], worker=OPENAI, **ASKED)
    await until(lambda: adapters_of(proxy).names == {"sql"})
    for _ in range(4):
        assert (await asks(client, proxy, "sql"))[0] == 200
    assert [e.served for e in made] == [0, 4, 0]
    for _ in range(12):
        await asks(client, proxy, "base")
    assert all(e.served for e in made)


async def test_a_load_goes_to_all_and_counts_before_it_is_answered(engines, start_proxy, client, until):
    made = await engines([], [])
    proxy = await start_proxy([e.worker.url for e in made], worker=OPENAI, **ASKED)
    await until(lambda: all("/v1/models" in e.asked for e in made))
    assert (await changes(client, proxy, "load", lora_name="sql", lora_path="/a"))[0] == 200
    assert [e.adapters for e in made] == [{"sql"}, {"sql"}]
    assert adapters_of(proxy).names == {"sql"}
    loads = [headers for e in made for line, headers, _ in e.worker.requests if "load_lora" in line]
    assert [headers["authorization"] for headers in loads] == ["Bearer key"] * 2
    assert (await changes(client, proxy, "unload", lora_name="sql"))[0] == 200
    assert adapters_of(proxy).names == frozenset()


async def test_the_first_failure_is_the_answer_and_who_has_it_serves(engines, start_proxy, client):
    made = await engines([], [], [])
    made[1].refuses = True
    proxy = await start_proxy([e.worker.url for e in made], worker=OPENAI, **ASKED)
    answer = await changes(client, proxy, "load", lora_name="sql", lora_path="/a")
    assert answer == (400, b'{"error":"no"}')
    for _ in range(9):
        await asks(client, proxy, "sql")
    assert made[1].served == 0


async def test_a_worker_that_cannot_be_reached_fails_a_load(engines, start_proxy, client, unused_tcp_port):
    made = await engines([])
    urls = [made[0].worker.url, f"http://127.0.0.1:{unused_tcp_port}"]
    proxy = await start_proxy(urls, worker=OPENAI, **ASKED)
    status, body = await changes(client, proxy, "load", lora_name="sql", lora_path="/a")
    assert (status, str(unused_tcp_port) in body.decode()) == (502, True)
    assert made[0].adapters == {"sql"}


async def test_an_adapter_is_a_model_that_no_file_names(engines, start_proxy, client, until):
    made = await engines([], ["sql"])
    names = ("one", "other")
    workers = [
        {"url": e.worker.url, "group": name, "model": name, **OPENAI}
        for e, name in zip(made, names, strict=True)
    ]
    proxy = await start_proxy([], workers=workers, **ASKED)
    await until(lambda: adapters_of(proxy, "other").names == {"sql"})
    assert (await asks(client, proxy, "sql"))[0] == 200
    assert [e.served for e in made] == [0, 1]
    assert (await asks(client, proxy, "law"))[0] == 404
    # Loads go to the groups that serve the base model.
    await changes(client, proxy, "load", lora_name="law", lora_path="/a", base_model_name="one")
    assert [e.adapters for e in made] == [{"law"}, {"sql"}]
    status, _ = await changes(client, proxy, "load", lora_name="law", base_model_name="nobody's")
    assert status == 400


async def test_one_that_comes_back_is_asked_again(engines, start_proxy, client, until):
    made = await engines(["sql"])
    proxy = await start_proxy([made[0].worker.url], worker=OPENAI, **ASKED)
    await until(lambda: adapters_of(proxy).names == {"sql"})
    (member,) = proxy.groups[0].roster.members
    made[0].adapters = {"law"}
    for ok in (False, False, False, True):
        proxy.groups[0].roster.record(member, ok=ok, reason="", now_s=0.0)
    await until(lambda: adapters_of(proxy).names == {"law"})


@pytest.mark.parametrize("length", [None, 1 << 20])
async def test_a_body_without_bounds_is_refused(length, engines, start_proxy, client):
    made = await engines([])
    proxy = await start_proxy([made[0].worker.url], worker=OPENAI)

    async def pieces():
        yield b"x"

    body = pieces() if length is None else b"x" * length
    async with client.post(proxy.url + "/v1/load_lora_adapter", data=body) as response:
        assert response.status == 400
    assert made[0].asked == []
