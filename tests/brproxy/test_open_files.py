"""How many files the process may have open, and requests with them."""

import asyncio
import resource
import sys

import pytest

from brproxy.open_files import (
    clients_for_open_files,
    file_number_max,
    raise_open_files_limit,
    requests_for_open_files,
)
from tests.brproxy.wire import RawClient, get


@pytest.fixture
def limit():
    """Return a function that sets this process's own limit; the hard one stays."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda files: resource.setrlimit(resource.RLIMIT_NOFILE, (files, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_is_raised_to_what_the_system_allows(limit):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit(300)
    assert raise_open_files_limit() == hard
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    assert raise_open_files_limit() == hard, "a second time changes nothing"


def test_a_system_that_does_not_allow_it_is_no_reason_to_stop(limit, monkeypatch, caplog):
    limit(300)

    def refuse(*_):
        raise ValueError("not allowed to raise maximum limit")

    with monkeypatch.context() as patched:
        patched.setattr(resource, "setrlimit", refuse)
        assert raise_open_files_limit() == 300
    assert "the limit of 300 open files stays as it is: not allowed" in caplog.text


def test_no_more_requests_than_there_are_files_for(limit):
    limit(1256)
    assert requests_for_open_files() == 500
    limit(100)
    assert requests_for_open_files() == 1, "never none"


def test_clients_and_file_numbers_leave_files_for_workers(limit):
    for files in (300, 600, 1024):
        limit(files)
        requests = requests_for_open_files()
        assert clients_for_open_files() + requests < file_number_max() < files


SERVE = """
import asyncio, sys
from pathlib import Path
import uvloop
from brproxy.app import serve
from brproxy.config import load_config
from brproxy.logs import configure_logging
config = load_config(Path(sys.argv[1]))
configure_logging("info", "text")
{"asyncio": asyncio, "uvloop": uvloop}[sys.argv[2]].run(serve(config))
"""
FILES = 400
IDLE = 600


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_with_few_files_idle_clients_give_way_and_workers_stay_healthy(
    loop, tmp_path, start_emulator, stack, client
):
    (worker,) = (await start_emulator(1)).urls
    path = tmp_path / "brproxy.toml"
    path.write_text(f'[listen]\nport = 0\n[health]\ninterval_s = 0.05\n[[worker]]\nurl = "{worker}"\n')
    command = f'ulimit -n {FILES}; exec "$0" -c "$1" "$2" "$3"'
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", command, sys.executable, SERVE, str(path), loop), stderr=asyncio.subprocess.PIPE
    )
    try:
        while "listens on" not in (told := (await process.stderr.readline()).decode()):
            assert told
        port = int(told.split("listens on ")[1].split(",")[0].rsplit(":", 1)[1])
        clients = []
        for number in range(IDLE):
            clients.append(await RawClient.connect(port))
            stack.callback(clients[-1].writer.close)
            # Half of them have asked before, the others only connect; none leaves.
            if number % 2:
                clients[-1].send(get("/health"))
                assert (await clients[-1].answer()).status == 200
        url = f"http://127.0.0.1:{port}"
        document = {"model": "emulated", "prompt": "x", "max_tokens": 3}
        for _ in range(3):
            async with client.post(url + "/v1/completions", json=document) as response:
                assert response.status == 200
        async with client.get(url + "/metrics") as response:
            assert f'routable{{group="default",worker="{worker[7:]}"}} 1.0' in await response.text()
        # The last that connected are those that are still there.
        assert all(await asyncio.gather(*(early.ended() for early in clients[:300])))
        clients[-1].send(get("/health"))
        assert (await clients[-1].answer()).status == 200
    finally:
        process.terminate()
        _, told = await process.communicate()
    assert b"idle clients gave way to new ones" in told
    assert b"Too many open files" not in told
    assert b"unhealthy" not in told
    assert len(told.splitlines()) < 12, "it is not told for each of them"
