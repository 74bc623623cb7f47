"""``brproxy workers``, SIGHUP and the delay before stopping, as their users have them: with processes."""

import asyncio
import signal

import aiohttp
import pytest

from tests.brproxy.test_cli import run, run_process, serving, start

TOKEN = "s3cret"
DEAD = [f"http://127.0.0.1:{port}" for port in range(1, 5)]


@pytest.fixture
def config(tmp_path, unused_tcp_port):
    """Return a function that writes a file with workers of these URLs."""
    token = tmp_path / "token"
    token.write_text(TOKEN)

    def write(*urls, more="", health="enabled = false"):
        path = tmp_path / "brproxy.toml"
        text = (
            f'[listen]\nport = 0\n[admin]\nenabled = true\nport = {unused_tcp_port}\ntoken_file = "{token}"\n'
            f"[health]\n{health}\n[discovery]\nenabled = false\n{more}"
        )
        tables = [f'[[worker]]\nname = "dp-{i}"\nurl = "{url}"\n' for i, url in enumerate(urls)]
        path.write_text(text + "".join(tables))
        return str(path)

    return write


@pytest.fixture
async def serve(stack):
    """Return a function that starts a proxy, and ends it at the end of the test."""

    async def serve(path):
        process, url, _ = await serving("--config", path)

        async def end():
            if process.returncode is None:
                process.kill()
            await process.communicate()

        stack.push_async_callback(end)
        return process, url

    return serve


async def told(process, text):
    """Read the log up to a line that has ``text``, and return the lines."""
    lines = []
    while not lines or text not in lines[-1]:
        line = await process.stderr.readline()
        assert line, f"it ended: {lines}"
        lines.append(line.decode())
    return lines


async def test_every_command(config, serve):
    path = config(*DEAD[:2])
    await serve(path)

    async def ask(*words):
        return await run("workers", *words, "--config", path)

    code, out, _ = await run_process("workers", "list", "--config", path)
    header, *rows = [line.split() for line in out.splitlines() if line.strip()]
    assert (code, header[:5]) == (0, ["group", "name", "url", "state", "health"])
    *workers, names, group = rows
    assert [row[:5] for row in workers] == [
        ["default", f"dp-{i}", DEAD[i], "active", "healthy"] for i in range(2)
    ]
    assert names == ["group", "state", "workers", "requests", "waiting", "models"]
    assert group == ["default", "active", "2", "0", "0", "any"]
    expected = [
        (("add", DEAD[2], "name=late", "slots=3"), (0, "worker late [default]: added\n", "")),
        (
            ("add", DEAD[3], "slots=x", "nam=late"),
            (
                2,
                "",
                (
                    "brproxy: worker: slots: must be an integer, got 'x'\n"
                    "brproxy: worker: nam: unknown key; did you mean 'name'?\n"
                ),
            ),
        ),
        (
            ("add", DEAD[3], "slots"),
            (2, "", "brproxy: 'slots' must be like key=value, with a key of a [[work"),
        ),
        (("drain", "late"), (0, "worker late [default]: draining\n", "")),
        (("resume", "late"), (0, "worker late [default]: active\n", "")),
        (("remove", "dp-0"), (0, "worker dp-0 [default]: gone\n", "")),
        (("drain", "dp-0"), (2, "", "brproxy: there is no worker dp-0.\n")),
        (("reload",), (0, "added dp-0 [default]\nlate was added by the admin API and is kept\n", "")),
    ]
    for words, (code, out, err) in expected:
        got = await ask(*words)
        assert (got[0], got[1], got[2][: len(err)]) == (code, out, err), words


async def test_what_is_wrong_with_the_command_itself(config, unused_tcp_port, tmp_path):
    path = config(DEAD[0])
    url = f"http://127.0.0.1:{unused_tcp_port}"
    code, _, err = await run("workers", "list", "--config", path)
    assert (code, err) == (2, f"brproxy: {url}: the admin API cannot be reached: Connection refused\n")
    code, _, err = await run("workers", "list")
    assert (code, err) == (2, "brproxy: either --config FILE or --url URL says where the admin API is\n")
    code, _, err = await run("workers", "list", "--url", "https://h:1")
    assert err == "brproxy: --url: 'https://h:1' must begin with http://; the admin API speaks no HTTPS\n"
    off = tmp_path / "off.toml"
    off.write_text(f'[[worker]]\nurl = "{DEAD[0]}"\n')
    code, _, err = await run("workers", "list", "--config", str(off))
    assert err == (
        f"brproxy: {off}: admin.enabled: is false; it must be true for the proxy to have an admin API\n"
    )


async def test_one_that_is_no_admin_api_and_a_wrong_token(config, serve, unused_tcp_port, tmp_path):
    _, url = await serve(config(DEAD[0]))
    code, _, err = await run("workers", "list", "--url", url)
    assert code == 2
    assert err.count("\n") == 1
    admin = f"http://127.0.0.1:{unused_tcp_port}"
    code, _, err = await run("workers", "list", "--url", admin)
    assert (code, err) == (2, "brproxy: The admin API needs its token: Authorization: Bearer TOKEN.\n")
    code, _, _ = await run("workers", "list", "--url", admin, "--token-file", str(tmp_path / "token"))
    assert code == 0


async def test_sighup_applies_the_file_or_says_what_is_wrong_with_it(config, serve):
    path = config(*DEAD[:2])
    process, _ = await serve(path)
    config(DEAD[0], DEAD[2], more="[timeouts]\nstall_s = 7\n")
    process.send_signal(signal.SIGHUP)
    assert (await told(process, "reloaded"))[-1].endswith(
        f"reloaded {path}: replaced dp-1 [default] (url); needs a restart: timeouts.stall_s\n"
    )
    config(DEAD[0], more="[timeouts]\nstall_s = 0\nconect_s = 1\n")
    process.send_signal(signal.SIGHUP)
    lines = await told(process, "conect_s")
    assert [line.partition("not reloaded: ")[2] for line in lines] == [
        f"{path}: timeouts.stall_s: must be greater than 0, got 0\n",
        f"{path}: timeouts.conect_s: unknown key; did you mean 'connect_s'?\n",
    ]
    code, out, _ = await run("workers", "list", "--config", path)
    assert code == 2, "the command reads the same file"
    config(DEAD[0])
    code, out, _ = await run("workers", "list", "--config", path)
    assert (code, out.count(DEAD[2])) == (0, 1), "it goes on with what it had"
    process.send_signal(signal.SIGHUP)
    await told(process, "removed dp-1 [default]")


async def test_sighup_while_it_starts_ends_no_proxy(config, start_worker, until):
    checked = asyncio.Event()

    async def script(writer):
        await checked.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        return False

    worker = await start_worker(script)
    process = await start("serve", "--config", config(worker.url, health="timeout_s = 600"))
    await until(lambda: worker.requests)
    process.send_signal(signal.SIGHUP)
    checked.set()
    await told(process, "reloaded")
    process.terminate()
    await process.communicate()
    assert process.returncode == 0


async def test_the_delay_before_stopping(config, serve, start_worker, answer):
    worker = await start_worker(answer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"))
    process, url = await serve(config(worker.url, more="[timeouts]\ndrain_delay_s = 600\n"))
    async with aiohttp.ClientSession() as session:
        async with session.get(url + "/ready") as response:
            assert response.status == 200
        process.send_signal(signal.SIGTERM)
        await told(process, "new requests are served for 600 s more")
        async with session.get(url + "/ready") as response:
            assert (response.status, await response.text()) == (503, "shutting down\n")
        async with session.post(url + "/v1/completions", json={"prompt": "x"}) as response:
            assert (response.status, await response.text()) == (200, "{}")
    process.send_signal(signal.SIGTERM)
    _, err = await asyncio.wait_for(process.communicate(), 300)
    assert process.returncode == 0
    assert b"second signal" in err
    assert b"Traceback" not in err


async def test_after_the_delay_it_stops(config, serve):
    process, _ = await serve(config(DEAD[0], more="[timeouts]\ndrain_delay_s = 0.05\n"))
    process.send_signal(signal.SIGTERM)
    lines = await told(process, "stopped")
    assert process.stdin is None
    assert any("running requests have 30 s to finish" in line for line in lines)
    await process.wait()
    assert process.returncode == 0


async def test_a_second_signal_loses_nothing_that_was_learnt(config, serve, begun_for_ever, tmp_path):
    state = tmp_path / "state.json"
    more = f'[prediction]\nstate_file = "{state}"\n'
    process, url = await serve(config(await begun_for_ever(), more=more))
    document = {"prompt": "x", "stream": True}
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + "/v1/completions", json=document) as response,
    ):
        await response.content.readany()
        process.send_signal(signal.SIGTERM)
        await told(process, "running requests have")
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.communicate(), 300)
    assert process.returncode == 0
    assert state.exists()


@pytest.fixture
def begun_for_ever(start_worker, silence):
    async def start():
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
        return (await start_worker(silence(head + b'data: {"choices":[{"index":0,"text":" x"}]}\n\n'))).url

    return start
