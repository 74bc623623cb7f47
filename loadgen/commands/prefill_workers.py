"""The prefill side of a comparison: its emulated workers, what the proxy is told of them, what they did."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import orjson

from loadgen.cluster_settings import ClusterSettings
from loadgen.commands.emulate import BOOTSTRAP, READY, emulate_arguments
from loadgen.commands.scenario import PrefillServers
from loadgen.emulator.settings import LEASE_S, Role, Transfer
from loadgen.report.schema import PrefillResult

ENGINE = {Transfer.SGLANG: "sglang"}
"""Which engines speak a form of transfer, where it is not vLLM."""

_LEASE_SHARE = 5 / 6
"""Of a lease, until the proxy has a prompt prefilled again: the rest is for the decode worker to begin."""

_COUNTER = re.compile(r"^brproxy_prefills_(\w+)_total\{.*\} (\S+)$", re.MULTILINE)
_READY = re.compile(READY + r" (.+)$")
_READY_WITH_BOOTSTRAP = re.compile(READY + r" (.+)\n" + BOOTSTRAP + r" (.+)$")


@dataclass(frozen=True, slots=True)
class PrefillWorkers:
    """Emulated prefill workers that listen, at ``urls``; the emulation is ``speed`` times as fast."""

    servers: PrefillServers
    speed: float
    urls: Sequence[str]
    bootstrap_urls: Sequence[str] = ()

    def config(self) -> str:
        """Return what the proxy's configuration has of them."""
        servers = self.servers
        capacity = servers.kv_capacity_tokens
        more = "" if capacity is None else f"kv_capacity_tokens = {capacity}\n"
        ports = [f"bootstrap_port = {url.rpartition(':')[2]}\n" for url in self.bootstrap_urls]
        workers = "".join(
            f'\n[[worker]]\nurl = "{url}"\nname = "prefill-{number}"\nslots = {servers.slots}\n'
            f"{side_config(servers, Role.PREFILL)}{more}{port}"
            for number, (url, port) in enumerate(zip(self.urls, ports or [""] * len(self.urls), strict=True))
        )
        lease_s = LEASE_S[servers.transfer] * _LEASE_SHARE / self.speed
        return f"\n[prefill_decode]\nlease_s = {lease_s}\n{workers}"

    async def result(
        self, session: aiohttp.ClientSession, decode_stats: Mapping[str, Any], page: str
    ) -> PrefillResult:
        """Return what they did; ``page`` are the proxy's metrics."""
        stats = []
        for url in self.urls:
            async with session.get(f"{url}/emulator/stats") as response:
                stats.append(orjson.loads(await response.read()))
        counts = {name: int(float(value)) for name, value in _COUNTER.findall(page)}
        failed = sum(own["handover"]["failed_requests"] for own in (decode_stats, *stats))
        return PrefillResult(
            prefill_tokens=[own["prefill_tokens"] for own in stats],
            held_tokens_max=[own["handover"]["held_tokens_max"] for own in stats],
            kv_capacity_tokens=self.servers.kv_capacity_tokens,
            again=counts["again"],
            expired=counts["expired"],
            failed=failed,
            lag_s=max(own["lag_s"] for own in stats),
        )


def side_config(servers: PrefillServers | None, role: Role) -> str:
    """Return the lines of a ``[[worker]]`` about its role, none where there is one for all."""
    if servers is None:
        return ""
    engine = ENGINE.get(servers.transfer, "vllm")
    return f'role = "{role}"\ntransfer = "{servers.transfer}"\nengine = "{engine}"\n'


def prefill_ready(servers: PrefillServers) -> re.Pattern[str]:
    """Return what their emulator prints once they listen: URLs, and bootstrap URLs where they have some."""
    has_bootstrap = servers.transfer in {Transfer.MOONCAKE, Transfer.SGLANG}
    return _READY_WITH_BOOTSTRAP if has_bootstrap else _READY


def prefill_arguments(servers: PrefillServers, cluster: ClusterSettings, speed: float) -> list[str]:
    """Return the command line that emulates them; ``cluster`` is what they prefill for."""
    own = replace(cluster, workers=1, slots=servers.slots, kv_capacity_tokens=servers.kv_capacity_tokens)
    more = {
        "--deployments": servers.servers,
        "--transfer-ms-per-ktoken": servers.transfer_ms_per_ktoken,
        "--bootstrap-port": 0,
        **side_options(servers, Role.PREFILL),
    }
    return emulate_arguments(own, speed, more)


def side_options(servers: PrefillServers | None, role: Role) -> dict[str, object]:
    """Return an emulator's options about its role, none where there is one for all."""
    return {} if servers is None else {"--role": role, "--transfer": servers.transfer}
