"""The command as its users run it, with its words and exit codes."""

import asyncio
import io
import resource
import signal
import socket
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

import aiohttp
import pytest

from brproxy.cli import main

WORKER = '[[worker]]\nurl = "{}"\n'
UNASKED = "[health]\nenabled = false\n[discovery]\nenabled = false\n"


async def start(*arguments):
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "brproxy",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def run_process(*arguments):
    process = await start(*arguments)
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


def _ended(arguments):
    out, err = io.StringIO(), io.StringIO()
    command = patch.object(sys, "argv", ["brproxy", *arguments])
    with command, redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, out.getvalue(), err.getvalue()


async def run(*arguments):
    """Run a command that serves nobody, without a process: most of what one takes is to start."""
    return await asyncio.to_thread(_ended, arguments)


@pytest.fixture
def config(tmp_path):
    def write(*urls, text="[listen]\nport = 0\n"):
        path = tmp_path / "brproxy.toml"
        path.write_text(text + "".join(WORKER.format(url) for url in urls), encoding="utf-8")
        return str(path)

    return write


async def serving(*arguments):
    """Start the proxy and return the process, its URL, and what it said until it listened."""
    process = await start("serve", *arguments)
    said = ""
    while line := (await process.stderr.readline()).decode():
        said += line
        if "listens on " in line:
            return process, line.split("listens on ")[1].split(",")[0], said
    raise AssertionError(f"the proxy ended: {said}")


async def test_version():
    code, out, _ = await run_process("--version")
    assert (code, out.split()[0]) == (0, "brproxy")


@pytest.mark.parametrize("command", ["serve", "check"])
async def test_a_bad_file_is_one_line_and_exit_code_2(command, config):
    path = config("http://127.0.0.1:1", text='[routing]\npolicy = "br0"\n')
    code, out, err = await run_process(command, "--config", path)
    assert (code, out) == (2, "")
    assert err.startswith(f"brproxy: {path}: routing.policy: unknown policy 'br0'; allowed: br-0, br-h, ")
    assert err.count("\n") == 1


async def test_every_mistake_of_a_file_is_a_line(config):
    path = config("http://127.0.0.1:1", text='[routing]\npolicy = "br0"\ntick = 1\n[log]\nlevel = 3\n')
    code, out, err = await run("check", "--config", path)
    assert (code, out) == (2, "")
    keys = [line.removeprefix(f"brproxy: {path}: ").partition(": ")[0] for line in err.splitlines()]
    assert keys == ["routing.policy", "routing.tick", "log.level"]


async def test_a_missing_file():
    code, _, err = await run("serve", "--config", "/nowhere/x.toml")
    assert (code, err) == (2, "brproxy: /nowhere/x.toml: cannot be read: No such file or directory\n")


async def test_a_port_that_is_taken(config):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path = config("http://127.0.0.1:1", text=f"[listen]\nport = {port}\n" + UNASKED)
        code, _, err = await run_process("serve", "--config", path)
    assert code == 2
    assert err == (
        f"brproxy: listen: cannot listen on 127.0.0.1:{port}: Address already in use; choose a free port\n"
    )


async def test_the_limit_of_open_files_is_raised_and_requests_beyond_it_are_turned_away(config):
    text = "[listen]\nport = 0\n" + UNASKED
    command = 'ulimit -Sn 300; ulimit -Hn 600; exec "$0" -m brproxy serve --config "$1"'
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", command, sys.executable, config("http://127.0.0.1:1", text=text)),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        while b"listens on" not in await process.stderr.readline():
            pass
        told = (await process.stderr.readline()).decode()
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (600, 600)
    finally:
        process.terminate()
        await process.wait()
    assert "open files are enough for 172 requests at once, fewer than limits.requests_max = 65536" in told


async def test_check_says_a_line_for_each_worker(config, start_emulator, unused_tcp_port):
    emulator = await start_emulator(1)
    port = emulator.urls[0].rsplit(":", 1)[1]
    dead = f"http://127.0.0.1:{unused_tcp_port}"
    code, out, err = await run("check", "--config", config(*emulator.urls))
    assert (code, err) == (0, "")
    assert f"worker 127.0.0.1:{port} [default]: ok, " in out
    assert out.rstrip().endswith("; models: emulated")
    code, out, _ = await run("check", "--config", config(*emulator.urls, dead))
    assert code == 2
    assert f"[default]: FAILED: cannot connect to {dead}: Connection refused" in out
    assert len(out.splitlines()) == 3


async def test_check_tries_the_ranks_behind_a_url(config, start_emulator):
    emulator = await start_emulator(4, ranks_per_url=2)
    first, second = emulator.urls
    right = config(text=f'[[worker]]\nurl = "{second}"\nranks = "2-3"\nrank_base = 2\n')
    code, out, err = await run("check", "--config", right)
    assert (code, err) == (0, "")
    assert "workers by group: default (2)" in out
    assert out.rstrip().endswith("[default]: rank 3, sent as 1, is taken")
    wrong = config(first, text=f'[[worker]]\nurl = "{second}"\nranks = "2-3"\n')
    code, out, _ = await run("check", "--config", wrong)
    assert code == 2
    assert (
        "FAILED: rank 3, sent as 3, is refused (status 400: data_parallel_rank is out of range.); 1 is" in out
    )
    assert out.count("\n") == 4


CHUNK = b'data: {"choices":[{"index":0,"text":" x"}]}\n\n'
DONE = b"data: [DONE]\n\n"
UNCHECKED = f"[listen]\nport = 0\n{UNASKED}[timeouts]\ndrain_s = "


@pytest.fixture
def begun(start_worker):
    """Return a function that starts a worker whose streams begin, and end when ``may_end`` is set."""

    async def start(may_end):
        async def script(writer):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + CHUNK)
            await may_end.wait()
            writer.write(DONE)
            return False

        return (await start_worker(script)).url

    return start


async def stream_through(url, started):
    """Stream an answer; ``started`` is set at its first byte."""
    document = {"model": "emulated", "prompt": "x", "stream": True}
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + "/v1/completions", json=document) as response,
    ):
        received = await response.content.readany()
        started.set()
        return received + await response.content.read()


async def refused(url):
    """Wait until nobody listens there any more."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        except ConnectionRefusedError:
            return
        writer.close()
        await asyncio.sleep(0.01)


async def test_sigterm_finishes_streams_and_exits_0(config, begun):
    may_end = asyncio.Event()
    process, url, _ = await serving("--config", config(await begun(may_end), text=UNCHECKED + "600\n"))
    started = asyncio.Event()
    stream = asyncio.create_task(stream_through(url, started))
    await started.wait()
    process.send_signal(signal.SIGTERM)
    await refused(url)
    assert not stream.done()
    may_end.set()
    assert await stream == CHUNK + DONE
    _, err = await process.communicate()
    assert process.returncode == 0
    assert b"stopped" in err


async def test_a_second_signal_does_not_wait(config, begun):
    process, url, _ = await serving(
        "--config", config(await begun(asyncio.Event()), text=UNCHECKED + "600\n")
    )
    started = asyncio.Event()
    stream = asyncio.create_task(stream_through(url, started))
    await started.wait()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    _, err = await asyncio.wait_for(process.communicate(), 300)
    assert process.returncode == 0
    assert b"Traceback" not in err
    await asyncio.wait({stream})
    assert stream.exception() is not None or not stream.result().endswith(b"[DONE]\n\n")


async def test_streams_that_take_too_long_are_cut_off(config, begun):
    process, url, _ = await serving(
        "--config", config(await begun(asyncio.Event()), text=UNCHECKED + "0.2\n")
    )
    started = asyncio.Event()
    stream = asyncio.create_task(stream_through(url, started))
    await started.wait()
    process.send_signal(signal.SIGTERM)
    await asyncio.wait_for(process.communicate(), 300)
    assert process.returncode == 0
    await asyncio.wait({stream})
    assert stream.exception() is not None


async def test_json_logs(config, start_emulator):
    emulator = await start_emulator(1)
    path = config(*emulator.urls, text='[listen]\nport = 0\n[log]\nformat = "json"\n')
    process = await start("serve", "--config", path)
    line = await process.stderr.readline()
    process.terminate()
    await process.communicate()
    assert line.startswith(b'{"time":"')
    assert b'"level":"' in line
