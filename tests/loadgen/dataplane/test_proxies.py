"""Starting and ending what is compared."""

import asyncio
import sys
from pathlib import Path

import pytest

from brproxy.types import InvalidInputError
from loadgen.commands.processes import ProcessError
from loadgen.dataplane.loads import parse_phase
from loadgen.dataplane.proxies import Proxy, fill_in, parse_proxy, running

SERVER = """
import http.server, os, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(int(sys.argv[2])); self.send_header("Content-Length", "0"); self.end_headers()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[3], "w").write(str(child.pid))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_placeholders():
    command = ("p", "--listen=:{port}", "{workers}", "{config}", "{other}", "{port}{port}")
    filled = fill_in(command, 9100, ["http://a", "http://b"], Path("/x.toml"))
    assert filled == ["p", "--listen=:9100", "http://a,http://b", "/x.toml", "{other}", "91009100"]


def test_a_proxy_is_a_name_and_a_command_line():
    assert parse_proxy("old=env A=1 'my proxy' x") == Proxy("old", ("env", "A=1", "my proxy", "x"))
    for text, words in (
        ("x", "expected NAME"),
        ("=x", "expected NAME"),
        ("x= ", "expected NAME"),
        ("x='", "quot"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            parse_proxy(text)


def test_phases():
    paced = parse_phase("paced40", 2.0)
    assert (paced.connections, paced.once, paced.unit, paced.interval_ms) == (40, True, "event", 20.0)
    assert paced.tokens * 0.02 >= paced.warm_s + 2.0
    assert paced.warm_s > paced.ramp_s
    assert not parse_phase("req", 1.0).stream
    assert parse_phase("short", 1.0).tokens == 4
    assert paced.offered_per_s == 2000.0
    assert parse_phase("unpaced", 1.0).offered_per_s is None
    for name in ("paced0", "paced", "fast"):
        with pytest.raises(InvalidInputError, match="allowed: req, short, unpaced, paced1 to paced10000"):
            parse_phase(name, 1.0)
    with pytest.raises(InvalidInputError, match="at most 10000 paced streams, got 10001"):
        parse_phase("paced10001", 1.0)


def alive(pid):
    """Whether a process runs: one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def serving(tmp_path, port, status):
    return running(
        Proxy("mine"),
        [sys.executable, "-c", SERVER, str(port), str(status), str(tmp_path / "pid")],
        port,
        tmp_path / "log",
        None,
    )


async def test_a_proxy_is_ended_with_all_that_it_started(tmp_path, unused_tcp_port):
    async with serving(tmp_path, unused_tcp_port, 200) as proxy:
        await proxy.wait_ready(f"http://127.0.0.1:{unused_tcp_port}/", b"{}", 300.0)
        child = int((tmp_path / "pid").read_text())
        assert alive(proxy.pid)
        assert alive(child)
        with pytest.raises(ProcessError, match=f"listens on port {unused_tcp_port} already"):
            async with serving(tmp_path, unused_tcp_port, 200):
                pass
    assert not alive(proxy.pid)
    while alive(child):
        await asyncio.sleep(0.01)


async def test_a_proxy_that_never_serves(tmp_path, unused_tcp_port):
    url = f"http://127.0.0.1:{unused_tcp_port}/"
    async with serving(tmp_path, unused_tcp_port, 503) as proxy:
        # On a machine that is slow it may not even listen in the first of these times.
        for limit_s in (1.0, 4.0, 16.0, 64.0):
            with pytest.raises(ProcessError, match=f"mine did not serve within {limit_s:g} s: ") as caught:
                await proxy.wait_ready(url, b"{}", limit_s)
            if "status 503; the last line" in str(caught.value):
                break
        assert "503" in str(caught.value).partition("; the last line")[2]


async def test_a_proxy_that_ends(tmp_path, unused_tcp_port):
    command = [sys.executable, "-c", "print('so long\\n'); raise SystemExit(3)"]
    async with running(Proxy("mine"), command, unused_tcp_port, tmp_path / "log", None) as proxy:
        with pytest.raises(ProcessError, match=r"mine ended with code 3; .*: so long$"):
            await proxy.wait_ready(f"http://127.0.0.1:{unused_tcp_port}/", b"{}", 300.0)


async def test_a_proxy_that_cannot_be_started(tmp_path, unused_tcp_port):
    with pytest.raises(ProcessError, match="mine cannot be started: /no/such: No such file or directory"):
        async with running(Proxy("mine"), ["/no/such"], unused_tcp_port, tmp_path / "log", None):
            pass
