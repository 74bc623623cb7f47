"""The cluster model in real time: steps follow the clock, generations wake those that wait for tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count

from loadgen.barrier import BarrierRecord, BarrierStats
from loadgen.cluster import Cluster
from loadgen.cluster_settings import ClusterSettings

LAG_S_MAX = 1.0
"""Seconds of real time that steps may be late before the emulated clock is set back: see ``lag_s``."""


class Generation:
    """One request in the deployment: tokens decoded so far, and whether those are all."""

    def __init__(self, request_id: int, prompt_tokens: int, output_tokens: int) -> None:
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.decoded_tokens = 0
        self.on_done: Callable[[], None] | None = None
        """Called with the last token, before the next step begins."""
        self._waiter: asyncio.Future[None] | None = None

    @property
    def done(self) -> bool:
        """Tell whether every token has been decoded."""
        return self.decoded_tokens >= self.output_tokens

    def decoded_one(self) -> None:
        """Take in one more token."""
        self.decoded_tokens += 1
        if self.done and self.on_done is not None:
            self.on_done()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def more_than(self, tokens: int) -> int:
        """Wait until more than ``tokens`` tokens are decoded; return how many are."""
        while self.decoded_tokens <= tokens:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self.decoded_tokens


class Deployment:
    """All workers of one barrier group, stepping ``speed`` times as fast as real time.

    Steps follow an absolute schedule: one that is delivered late does not delay the next. When the machine
    cannot keep up for long, ``lag_s`` tells how many seconds of real time were given up; figures from a run
    with a lag are not to be trusted, nor those of one whose steps end late by much of a step: ``late_share``.
    """

    def __init__(self, settings: ClusterSettings, speed: float) -> None:
        self.cluster = Cluster(settings)
        self.speed = speed
        self.prompt_tokens_total = [0] * settings.workers
        self.output_tokens_total = [0] * settings.workers
        self.prefill_tokens_total = [0] * settings.workers
        self.fetched_tokens_total = [0] * settings.workers
        self.lag_s = 0.0
        self._late_s = self._stepped_s = 0.0
        self._generations: dict[int, tuple[int, Generation]] = {}
        self._admissions: dict[int, asyncio.Future[None]] = {}
        self._ids = count()
        self._work = asyncio.Event()
        self._record = BarrierRecord()
        self._origin_s = asyncio.get_running_loop().time()

    def now_s(self) -> float:
        """Return the emulated time in seconds."""
        return (asyncio.get_running_loop().time() - self._origin_s) * self.speed

    @property
    def late_share(self) -> float:
        """How late steps ended by how long they took, both as sums over the steps so far; 0 before any."""
        return self._late_s / self._stepped_s if self._stepped_s else 0.0

    def submit(
        self, worker: int, prompt_tokens: int, output_tokens: int, *, remote: bool = False
    ) -> Generation:
        """Queue a request on ``worker``; raises InvalidInputError when it can never fit.

        ``remote``: its prompt's KV comes from elsewhere, see ``admitted`` and ``loaded``.
        """
        generation = Generation(next(self._ids), prompt_tokens, output_tokens)
        self.cluster.submit(generation.request_id, worker, prompt_tokens, output_tokens, remote=remote)
        self._generations[generation.request_id] = (worker, generation)
        self.prompt_tokens_total[worker] += prompt_tokens
        self.prefill_tokens_total[worker] += 0 if remote else prompt_tokens
        self._work.set()
        return generation

    async def admitted(self, generation: Generation) -> None:
        """Wait until there is a slot and room for a request whose KV comes from elsewhere."""
        if self.cluster.is_loading(generation.request_id):
            return
        self._admissions[generation.request_id] = admission = asyncio.get_running_loop().create_future()
        try:
            await admission
        finally:
            del self._admissions[generation.request_id]

    def loaded(self, generation: Generation) -> None:
        """Let a request run whose KV has come."""
        worker, _ = self._generations[generation.request_id]
        self.fetched_tokens_total[worker] += generation.prompt_tokens
        self.cluster.loaded(generation.request_id)
        self._work.set()

    def reserve(self, worker: int, kv_tokens: int) -> None:
        """Take room on ``worker`` for KV that is kept for somebody else; fewer than none gives it back."""
        self.cluster.reserve(worker, kv_tokens)
        self._work.set()

    def leave(self, generation: Generation) -> None:
        """Forget a request: done, or its client has left."""
        if self._generations.pop(generation.request_id, None) is not None and not generation.done:
            self.cluster.cancel(generation.request_id)
            # Those who waited for its room may be the only ones there.
            self._work.set()

    def stats(self, from_s: float, to_s: float) -> BarrierStats:
        """Return what the barrier cost between two emulated times."""
        return self._record.stats(from_s, to_s)

    def reset(self) -> None:
        """Forget the statistics so far."""
        self._record = BarrierRecord()
        self.lag_s = self._late_s = self._stepped_s = 0.0

    async def run(self) -> None:
        """Step for ever; cancel to stop."""
        start_s = self.now_s()
        while True:
            step = self.cluster.begin_step()
            self._admit()
            if step is None:
                self._work.clear()
                await self._work.wait()
                start_s = self.now_s()
                continue
            end_s = start_s + step.duration_s
            await asyncio.sleep(max(0.0, (end_s - self.now_s()) / self.speed))
            late_s = (self.now_s() - end_s) / self.speed
            self._late_s += max(0.0, late_s)
            self._stepped_s += step.duration_s / self.speed
            if late_s > LAG_S_MAX:
                self.lag_s += late_s
                self._origin_s += late_s
            self._record.add(start_s, step, self._deliver())
            start_s = end_s

    def _admit(self) -> None:
        """Tell those that wait for a slot and have one now."""
        if self._admissions:
            for request_id in self.cluster.loading:
                admission = self._admissions.get(request_id)
                if admission is not None and not admission.done():
                    admission.set_result(None)

    def _deliver(self) -> int:
        """Hand the step's tokens to their generations; return how many there were."""
        request_ids: list[int] = self.cluster.end_step().request_ids.tolist()
        for request_id in request_ids:
            entry = self._generations.get(request_id)
            if entry is not None:
                worker, generation = entry
                generation.decoded_one()
                self.output_tokens_total[worker] += 1
        return len(request_ids)
