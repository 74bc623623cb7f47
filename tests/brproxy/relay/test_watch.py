"""The one timer of the data plane."""

import asyncio

from brproxy.relay.watch import Watch


class Waiting:
    def __init__(self, limit_s):
        self.limit_s = limit_s
        self.progressed = False
        self.deadline_s = 0.0
        self.late = 0

    def timed_out(self):
        self.late += 1


async def looks(watch_s, rounds, watched, each=lambda: None):
    """Let a watch look ``rounds`` times; ``each`` is called after every look."""
    seen = asyncio.Semaphore(0)
    watch = Watch(watch_s, lambda _now_s: seen.release())
    for one in watched:
        watch.add(one)
    for _ in range(rounds):
        await seen.acquire()
        each()
    watch.close()
    return watch


async def test_what_makes_progress_never_times_out():
    busy, idle = Waiting(0.02), Waiting(0.02)

    def progress():
        busy.progressed = True

    await looks(0.01, 12, [busy, idle], progress)
    assert (busy.late, idle.late > 0) == (0, True)


async def test_a_limit_that_is_not_over_does_not_count():
    patient = Waiting(60)
    await looks(0.001, 5, [patient])
    assert patient.late == 0


async def test_what_is_discarded_is_forgotten():
    gone = Waiting(0.0)
    seen = asyncio.Event()
    watch = Watch(0.001, lambda _now_s: seen.set())
    watch.add(gone)
    watch.discard(gone)
    await seen.wait()
    watch.close()
    assert gone.late == 0


async def test_a_watch_that_is_closed_looks_no_more():
    calls = []
    watch = Watch(0.001, calls.append)
    watch.close()
    await asyncio.sleep(0.01)
    assert calls == []
