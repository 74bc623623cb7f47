"""Conversations in virtual time: what affinity saves of prefill, and what it costs in balance.

``python -m tests.brproxy.chats`` compares policies with and without it. Every conversation is a client that
asks, waits for the answer, thinks and asks again with all that was said before. A worker keeps each prefix
that it has computed: caches that evict nothing are the hardest for balance, as homes are never lost.
"""

import sys
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.ledger import Ledger
from brproxy.lifecycle import Event
from brproxy.prediction.predictor import make_predictor
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policy import make_policy
from brproxy.sessions import SessionLimits
from brproxy.types import PendingRequest
from loadgen.barrier import BarrierRecord
from loadgen.cluster import Cluster, ClusterSettings

POOL = PoolLimits(1 << 40, 1e12)


@dataclass
class Chats:
    """How many talk at once, and how: means of what is asked, answered (tokens) and of pauses (seconds)."""

    conversations: int = 300
    asked: float = 200.0
    answered: float = 200.0
    thinks_s: float = 20.0
    context_max: int = 12_000
    system_tokens: int = 500


@dataclass
class Outcome:
    """Share of prompt tokens found in a cache, the barrier's balance, and what it yields.

    ``discount_tokens``: the mean of those that went home; ``homes``: how many did, and did not.
    """

    cached_share: float
    imbalance_kv_tokens: float
    idle_fraction: float
    output_tokens_per_s: float
    ttft_s: float
    discount_tokens: float
    homes: tuple[int, int]


def run(policy, sessions, until_s, *, chats=None, seed=0, cluster=None):
    """Return the Outcome of ``until_s`` seconds, the first quarter left out."""
    return _Run(policy, sessions, chats or Chats(), seed, cluster or CLUSTER).run(until_s)


CLUSTER = ClusterSettings(workers=8, slots=32, prefill_s_per_token=50e-6)


class _Run:
    def __init__(self, policy, sessions, chats, seed, settings):
        self.rng = np.random.default_rng(seed)
        self.chats, self.cluster = chats, Cluster(settings)
        limits = WorkerLimits(settings.slots, settings.kv_capacity_tokens)
        self.dispatcher = Dispatcher(
            Ledger(Roster.of([limits] * settings.workers)),
            make_policy(policy),
            make_predictor("survival"),
            np.random.default_rng(seed),
            POOL,
            sessions=sessions,
        )
        self.routable = (True,) * settings.workers
        self.due = []
        self.caches = [{} for _ in range(settings.workers)]
        self.talking = {}
        self.prompts = self.cached = 0
        self.ttft_s = []
        for number in range(chats.conversations):
            self.asks(float(self.rng.uniform(0, chats.thinks_s)), number, chats.system_tokens)

    def asks(self, at_s, number, context):
        drawn = self.rng.geometric([1 / self.chats.asked, 1 / self.chats.answered])
        prompt, output = context + int(drawn[0]), int(drawn[1])
        if prompt + output > self.chats.context_max:
            # Another one begins in its place.
            number, prompt = number + self.chats.conversations, self.chats.system_tokens + int(drawn[0])
        heappush(self.due, (at_s, number, prompt, output))

    def run(self, until_s):
        now_s, record, dispatcher = 0.0, BarrierRecord(), self.dispatcher
        while now_s < until_s:
            while self.due and self.due[0][0] <= now_s:
                at_s, number, prompt, output = heappop(self.due)
                request = PendingRequest(prompt, prompt_is_exact=True, session_keys=(number,))
                self.talking[dispatcher.arrive(request, at_s)] = at_s, number, prompt, output
            for entry in dispatcher.decide(now_s, self.routable):
                _, number, prompt, output = self.talking[entry.id]
                cached = min(self.caches[entry.worker].get(number, 0), prompt - 1)
                self.prompts += prompt
                self.cached += cached
                self.cluster.submit(entry.id, entry.worker, prompt, output, cached_tokens=cached)
            step = self.cluster.begin_step()
            if step is None:
                now_s = self.due[0][0]
                continue
            done_s = now_s + step.duration_s
            tokens = self.end_step(done_s)
            record.add(now_s, step, tokens)
            now_s = done_s
        stats = record.stats(until_s / 4, until_s)
        found = dispatcher.sessions
        return Outcome(
            self.cached / self.prompts,
            stats.imbalance_kv_tokens,
            stats.idle_fraction,
            stats.output_tokens / (until_s * 0.75),
            float(np.mean(self.ttft_s[len(self.ttft_s) // 4 :])),
            found.cached_tokens / max(found.hits, 1) if found else 0.0,
            (found.hits, found.moved) if found else (0, 0),
        )

    def end_step(self, now_s):
        result, ledger = self.cluster.end_step(), self.dispatcher.ledger
        for request_id, is_done in zip(result.request_ids.tolist(), result.finished.tolist(), strict=True):
            entry = ledger.entry(request_id)
            if entry.first_token_s is None:
                ledger.first_token(request_id, now_s)
                self.ttft_s.append(now_s - entry.arrived_s)
            ledger.grow(request_id, 1)
            if is_done:
                self.dispatcher.end(request_id, Event.FINISH)
                _, number, prompt, output = self.talking.pop(request_id)
                self.caches[entry.worker][number] = prompt + output
                self.asks(now_s + float(self.rng.exponential(self.chats.thinks_s)), number, prompt + output)
        return len(result.request_ids)


def main():
    """Print a line for each policy, without affinity and with several discounts."""
    until_s = float(sys.argv[1]) if len(sys.argv) > 1 else 300.0
    conversations = int(sys.argv[2]) if len(sys.argv) > 2 else 300
    chats = Chats(conversations=conversations)
    for policy in ("join-shortest-queue", "least-kv", "br-0", "br-h"):
        for discount in (None, 0.1, 0.25, 0.5, 1.0, 2.0):
            if discount is not None and policy == "join-shortest-queue":
                continue
            limits = None if discount is None else SessionLimits(discount=discount)
            print(f"{policy:20} {discount!s:5}", run(policy, limits, until_s, chats=chats), flush=True)


if __name__ == "__main__":
    main()
