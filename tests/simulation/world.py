"""One scenario, run: the proxy and its workers start, what is to happen happens, and all must end well."""

from __future__ import annotations

import asyncio
import gc
import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from aiohttp import web

from brproxy.app import RunningProxy, running_proxy
from brproxy.config import Config, parse_config
from brproxy.config_sections import Listen
from brproxy.fleet import Group
from brproxy.learning import Learner
from brproxy.proxy.service import GroupService
from tests.simulation.actions import Ask, Scenario, Trouble, Visit
from tests.simulation.checks import Checks, Violation
from tests.simulation.clients import OWN_STATUS, Client
from tests.simulation.decode_workers import DecodeWorker
from tests.simulation.kv import Cluster
from tests.simulation.leg_checks import CANCELLED_S, FREED_S, LegChecks
from tests.simulation.loop import START_S, DeadlockError, SpinningError, VirtualLoop
from tests.simulation.members import Members
from tests.simulation.outside import ON_PURPOSE, cut_off
from tests.simulation.pages import KV_CAPACITY_TOKENS
from tests.simulation.prefill_workers import BOOTSTRAP_PORT, PrefillWorker
from tests.simulation.regroup import Regroup
from tests.simulation.transport import PROXY
from tests.simulation.workers import Record, Worker

PATIENCE_S = 600.0
"""Within which every visit must have ended once the last has begun: far more than all limits together."""

RUNS_MAX = 2
"""Times that a request may come to a worker that does not refuse it: one, and one more as that broke off."""

SETTLE_S = 16.0
"""After which workers are healthy again, and everything idle was closed."""

PROBE_IDS = 1_000_000


@dataclass(frozen=True)
class Report:
    """What a run was: events, virtual seconds, digest of all that passed, and the promise that was broken."""

    events: int
    seconds: float
    digest: str
    requests: int
    violation: Violation | None


class LoopClock:
    """The virtual time as the proxy's clock."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.now_s = loop.time


class World:
    """Runs ``scenario``."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._loop = VirtualLoop()
        self._loop.network.seed = scenario.seed
        self._records: dict[int, Record] = {}
        self._raising: set[str] = set()
        self._checks: Checks
        self._workers: list[Worker] = []
        parted = scenario.parted
        self._transfers = {} if parted is None else dict(parted.transfers)
        self._cluster = None if parted is None else Cluster(self._loop, parted)
        self._bootstrap_ports: dict[str, int] = {}
        self._members: Members
        self._regroup: Regroup
        self._legs: LegChecks | None = None
        self._requests = 0
        self._is_stopped = False

    def run(self) -> Report:
        """Run it to its end, or to the first promise that is broken."""
        loop = self._loop
        try:
            with cut_off(loop, self._scenario.seed) as errors:
                self._checks = Checks(loop, errors)
                if self._cluster is not None:
                    self._legs = LegChecks(self._scenario, self._cluster, self._records, self._checks.wrong)
                loop.after_event = self._checks.check
                violation = self._run()
                seconds = loop.time() - START_S
                return Report(loop.events, seconds, loop.network.digest, self._requests, violation)
        finally:
            self._tear_down()

    def _run(self) -> Violation | None:
        try:
            self._loop.run_until_complete(self._main())
            # A task that failed unseen says so when it goes.
            gc.collect(0)
            self._checks.check()
        except Violation as violation:
            return violation
        except (DeadlockError, SpinningError) as error:
            return Violation("ends", str(error))
        return None

    async def _main(self) -> None:
        loop, scenario = self._loop, self._scenario
        for i, (_, capacity, group, ranks) in enumerate(scenario.workers):
            worker = self._start_worker(group, ranks, prefills=self._role(i) == "prefill")
            worker.pages.kv_capacity_tokens = capacity or KV_CAPACITY_TOKENS
        clock = LoopClock(loop)
        async with running_proxy(self._config(), clock=clock, listening=_listen) as proxy:
            self._follow(proxy)
            self._look(proxy.service.limits.retries_max)
            visits = await self._play()
            if self._is_stopped:
                loop.upheavals += 1
            else:
                await self._recover(proxy, visits)
        await self._all_end(visits)
        await asyncio.sleep(1)
        self._checks.closed()

    def _config(self) -> Config:
        settings = self._scenario.settings
        workers = [
            {"url": f"http://worker-{i}:9000", "slots": slots, "group": group or "all"}
            | ({"kv_capacity_tokens": capacity} if capacity else {})
            | ({"model": group} if group else {})
            | ({"ranks": f"{i}-{i + ranks - 1}", "rank_base": i} if ranks else {})
            | ({"role": self._role(i), "transfer": self._transfers[group]} if self._transfers else {})
            for i, (slots, capacity, group, ranks) in enumerate(self._scenario.workers)
        ]
        return parse_config({**settings, "worker": workers}, "simulation")

    def _follow(self, proxy: RunningProxy) -> None:
        for service in proxy.service.groups.each():
            self.group_came(service)
        proxy.service.groups.follow(self)
        self._regroup = Regroup(self._loop, self._scenario, proxy)
        self._members = Members(self._loop, proxy.service.fleet, self._workers, self._join)
        if self._cluster is not None:
            self._cluster.out_s = self._members.out_s
            self._cluster.is_out = self._members.is_out
        self._bootstrap_ports = proxy.service.bootstrap_ports
        self._checks.follow(proxy)

    def group_came(self, service: GroupService) -> None:
        """Have the policy and the predictor of a group raise when they are to."""
        dispatcher: Any = service.group.dispatcher
        dispatcher.decide_by(_Moody(dispatcher.policy, "policy", self._raising))
        predictor = _Moody(dispatcher.predictor, "predictor", self._raising)
        dispatcher.predictor = dispatcher._foresight._predictor = predictor
        for ended in dispatcher.happenings._ended:
            if isinstance(ended.__self__, Learner):
                ended.__self__.predictor = predictor

    def group_gone(self, service: GroupService) -> None:
        """Leave it alone."""

    def _change_workers(self, trouble: Trouble, worker: Worker) -> None:
        if trouble.kind.startswith("group-"):
            self._regroup.happen(trouble)
        else:
            self._members.happen(trouble.kind, worker, trouble.lasts_s)

    def _start_worker(self, group: str, ranks: int = 0, *, prefills: bool = False) -> Worker:
        parts = self._loop, len(self._workers), self._records, self._checks.wrong, ranks
        if self._cluster is None:
            worker = Worker(*parts)
        else:
            kind = PrefillWorker if prefills else DecodeWorker
            worker = kind(*parts, self._cluster, self._transfers[group])
        self._workers.append(worker)
        return worker

    def _join(self, group: Group) -> Worker:
        """Start a worker that joins ``group``."""
        name = group.name.removesuffix("/prefill")
        worker = self._start_worker("" if name == "all" else name, prefills=group.prefills)
        self._bootstrap_ports[worker.url] = BOOTSTRAP_PORT
        return worker

    def _role(self, worker: int) -> str:
        """Return what a worker of the scenario does of a request."""
        return "both" if self._scenario.parted is None else self._scenario.parted.roles[worker]

    def _look(self, retries_max: int) -> None:
        """Once a second: see that nobody stays with a worker that is out."""
        stuck = self._members.stuck(retries_max)
        if stuck is not None:
            self._checks.wrong("moves-on", stuck)
        self._loop.call_later(1.0, self._look, retries_max)

    # What happens.

    async def _play(self) -> list[tuple[Visit, asyncio.Task[None]]]:
        """Have all actions happen at their times, up to a shutdown; return the visits."""
        loop = self._loop
        visits = []
        for action in self._scenario.actions:
            await asyncio.sleep(START_S + action.at_s - loop.time())
            if isinstance(action, Trouble):
                if action.kind == "shutdown":
                    self._is_stopped = True
                    break
                self._make_trouble(action)
            else:
                visits.append((action, self._visit(action)))
        return visits

    def _visit(self, visit: Visit) -> asyncio.Task[None]:
        for ask in visit.asks:
            self._records[ask.id] = Record(ask)
            self._requests += 1
        client = Client(self._loop, visit, self._records, self._checks.wrong, self._own_status())
        task = self._loop.create_task(client.run())
        task.add_done_callback(partial(self._visited, visit))
        return task

    def _visited(self, visit: Visit, _task: asyncio.Task[None]) -> None:
        for ask in visit.asks:
            self._records[ask.id].has_ended = True
        if self._legs is not None and not self._is_stopped:
            ids = [ask.id for ask in visit.asks]
            self._loop.call_later(CANCELLED_S, self._legs.look_at_work, ids, self._workers)
            self._loop.call_later(FREED_S, self._legs.look, ids)

    def _own_status(self) -> frozenset[int]:
        """Return what the proxy may answer itself: 500 only where it was made to fail."""
        troubles = [action.kind for action in self._scenario.actions if isinstance(action, Trouble)]
        return OWN_STATUS | {500} if any(kind.endswith("-raises") for kind in troubles) else OWN_STATUS

    def _make_trouble(self, trouble: Trouble) -> None:
        worker, kind = self._workers[trouble.worker], trouble.kind
        later = self._loop.call_later
        if kind == "clock-jump":
            self._loop.jump(trouble.lasts_s * 10)
        elif kind == "out-of-files":
            self._loop.network.out_of_files = True
            later(trouble.lasts_s, setattr, self._loop.network, "out_of_files", False)
        elif kind.endswith("-raises"):
            part = kind.removesuffix("-raises")
            self._raising.add(part)
            later(trouble.lasts_s, self._raising.discard, part)
        elif kind.startswith("health-"):
            worker.health = kind
            later(trouble.lasts_s, setattr, worker, "health", "well")
        elif kind.startswith(("group-", "member-", "limits-")):
            self._change_workers(trouble, worker)
        elif kind == "page-fails":
            worker.page = ("silent", "error", "garbage", "empty")[int(trouble.at_s * 10) % 4]
            later(trouble.lasts_s, setattr, worker, "page", "well")
        elif kind.startswith("load-"):
            worker.pages.load = kind
            later(trouble.lasts_s, setattr, worker.pages, "load", "none")
        elif kind == "freeze":
            worker.freeze()
            later(trouble.lasts_s, worker.thaw)
        else:
            if kind == "restart":
                worker.die()
            worker.door({"connect-silent": "silent", "connect-reset": "reset"}.get(kind, "refuse"))
            later(trouble.lasts_s, worker.door, "open")

    # How it must end.

    async def _all_end(self, visits: list[tuple[Visit, asyncio.Task[None]]]) -> None:
        """Wait until trouble is over and all visits have ended; raises Violation."""
        await asyncio.sleep(max(0.0, START_S + self._scenario.ends_s - self._loop.time()))
        tasks = [task for _, task in visits]
        if tasks:
            await asyncio.wait(tasks, timeout=PATIENCE_S)
        for visit, task in visits:
            if not task.done():
                ids = [ask.id for ask in visit.asks]
                raise Violation("ends", f"one of the requests {ids} has not ended after {PATIENCE_S:g} s")
            task.result()

    async def _recover(self, proxy: RunningProxy, visits: list[tuple[Visit, asyncio.Task[None]]]) -> None:
        """See that all comes to an end and that all is then as if nothing had been."""
        await self._all_end(visits)
        self._count_deliveries(proxy)
        for probe in (self._probe, None):
            await asyncio.sleep(SETTLE_S)
            self._checks.idle()
            if self._legs is not None:
                self._legs.idle(proxy.service)
            if probe is not None:
                await probe()

    def _count_deliveries(self, proxy: RunningProxy) -> None:
        """See that no request came to workers more often than it may, nor a refused one too rarely."""
        retries = proxy.service.limits.retries_max
        most = retries + 2
        is_calm = not any(isinstance(action, Trouble) for action in self._scenario.actions)
        for record in self._records.values():
            if record.ask.kind == "page":
                # The proxy's own: of their models it asks all.
                continue
            if self._legs is not None:
                self._legs.count(record, retries)
                continue
            if len(record.attempts) > most:
                where = [attempt.worker for attempt in record.attempts]
                self._checks.wrong("deliveries", f"request {record.ask.id} went to workers {where}")
                if len(where) > 2 * (retries + 1):
                    self._checks.wrong("retries", f"request {record.ask.id} went to workers {where}")
            ran = [one for one in record.attempts if not (one.response.is_refusal or one.may_be_stale)]
            if len(ran) > RUNS_MAX:
                where = [one.worker for one in ran]
                self._checks.wrong("runs", f"request {record.ask.id} may have run on workers {where}")
            # All workers of a group are asked, if there are as many retries.
            enough = min(retries + 1, self._workers_for(record.ask))
            if (
                record.was_refused
                and is_calm
                and len(record.attempts) < enough
                and record.ask.kind != "upload"
            ):
                self._checks.wrong("retries", f"request {record.ask.id} is refused by {record.attempts[-1]}")

    def _workers_for(self, ask: Ask) -> int:
        return sum(ranks or 1 for _, _, group, ranks in self._scenario.workers if group in {"", ask.model})

    async def _probe(self) -> None:
        """See that each group serves a request as if nothing had been."""
        groups = dict.fromkeys(group for _, _, group, _ in self._scenario.workers)
        for number, group in enumerate(groups):
            ask = Ask(PROBE_IDS + number, model=group, closes=True)
            visit = Visit(0.0, (ask,))
            self._records[ask.id] = Record(ask)
            client = Client(self._loop, visit, self._records, self._checks.wrong)
            await asyncio.wait_for(client.run(), PATIENCE_S)
            attempts = self._records[ask.id].made(prefill=False)
            if client.answered != 1 or len(attempts) != 1:
                self._checks.wrong("serves-again", f"group {group!r} does not serve when all is well again")

    def _tear_down(self) -> None:
        """Leave nothing behind of a run, whether or not it came to its end."""
        loop = self._loop
        loop.after_event = lambda: None
        loop.set_exception_handler(lambda _loop, _context: None)
        logging.disable(logging.CRITICAL)
        with suppress(DeadlockError, SpinningError):
            loop.run_until_complete(_end_all(loop))
        logging.disable(logging.NOTSET)
        loop.close()


async def _end_all(loop: VirtualLoop) -> None:
    """Cancel whoever is left until nobody is; what is not seen through to its end says so much later."""
    for _ in range(8):
        tasks = asyncio.all_tasks(loop) - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=60)


class _Moody:
    """A policy or a predictor that raises while its name is in ``raising``."""

    def __init__(self, real: Any, name: str, raising: set[str]) -> None:
        self._real = real
        self._name = name
        self._raising = raising
        self._calls = 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if self._name in self._raising and callable(value):
            self._calls += 1
            if self._calls % 2:
                msg = f"{self._name}.{name} {ON_PURPOSE}"
                raise RuntimeError(msg)
        return value


async def _listen(runner: web.ServerRunner, _listen: Listen) -> int:
    await web.TCPSite(runner, *PROXY).start()
    return PROXY[1]
