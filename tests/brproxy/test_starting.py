"""A new user's first two commands, and what `check` shows of a file beside the engines."""

import asyncio
import tomllib

import aiohttp
import pytest

from brproxy.config import load_config
from tests.brproxy.engine_pages import MODEL, SGLANG, VLLM, cache_config, server_info, serving
from tests.brproxy.test_cli import run, run_process, start
from tests.brproxy.test_cli import serving as serving_proxy


@pytest.fixture
def engine(stack):
    async def start(pages, **settings):
        return await stack.enter_async_context(serving(pages, **settings))

    return start


async def completed(url):
    """Have a completion through the proxy at ``url``."""
    document = {"model": "emulated", "prompt": "x", "max_tokens": 2}
    async with aiohttp.ClientSession() as session:
        for _ in range(2):
            async with session.post(url + "/v1/completions", json=document) as response:
                assert response.status == 200, await response.text()


async def stop(process):
    process.terminate()
    await process.communicate()
    assert process.returncode == 0


@pytest.mark.parametrize("sglang", [False, True])
async def test_init_and_serve_before_two_emulated_engines(start_emulator, tmp_path, sglang):
    emulator = await start_emulator(2, slots=5, sglang=sglang)
    out = tmp_path / "brproxy.toml"
    code, said, err = await run_process("init", *emulator.urls, "--out", str(out))
    assert (code, err) == (0, "")
    lines = said.splitlines()
    assert len(lines) == 3
    slots = "5" if sglang else "not told, 64 assumed (its --max-num-seqs)"
    for line, url in zip(lines[:2], emulator.urls, strict=True):
        assert line.startswith(f"{url}: {'SGLang 0.5.23' if sglang else 'vLLM 0.33.0'}; ")
        assert f"; slots: {slots}; " in line
        assert line.endswith("; models: emulated")
    assert lines[2] == f"{out}: written; next: brproxy check --config {out}, brproxy serve --config {out}"
    code, said, err = await run_process("check", "--config", str(out))
    assert (code, err) == (0, "")
    assert "policy br-0; workers by group: default (2)" in said
    assert "!" not in said
    process, url, _ = await serving_proxy("--config", str(out), "--port", "0")
    await completed(url)
    await stop(process)


@pytest.mark.parametrize("sglang", [False, True])
async def test_ranks_behind_one_url_are_written_as_the_server_takes_them(engine, tmp_path, sglang):
    pages = VLLM | {"/metrics": cache_config(engine=["4", "5"], kv_cache_size_tokens="5000")}
    if sglang:
        pages = SGLANG | {"/server_info": server_info(dp_size=2)}
    url = (await engine(pages)).url
    out = tmp_path / "x.toml"
    code, said, _ = await run("init", url, "--out", str(out))
    assert (code, "; DP ranks: 2; " in said) == (0, True)
    (worker,) = load_config(out).worker
    expected = ("0-1", "global", 0, 440_000) if sglang else ("4-5", "local", 4, 5000)
    assert (worker.ranks, worker.rank_mode, worker.rank_base, worker.kv_capacity_tokens) == expected


async def test_init_does_not_overwrite(engine, tmp_path):
    url = (await engine(VLLM)).url
    out = tmp_path / "mine.toml"
    out.write_text("mine")
    code, said, err = await run("init", url, "--out", str(out))
    assert (code, said) == (2, "")
    assert err == f"brproxy: {out}: is there already; --force overwrites it, --out writes another file\n"
    assert out.read_text() == "mine"
    code, _, err = await run("init", url, "--out", str(out), "--force")
    assert (code, err) == (0, "")
    (worker,) = tomllib.loads(out.read_text())["worker"]
    assert worker == {"url": url, "model": [MODEL, "sql"], "engine": "vllm", "kv_capacity_tokens": 921_600}


async def test_init_leaves_out_who_does_not_answer_and_says_so(engine, tmp_path, unused_tcp_port):
    url, dead = (await engine(SGLANG)).url, f"http://127.0.0.1:{unused_tcp_port}"
    out = tmp_path / "x.toml"
    code, said, err = await run("init", dead, url, "--out", str(out))
    assert (code, err) == (2, "")
    assert said.startswith(f"{dead}: FAILED: cannot connect to {dead}: Connection refused\n{url}: SGLang")
    (worker,) = tomllib.loads(out.read_text())["worker"]
    assert (worker["url"], worker["slots"], worker["kv_capacity_tokens"]) == (url, 256, 440_000)
    assert f'# url = "{dead}"' in out.read_text()


OWN = "each worker must have its own"


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        (["h:1"], "brproxy: command line: worker[0].url: must be like \"http://host:port\", got 'h:1'\n"),
        (
            ["http://h:1", "http://h:1/"],
            f"brproxy: command line: worker[1].url: 'http://h:1' is worker[0]'s already; {OWN}\n",
        ),
    ],
)
@pytest.mark.parametrize("command", ["init", "serve"])
async def test_urls_that_are_none(command, urls, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert await run(command, *urls) == (2, "", message)
    assert not list(tmp_path.iterdir())


async def test_where_no_engine_answers_nothing_is_written_and_nothing_started(tmp_path, unused_tcp_port):
    dead = f"http://127.0.0.1:{unused_tcp_port}"
    message = "brproxy: no engine answers at any of the URLs; give those that vLLM or SGLang listens on\n"
    refused = f"{dead}: FAILED: cannot connect to {dead}: Connection refused\n"
    out = tmp_path / "x.toml"
    assert await run("init", dead, "--out", str(out)) == (2, refused, message)
    assert not out.exists()
    code, said, err = await run_process("serve", dead, "--port", "0")
    assert (code, said) == (2, "")
    assert err.endswith(f"WARNING left out: {refused}{message}")


async def test_a_file_that_cannot_be_written(engine, tmp_path):
    out = tmp_path / "none" / "x.toml"
    code, _, err = await run("init", (await engine(VLLM)).url, "--out", str(out))
    assert (code, err) == (2, f"brproxy: {out}: cannot be written: No such file or directory\n")


async def test_serve_needs_no_file(start_emulator, unused_tcp_port):
    emulator = await start_emulator(2, sglang=True, slots=3)
    dead = f"http://127.0.0.1:{unused_tcp_port}"
    process, url, said = await serving_proxy(*emulator.urls, dead, "--port", "0")
    assert "groups: default (2 workers)" in said
    assert said.count("INFO    http://127.0.0.1:") == 2
    assert f"WARNING left out: {dead}: FAILED: cannot connect to {dead}: Connection refused\n" in said
    assert said.count("slots: 3") == 2
    await completed(url)
    await stop(process)


async def test_serve_addresses_each_rank_behind_a_url(start_emulator):
    emulator = await start_emulator(2, ranks_per_url=2, ranks_are_global=True, sglang=True)
    process, url, said = await serving_proxy(*emulator.urls, "--port", "0")
    assert "groups: default (2 workers)" in said
    await completed(url)
    await stop(process)
    assert all(emulator.deployment.output_tokens_total)


async def test_a_file_and_urls_exclude_each_other(tmp_path):
    message = "brproxy: serve needs either --config FILE or the URLs of workers, and not both\n"
    assert await run("serve") == (2, "", message)
    assert await run("serve", "--config", str(tmp_path / "x"), "http://h:1") == (2, "", message)


def file_with(path, *tables, timeout_s=60, enabled=True):
    text = f"[listen]\nport = 0\n[discovery]\ntimeout_s = {timeout_s}\nenabled = {str(enabled).lower()}\n"
    path.write_text(text + "".join(f"[[worker]]\n{table}\n" for table in tables))
    return str(path)


async def test_what_a_file_leaves_out_is_filled_in_at_start(engine, tmp_path):
    url = (await engine(SGLANG)).url
    path = file_with(tmp_path / "x.toml", f'url = "{url}"\nname = "w"\nengine = "sglang"\nslots = 8')
    process, _, said = await serving_proxy("--config", path)
    await stop(process)
    assert (
        "INFO    worker w [default]: SGLang 0.5.23; slots: 8; KV capacity: 440,000 tokens (it says); " in said
    )
    assert "WARNING worker w [default]: slots = 8 in the file, but it runs 256 at once\n" in said


async def test_a_start_waits_for_the_silent_no_longer_than_it_may(engine, tmp_path):
    silent = await engine({"/health": b""}, silent=["/version", "/v1/models"])
    path = file_with(tmp_path / "x.toml", f'url = "{silent.url}"\nname = "w"', timeout_s=0.3)
    process, _, said = await serving_proxy("--config", path)
    await stop(process)
    assert "WARNING worker w [default] could not be asked who it is: it did not answer within 0.3 s\n" in said


async def test_a_start_asks_nobody_where_that_is_off(engine, tmp_path):
    server = await engine(SGLANG)
    path = file_with(tmp_path / "x.toml", f'url = "{server.url}"\nengine = "sglang"', enabled=False)
    process, _, said = await serving_proxy("--config", path)
    await stop(process)
    # Of its health and its load, as of every worker.
    assert set(server.asked) <= {"/health", "/v1/loads", "/v1/models"}, "no more than while it runs"
    assert "SGLang" not in said


async def test_check_shows_what_the_file_and_the_engine_say(engine, tmp_path):
    fits, not_fits = await engine(SGLANG), await engine(VLLM)
    path = file_with(
        tmp_path / "x.toml",
        f'url = "{fits.url}"\nname = "a"\ngroup = "a"\nengine = "sglang"\nslots = 256',
        f'url = "{not_fits.url}"\nname = "b"\ngroup = "b"\nkv_capacity_tokens = 5\nmodel = "other"',
    )
    code, said, err = await run("check", "--config", path)
    assert (code, err) == (0, "")
    first, a, b, *rest = said.splitlines()
    assert first.endswith("workers by group: a (1), b (1)")
    assert a.startswith("worker a [a]: ok, ")
    assert a.endswith(
        f" ms; SGLang 0.5.23; slots: 256; KV capacity: 440,000 tokens (it says); models: {MODEL}"
    )
    assert b.endswith(
        " ms; vLLM 0.33.0; slots: 64 (the default; it does not say); KV capacity: 5 tokens; "
        f"models: {MODEL}, sql"
    )
    assert rest == [
        "! worker b [b]: kv_capacity_tokens = 5 in the file, but it has 921600",
        "! worker b [b]: configured but not served: other",
    ]


async def test_check_tells_of_a_worker_that_is_well_but_no_engine(engine, tmp_path):
    server = await engine({"/health": b""})
    code, said, _ = await run("check", "--config", file_with(tmp_path / "x.toml", f'url = "{server.url}"'))
    assert code == 0
    assert said.rstrip().endswith(" ms; it answers 404 to everything: no engine is there")


async def test_a_start_can_be_ended_while_it_asks(engine, tmp_path):
    silent = await engine({}, silent=["/version", "/v1/models"])
    path = file_with(tmp_path / "x.toml", f'url = "{silent.url}"', timeout_s=600)
    process = await start("serve", "--config", path)
    while not silent.asked:
        await asyncio.sleep(0.01)
    process.terminate()
    _, err = await process.communicate()
    assert process.returncode == 0
    assert b"listens on" not in err
    assert b"Traceback" not in err
