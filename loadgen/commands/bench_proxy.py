"""``loadgen bench-proxy``: what proxies cost, side by side.

Mock workers and a load client are processes of their own, and so is each proxy, started afresh in each round:
A B C, A B C, … The proxy has one core, workers and client together another.
"""

from __future__ import annotations

import asyncio
import platform
import re
import resource
import shlex
import sys
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import orjson

from brproxy.types import BrproxyError, InvalidInputError
from loadgen.commands.processes import ProcessError, running_process, stop
from loadgen.dataplane import worker
from loadgen.dataplane.cpu import Cores, choose_cores, on_core, process_tree
from loadgen.dataplane.loads import DRAIN_S_MAX, LoadResult, LoadSpec, Phase
from loadgen.dataplane.proxies import Proxy, RunningProxy, fill_in, running
from loadgen.report.proxies import ProxyLoad, ProxyReport

OWN = Proxy("brproxy", (sys.executable, "-m", "brproxy", "serve", "--config", "{config}"))
SPLIT = Proxy("2 legs", OWN.command)
"""The same with prefill and decode apart: each request goes to the first worker, and then to another."""

DIRECT = Proxy("direct")
"""No proxy: the CPU time that is counted is the load's own, workers and client together."""

OWN_SLOTS = 4096
CLIENT_START_S_MAX = 120.0
OPEN_FILES_SPARE = 256
"""Beside a proxy's two connections for each of the client's."""

_WORKER_READY = re.compile(worker.READY.format(pid=r"(\d+)", port=r"\d+"))
_CHAT = "/v1/chat/completions"
_READY_REQUEST = orjson.dumps(
    {"model": worker.MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
)


class PlatformError(BrproxyError):
    """This command does not work on this system."""


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What is compared, and how. ``ready_s_max``: for a proxy to answer after its start.

    ``pin``: one core for the proxy and one for the load, where there are two.
    """

    proxies: tuple[Proxy, ...]
    phases: tuple[Phase, ...]
    port: int = 9100
    worker_ports: tuple[int, ...] = (9101, 9102)
    rounds: int = 3
    pin: bool = True
    ready_s_max: float = 60.0

    def __post_init__(self) -> None:
        """Refuse what would fail later, or measure something else."""
        names = [proxy.name for proxy in self.proxies]
        if not names:
            raise InvalidInputError("there is nothing to measure: give --proxy NAME=COMMAND LINE")
        if len(set(names)) < len(names):
            raise InvalidInputError(f"each proxy needs a name of its own, got {', '.join(names)}")
        if not self.phases or not self.worker_ports:
            raise InvalidInputError("at least one phase and one worker port are needed")
        if SPLIT in self.proxies and len(self.worker_ports) < 2:
            raise InvalidInputError("prefill and decode apart need a worker port each")

    @property
    def worker_urls(self) -> list[str]:
        """Where the workers listen."""
        return [f"http://127.0.0.1:{port}" for port in self.worker_ports]

    def describe(self) -> dict[str, str | int | float | bool | None]:
        """Return what a report says about how it came to be."""
        commands = {f"command.{proxy.name}": shlex.join(proxy.command) for proxy in self.proxies}
        return {
            "rounds": self.rounds,
            "seconds": self.phases[0].seconds,
            "workers": len(self.worker_ports),
            "pinned": choose_cores(pin=self.pin) != Cores(),
            "machine": platform.machine(),
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            **commands,
        }


def parse_port(text: str) -> int:
    """Return a port; raises InvalidInputError."""
    if not text.isdecimal() or not 0 < int(text) < 1 << 16:
        raise InvalidInputError(f"a port is a number from 1 to 65535, got {text!r}")
    return int(text)


async def bench_proxies(settings: BenchSettings, say: Callable[[str], None]) -> ProxyReport:
    """Measure every proxy in every phase; ``say`` gets a line for each load and each proxy that fails."""
    if platform.system() != "Linux":
        raise PlatformError("bench-proxy reads CPU time from /proc, which only Linux has")
    _allow_open_files(max(phase.connections for phase in settings.phases))
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loadgen-")))
        for proxy in (OWN, SPLIT):
            text = own_config(settings, split=proxy == SPLIT)
            _config_file(folder, proxy).write_text(text, encoding="utf-8")
        session = await stack.enter_async_context(aiohttp.ClientSession(raise_for_status=True))
        cores = choose_cores(pin=settings.pin)
        pids = []
        for rank, port in enumerate(settings.worker_ports):
            arguments = ("--port", str(port), "--offset", str(rank / len(settings.worker_ports)))
            with on_core(cores.load):
                process = running_process("loadgen.dataplane.worker", arguments, _WORKER_READY)
                pids.append(int((await stack.enter_async_context(process))[1]))
        bench = _Bench(settings, cores, folder, session, tuple(pids), say)
        for number in range(1, settings.rounds + 1):
            for proxy in settings.proxies:
                await bench.visit(proxy, number)
    return bench.report


def _config_file(folder: Path, proxy: Proxy) -> Path:
    return folder / ("split.toml" if proxy == SPLIT else "brproxy.toml")


def own_config(settings: BenchSettings, *, split: bool = False) -> str:
    """Return brproxy's configuration: everything on that is on in production.

    ``split``: the first worker prefills, the others decode.
    """
    roles = ['role = "prefill"\n', *['role = "decode"\n'] * (len(settings.worker_ports) - 1)]
    workers = "".join(
        f'\n[[worker]]\nurl = "{url}"\nmodel = "{worker.MODEL}"\nslots = {OWN_SLOTS}\n{role * split}'
        for url, role in zip(settings.worker_urls, roles, strict=True)
    )
    return f'[listen]\nport = {settings.port}\n\n[routing]\npolicy = "br-h"\n{workers}'


def _allow_open_files(connections: int) -> None:
    """Raise the limit that everything started here inherits; raises InvalidInputError."""
    needed = 2 * connections + OPEN_FILES_SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != soft < needed:
        if resource.RLIM_INFINITY != hard < needed:
            msg = f"{connections} connections need {needed} open files; ulimit -Hn allows {hard}"
            raise InvalidInputError(msg)
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@dataclass(slots=True)
class _Bench:
    """A comparison on its way."""

    settings: BenchSettings
    cores: Cores
    folder: Path
    session: aiohttp.ClientSession
    worker_pids: tuple[int, ...]
    say: Callable[[str], None]
    report: ProxyReport = field(init=False)

    def __post_init__(self) -> None:
        self.report = ProxyReport(settings=self.settings.describe(), loads=[], errors={})

    async def visit(self, proxy: Proxy, number: int) -> None:
        """Measure one proxy in one round; one that fails is noted and not visited again."""
        if proxy.name in self.report.errors:
            return
        try:
            if proxy == DIRECT:
                await self._loads(proxy, number, None)
                return
            config = _config_file(self.folder, proxy)
            command = fill_in(proxy.command, self.settings.port, self.settings.worker_urls, config)
            log = self.folder / f"log-{self.settings.proxies.index(proxy)}-{number}"
            async with running(proxy, command, self.settings.port, log, self.cores.proxy) as process:
                url = f"http://127.0.0.1:{self.settings.port}{_CHAT}"
                await process.wait_ready(url, _READY_REQUEST, self.settings.ready_s_max)
                await self._loads(proxy, number, process)
        except ProcessError as error:
            self.report.errors[proxy.name] = str(error)
            self.say(str(error))

    async def _loads(self, proxy: Proxy, number: int, process: RunningProxy | None) -> None:
        for phase in self.settings.phases:
            load = await self._load(proxy, number, phase, process)
            if process is not None:
                process.check()
            self.report.loads.append(load)
            cost = "-" if load.cpu_us_per_unit is None else f"{load.cpu_us_per_unit:,.1f}"
            self.say(f"round {number}: {proxy.name}, {phase.name}: {cost} CPU µs/{phase.unit}")

    async def _load(self, proxy: Proxy, number: int, phase: Phase, process: RunningProxy | None) -> ProxyLoad:
        urls = self.settings.worker_urls
        for url in urls:
            pace = orjson.dumps({"interval_ms": phase.interval_ms})
            async with self.session.post(f"{url}/control", data=pace):
                pass
        spec = LoadSpec(
            phase=phase,
            model=worker.MODEL,
            ports=(self.settings.port,) if process else self.settings.worker_ports,
            proxy_pids=tuple(process_tree(process.pid)) if process else (),
            worker_pids=self.worker_pids,
        )
        result = await self._run_client(spec)
        ticks = skipped = 0
        for url in urls:
            async with self.session.get(f"{url}/stats") as response:
                stats = orjson.loads(await response.read())
            ticks, skipped = ticks + stats["ticks"], skipped + stats["skipped"]
        if process is None:
            own_s = result.workers_cpu_s + result.client_cpu_s
            result = result.model_copy(update={"proxy_cpu_s": own_s})
        units = result.events if phase.unit == "event" else result.requests
        return ProxyLoad(
            **result.model_dump(),
            proxy=proxy.name,
            phase=phase.name,
            round=number,
            units=units,
            cpu_us_per_unit=result.proxy_cpu_s / units * 1e6 if units else None,
            offered_per_s=phase.offered_per_s,
            generator_busy=self._busy(result),
            ticks_skipped=skipped / (ticks + skipped) if ticks else 0.0,
        )

    def _busy(self, result: LoadResult) -> float:
        """Return the share of the load's core that was used; without pinning, of the busiest process's."""
        if self.cores.load is not None:
            busy_s = result.workers_cpu_s + result.client_cpu_s
        else:
            busy_s = max(result.workers_cpu_s / len(self.worker_pids), result.client_cpu_s)
        return busy_s / result.window_s

    async def _run_client(self, spec: LoadSpec) -> LoadResult:
        with on_core(self.cores.load):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "loadgen.dataplane.client", spec.model_dump_json()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        limit_s = CLIENT_START_S_MAX + spec.phase.warm_s + spec.phase.seconds + DRAIN_S_MAX
        try:
            async with asyncio.timeout(limit_s):
                out, err = await process.communicate()
        except TimeoutError:
            raise ProcessError(f"the load client did not end within {limit_s:g} s") from None
        finally:
            await stop(process)
        if process.returncode != 0:
            last = err.decode(errors="replace").strip().rpartition("\n")[2]
            raise ProcessError(f"the load client failed: {last}")
        return LoadResult.model_validate_json(out)
