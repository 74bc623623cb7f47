"""One of three workers dies under load, over real sockets and between real processes: who notices, and when?

    python -m tests.brproxy.proxy.kills --how stop --streams 500 --requests 250

``--how``: kill (SIGKILL), stop (SIGSTOP, and SIGCONT once the others have taken over), term (it refuses
connections and says nothing more on those it has, as a real vLLM does one time in two after SIGTERM), poison
(a request that kills each worker that reads it). Two streams of three have begun by then; all others have had
no answer, and some more come right after it. What goes wrong has a line each, and makes the exit code 1.
"""

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from brproxy.open_files import raise_open_files_limit
from tests.brproxy.proxy.kills_client import Ask
from tests.brproxy.proxy.kills_processes import TIMEOUT_S, running_proxy, running_workers, until
from tests.brproxy.proxy.kills_worker import OPENINGS

REACHED_MAX = 2
"""Workers that a request may reach: what one may have worked on is sent to one other."""

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGUSR2}
HOWS = (*SIGNALS, "poison")


class LoadError(Exception):
    """What was to be unanswered when a worker dies had an answer before."""


class Load(NamedTuple):
    """How many streams, of which two thirds begin at once, and other requests.

    ``prefill_s`` of those that do not, None: they wait until all that are to move have moved; no time counts.
    """

    streams: int
    requests: int
    prefill_s: float | None = None


class Case:
    """One fault under one load. ``faults`` are what went wrong, a line each, and ``table`` what was seen."""

    def __init__(self, how, load, proxy, workers):
        self.how = how
        self.load = load
        self.proxy = proxy
        self.workers = workers
        self.faults = []
        self.table = []
        begun = load.streams * 2 // 3
        self.begun = [
            Ask(f"begun-{i}", stream=True, prefill_s=0.0, interval_s=0.25, tokens=1200) for i in range(begun)
        ]
        self.held = self._unanswered("held", load.streams - begun, load.requests)
        self.late = self._unanswered("late", load.streams // 10, load.requests // 10)
        self.poison = Ask("poison", stream=True, prefill_s=0.0, interval_s=0.0, tokens=1, kills=True)
        self.signal_s = 0.0

    def _unanswered(self, name, streams, requests):
        return [
            Ask(
                f"{name}-{i}",
                stream=i < streams,
                prefill_s=3600.0 if self.load.prefill_s is None else self.load.prefill_s,
                interval_s=0.25,
                tokens=20,
                opening=OPENINGS[i % len(OPENINGS)],
            )
            for i in range(streams + requests)
        ]

    @property
    def asks(self):
        return [*self.begun, *self.held, *self.late]

    async def run(self):
        """Put the load on, let a worker die, wait for what comes of it, and judge."""
        await self._load()
        self._die()
        await self._wait_for_consequences()
        served = Ask("afterwards", stream=True, prefill_s=0.0, interval_s=0.0, tokens=3)
        served.start(self.proxy.port)
        await served.end()
        self._judge([served], "asked afterwards: served", Ask.is_served)
        if self.how == "stop":
            self.victims[0].running.signal(signal.SIGCONT)
            await until(self._is_routable, self.victims[0].name, 1.0)
        for worker in self.workers:
            if not worker.running.is_dead:
                # Who has died without a word cannot take it, and need not.
                worker.running.signal(signal.SIGUSR1)
        for ask in self.asks:
            await ask.end()
        await self._judge_all()

    async def _load(self):
        port = self.proxy.port
        for ask in self.begun:
            ask.start(port)
        await until(lambda: all(ask.first_s for ask in self.begun))
        for ask in self.held:
            ask.start(port)
        held = {ask.name for ask in self.held}
        await until(lambda: held <= set().union(*(worker.reached() for worker in self.workers)))

    def _die(self):
        self.victims = [self.workers[0]]
        self.at_signal = {worker.name: worker.reached() for worker in self.workers}
        if any(ask.first_s for ask in self.held):
            raise LoadError("the load took longer than a prefill: this machine needs a longer --prefill-s")
        self.signal_s = time.monotonic()
        if self.how == "poison":
            self.poison.start(self.proxy.port)
        else:
            self.victims[0].running.signal(SIGNALS[self.how])
        for ask in self.late:
            ask.start(self.proxy.port)

    async def _wait_for_consequences(self):
        if self.how == "poison":
            await self.poison.end()
            await until(lambda: sum(worker.running.is_dead for worker in self.workers) >= 2)
            self.victims = [worker for worker in self.workers if worker.running.is_dead]
        if self.how != "stop":
            begun = self.on_victims(self.begun)
            await until(lambda: all(ask.has_ended for ask in begun))
        moving = [*self.on_victims(self.held), *self.late]
        if self.load.prefill_s is None:
            await until(lambda: all(ask.has_ended or self.moved_s(ask) for ask in moving))
        else:
            await until(lambda: all(ask.has_ended or ask.first_s for ask in moving))

    def on_victims(self, asks):
        """Those of ``asks`` that were with a worker that died."""
        there = set().union(*(self.at_signal[worker.name] for worker in self.victims))
        return [ask for ask in asks if ask.name in there]

    def moved_s(self, ask):
        """When ``ask`` reached a worker that lives on after the signal, None if it has not."""
        others = [worker for worker in self.workers if worker not in self.victims]
        times = [worker.reached().get(ask.name, 0.0) for worker in others]
        return next((at_s for at_s in times if at_s > self.signal_s), None)

    def unsettled(self):
        """Say who has not ended, and the last that the proxy logged."""
        names = [ask.name for ask in self.asks if not ask.has_ended]
        last = self.proxy.log.read_text()[-500:]
        return f"{len(names)} have not ended: {', '.join(names[:20])}; the proxy's last words: {last}"

    # What to make of it.

    async def _judge_all(self):
        begun, held = self.on_victims(self.begun), self.on_victims(self.held)
        elsewhere = [a for a in (*self.begun, *self.held) if a not in {*begun, *held}]
        if self.how == "stop":
            self._judge(begun, "begun on the one that stands still: whole once it goes on", Ask.is_served)
        else:
            self._judge(begun, "begun on who died: ended by an error event", Ask.is_broken_off)
            self._times("  the event after the signal", [ask.last_s for ask in begun])
        if self.how == "poison":
            self._judge_poison(held)
        else:
            self._judge(held, "unanswered on it: served elsewhere", self._is_served_elsewhere)
            self._judge(self.late, "came right after it: served", Ask.is_served)
            for what, asks in (("unanswered", held), ("right after", self.late)):
                self._times(f"  {what}: at another worker after the signal", map(self.moved_s, asks))
                self._times(f"  {what}: first byte after the signal", [ask.first_s for ask in asks])
        self._judge(elsewhere, "with the others: served", Ask.is_served)
        statuses = [str(ask.status) for ask in self.asks]
        self._say("status codes", ", ".join(f"{s}: {statuses.count(s)}" for s in sorted(set(statuses))))
        self._judge_reached()
        await self._judge_books()

    def _is_served_elsewhere(self, ask):
        return ask.is_served() and ask.worker not in {worker.name for worker in self.victims}

    def _judge_poison(self, held):
        """Who was with the first that died, or came later, may have been with the second as well.

        It has then lost two workers, as the poison has: nobody can tell them apart.
        """
        first = min(self.victims, key=lambda worker: worker.reached()[self.poison.name])
        at_risk = [ask for ask in (*held, *self.late) if ask.name not in self.first_seen_elsewhere(first)]
        safe = [ask for ask in held if ask not in at_risk]
        given_up = [ask for ask in at_risk if not ask.is_served()]
        moved = [ask for ask in (*held, *self.late) if ask not in given_up]
        self._judge(safe, "unanswered on the second that died: served elsewhere", self._is_served_elsewhere)
        self._say(
            "unanswered on the first, or later: served", f"{len(at_risk) - len(given_up)} of {len(at_risk)}"
        )
        self._times("  these two: at another worker after the signal", map(self.moved_s, moved))
        self._judge(given_up, "lost a second worker as well: 502", Ask.is_given_up)
        self._judge([self.poison], "the poison: 502", Ask.is_given_up)
        dead = sum(worker.running.is_dead for worker in self.workers)
        self._say("workers that died of it", dead)
        if dead != 2:
            self.faults.append(f"{dead} workers died of the poison, not 2")

    def first_seen_elsewhere(self, first):
        """The names of those that were with another worker than ``first`` when it began."""
        names = [reached for name, reached in self.at_signal.items() if name != first.name]
        return set().union(*names)

    def _judge_reached(self):
        reached = [worker.reached() for worker in self.workers]
        asks = (*self.asks, *([self.poison] if self.how == "poison" else []))
        most = max(sum(ask.name in names for names in reached) for ask in asks)
        self._say("workers that a request reached, at most", most)
        if most > REACHED_MAX:
            self.faults.append(f"a request reached {most} workers")

    async def _judge_books(self):
        await until(self._is_empty)
        booked = await self._metric("brproxy_worker_kv_tokens")
        bound = await self._metric("brproxy_worker_requests")
        self._say(
            "KV tokens booked and requests bound afterwards",
            f"{sum(booked.values()):g}, {sum(bound.values()):g}",
        )
        retries = await self._metric("brproxy_retries_total")
        self._say("requests taken back", ", ".join(f"{name}: {n:g}" for name, n in retries.items()))
        for worker in self.workers:
            is_gone = worker in self.victims and self.how != "stop"
            await until(self._is_routable, worker.name, float(not is_gone))
        routable = await self._metric("brproxy_worker_routable")
        self._say("may be chosen afterwards", ", ".join(f"{name}: {ok:g}" for name, ok in routable.items()))
        text = self.proxy.log.read_text()
        if "Traceback" in text or "ERROR" in text:
            self.faults.append(f"the proxy logged an error: {text[-2000:]}")

    async def _is_empty(self):
        names = ("brproxy_worker_kv_tokens", "brproxy_worker_requests", "brproxy_pool_requests")
        return not any([sum((await self._metric(name)).values()) for name in names])

    async def _is_routable(self, name, value):
        return (await self._metric("brproxy_worker_routable"))[name] == value

    async def _metric(self, name):
        """Return the samples of ``name`` by worker, "" where it has none."""
        url = f"http://127.0.0.1:{self.proxy.port}/metrics"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            text = await response.text()
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        return {s.labels.get("worker", ""): s.value for s in samples if s.name == name}

    def _judge(self, asks, what, is_right):
        right = [ask for ask in asks if is_right(ask)]
        self._say(what, f"{len(right)} of {len(asks)}")
        self.faults += [f"not {what}: {ask}" for ask in asks if ask not in right]

    def _times(self, what, times_s):
        after_s = [at_s - self.signal_s for at_s in times_s if at_s is not None]
        if after_s and self.load.prefill_s is not None:
            self._say(what, f"P50 {median(after_s):.2f} s, max {max(after_s):.2f} s")

    def _say(self, what, value):
        self.table.append((what, value))


async def kills(how, load, *, timeout_s=TIMEOUT_S, limit_s=300.0):
    """Run one case and return it; ``timeout_s``: of a check. Raises TimeoutError when ``limit_s`` pass."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slots = 2 * (load.streams + load.requests)
        async with (
            running_workers(folder) as workers,
            running_proxy(folder, workers, slots, timeout_s) as proxy,
        ):
            case = Case(how, load, proxy, workers)
            try:
                async with asyncio.timeout(limit_s):
                    await case.run()
            except TimeoutError:
                raise TimeoutError(f"{limit_s:g} s have passed, and {case.unsettled()}") from None
            finally:
                for ask in (*case.asks, case.poison):
                    ask.cancel()
            return case


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--how", choices=HOWS, default="kill")
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--requests", type=int, default=250)
    parser.add_argument("--prefill-s", type=float, default=5.0, help="of what has not begun (seconds)")
    options = parser.parse_args()
    raise_open_files_limit()
    load = Load(options.streams, options.requests, options.prefill_s)
    case = asyncio.run(kills(options.how, load))
    for what, value in case.table:
        print(f"{what:64} {value}")
    for fault in case.faults:
        print(f"FAULT: {fault}")
    return 1 if case.faults else 0


if __name__ == "__main__":
    sys.exit(main())
