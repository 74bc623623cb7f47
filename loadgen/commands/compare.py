"""``loadgen compare``: the same arrivals through the proxy under one policy after another.

For each policy a fresh emulator and a fresh proxy are started as processes of their own, and this process is
the client. The barrier's figures come from the emulator, over the steady part of the run.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import orjson

from brproxy.routing.policy import POLICIES
from brproxy.types import BrproxyError, InvalidInputError
from loadgen.capacity import Capacity
from loadgen.client import ClientSettings, Lengths, Outcome, Replay
from loadgen.commands.beside import must_be_simulated, simulated_result
from loadgen.commands.calibration import cluster_shown
from loadgen.commands.emulate import READY, emulate_arguments
from loadgen.commands.prefill_workers import (
    PrefillWorkers,
    prefill_arguments,
    prefill_ready,
    side_config,
    side_options,
)
from loadgen.commands.processes import running_process
from loadgen.commands.run import policy_result
from loadgen.commands.scenario import Scenario
from loadgen.emulator.settings import Role, check_speed
from loadgen.report.schema import LearntCosts, PolicyResult, Report
from loadgen.report.statistics import (
    client_warnings,
    emulator_warnings,
    latencies,
    steady_window,
    within,
)
from loadgen.workload import Workload

_EMULATOR_READY = re.compile(READY + r" (.+)$")
_PROXY_READY = re.compile(r"brproxy listens on (http://\S+:\d+)")
_LEDGER_LINE = re.compile(r"^brproxy_worker_(?:kv_tokens|requests)\{.*\} (\S+)$", re.MULTILINE)


class LedgerLeakError(BrproxyError):
    """The proxy still books load after every request has ended."""


@dataclass(frozen=True, slots=True)
class ComparisonSettings:
    """What is compared: policies by name, on an emulator ``speed`` times as fast as real time.

    ``beside_simulator``: the simulator's figures as well.
    """

    policies: tuple[str, ...]
    speed: float = 1.0
    beside_simulator: bool = False

    def __post_init__(self) -> None:
        """Refuse unknown policies before the first of them has run for a minute, and a speed that is none."""
        check_speed(self.speed)
        for policy in self.policies:
            POLICIES.get(policy)


async def compare(
    scenario: Scenario,
    settings: ComparisonSettings,
    on_policy: Callable[[str, int], None],
    on_finished: Callable[[Outcome], None],
) -> Report:
    """Run every policy; ``on_policy`` gets its name and the number of requests when it begins."""
    if settings.beside_simulator:
        must_be_simulated(scenario)
    workload, capacity = scenario.draw()
    results = []
    for policy in settings.policies:
        on_policy(policy, len(workload.requests))
        results.append(await _one(policy, workload, capacity, scenario, settings, on_finished))
    described = scenario.describe(workload) | {
        "speed": settings.speed,
        "perfect_output_tokens_per_s": capacity.output_tokens_per_s,
        "perfect_requests_per_s": capacity.requests_per_s,
    }
    simulated = [
        simulated_result(policy, workload, capacity, scenario, settings.speed)
        for policy in (settings.policies if settings.beside_simulator else ())
    ]
    return Report(scenario=described, policies=results, simulated=simulated)


async def _one(
    policy: str,
    workload: Workload,
    capacity: Capacity,
    scenario: Scenario,
    settings: ComparisonSettings,
    on_finished: Callable[[Outcome], None],
) -> PolicyResult:
    async with AsyncExitStack() as stack:
        prefill = await _prefill_workers(stack, scenario, settings)
        more = side_options(scenario.prefill, Role.DECODE)
        arguments = emulate_arguments(scenario.cluster, settings.speed, more)
        ready = await stack.enter_async_context(running_process("loadgen", arguments, _EMULATOR_READY))
        urls = ready[1].split()
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="loadgen-"))
        config = Path(folder) / "brproxy.toml"
        config.write_text(_proxy_config(policy, urls, scenario, prefill), encoding="utf-8")
        arguments = ["serve", "--config", str(config)]
        listening = await stack.enter_async_context(running_process("brproxy", arguments, _PROXY_READY))
        running = _Running(listening[1], urls[0], prefill)
        return await _replay(policy, running, workload, capacity, settings, on_finished)


@dataclass(frozen=True, slots=True)
class _Running:
    """What runs: URLs of the proxy and of the emulator that decodes, and the workers that only prefill."""

    proxy_url: str
    emulator_url: str
    prefill: PrefillWorkers | None


async def _prefill_workers(
    stack: AsyncExitStack, scenario: Scenario, settings: ComparisonSettings
) -> PrefillWorkers | None:
    servers = scenario.prefill
    if servers is None:
        return None
    arguments = prefill_arguments(servers, scenario.cluster, settings.speed)
    ready = await stack.enter_async_context(running_process("loadgen", arguments, prefill_ready(servers)))
    urls, *bootstrap_urls = (group.split() for group in ready.groups())
    return PrefillWorkers(servers, settings.speed, urls, *bootstrap_urls)


async def _replay(
    policy: str,
    running: _Running,
    workload: Workload,
    capacity: Capacity,
    settings: ComparisonSettings,
    on_finished: Callable[[Outcome], None],
) -> PolicyResult:
    proxy_url, emulator_url = running.proxy_url, running.emulator_url
    client = ClientSettings(proxy_url, speed=settings.speed, lengths=Lengths.HIDDEN, verify=True)
    prefill = None
    async with aiohttp.ClientSession(raise_for_status=True) as session:
        async with session.post(f"{emulator_url}/emulator/reset") as response:
            start_s = orjson.loads(await response.read())["now_s"]
        outcomes = await Replay(workload, client, on_finished).run()
        steady = steady_window(outcomes)
        window = {"from_s": start_s + steady.from_s, "to_s": start_s + steady.to_s}
        async with session.get(f"{emulator_url}/emulator/stats", params=window) as response:
            stats = orjson.loads(await response.read())
        page = await _check_ledger(session, proxy_url)
        if running.prefill is not None:
            prefill = await running.prefill.result(session, stats, page)
    length_s = steady.to_s - steady.from_s
    tokens_per_s = stats["output_tokens"] / length_s if length_s > 0 else None
    lag_s = stats["lag_s"] + (0.0 if prefill is None else prefill.lag_s)
    warnings = client_warnings(outcomes, settings.speed) + emulator_warnings(lag_s, stats["late_share"])
    result = policy_result(
        policy,
        outcomes,
        latencies(within(outcomes, steady)),
        output_tokens_per_s=tokens_per_s,
        imbalance_kv_tokens=stats["imbalance_kv_tokens"],
        idle_fraction=stats["idle_fraction"],
        throughput_of_perfect=tokens_per_s / capacity.output_tokens_per_s if tokens_per_s else None,
        warnings=warnings,
    )
    result.mean_kv_tokens = stats["mean_kv_tokens"]
    result.prefill_balance = stats["prefill_balance"]
    result.preemptions = stats["preemptions"]
    result.late_share = stats["late_share"]
    result.prefill = prefill
    result.learnt = _learnt(page, settings.speed)
    return result


def _learnt(page: str, speed: float) -> LearntCosts | None:
    """Return what the proxy's metrics say of a step, at normal speed; None: it ran for too short a time."""
    try:
        cluster = cluster_shown(page, "the proxy")
    except InvalidInputError:
        return None
    return LearntCosts(
        step_base_ms=cluster.step_base_s * speed * 1e3,
        step_ns_per_kv_token=cluster.step_s_per_kv_token * speed * 1e9,
        prefill_us_per_token=cluster.prefill_s_per_token * speed * 1e6,
        prefill_tokens_max=cluster.prefill_tokens_max,
    )


async def _check_ledger(session: aiohttp.ClientSession, proxy_url: str) -> str:
    """Make sure that nothing is booked once everything has ended; return the page that says so.

    Raises LedgerLeakError.
    """
    async with session.get(f"{proxy_url}/metrics") as response:
        page = await response.text()
    booked = [float(value) for value in _LEDGER_LINE.findall(page)]
    if not booked or any(booked):
        raise LedgerLeakError(f"{proxy_url} still books load with no request in it: {booked}")
    return page


def _proxy_config(
    policy: str, urls: Sequence[str], scenario: Scenario, prefill: PrefillWorkers | None
) -> str:
    """Return a configuration as a user would write it; waiting is not limited, so that none is lost to it."""
    cluster = scenario.cluster
    capacity = (
        "" if cluster.kv_capacity_tokens is None else f"kv_capacity_tokens = {cluster.kv_capacity_tokens}\n"
    )
    workers = "".join(
        f'\n[[worker]]\nurl = "{url}"\nname = "dp-{rank}"\nslots = {cluster.slots}\n'
        f"{side_config(scenario.prefill, Role.DECODE)}{capacity}"
        for rank, url in enumerate(urls)
    )
    return (
        f'[listen]\nport = 0\n\n[routing]\npolicy = "{policy}"\nseed = {scenario.seed}\n'
        "\n[limits]\npool_requests_max = 65536\npool_wait_s_max = 3600\n"
        + ("" if prefill is None else prefill.config())
        + workers
    )
