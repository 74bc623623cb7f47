"""The decision core without HTTP: for trainers and servers that bring a router of their own. Pure.

Its caller says what happens, with times of its own clock: requests come, tokens come, requests end, workers
come and go. It says who goes where. Everything in between is what the proxy runs on. See LIBRARY.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from brproxy.batches import BatchLimits, take_batches
from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.ledger import Ledger
from brproxy.lifecycle import Event, State
from brproxy.prediction.predictor import make_predictor
from brproxy.roster import Roster, WorkerLimits
from brproxy.rounds import Rounds
from brproxy.routing.policy import make_policy
from brproxy.sessions import SessionLimits
from brproxy.types import PendingRequest, RequestId

__all__ = ["Assigned", "Balancer", "PendingRequest", "PoolLimits", "RequestId", "WorkerLimits"]

PATIENT = PoolLimits(requests_max=65_536, wait_s_max=86_400.0)
"""A closed batch waits for as long as it takes."""

_TICK_S = 1.0


class Assigned(NamedTuple):
    """A request that no longer waits.

    ``worker``: the one that serves it; None: it has ended, as it waited too long or could not be decided.
    """

    request_id: RequestId
    worker: str | None


class Balancer:
    """Balances one barrier group of ``workers``, by name.

    ``policy`` and ``predictor`` are by name, with the defaults of the configuration. ``sessions`` None:
    requests of a session go anywhere. ``seed`` is of the draws that break ties. Raises UnknownNameError, and
    InvalidInputError for workers that cannot be.
    """

    def __init__(
        self,
        workers: Mapping[str, WorkerLimits],
        *,
        policy: str = "br-0",
        predictor: str = "exact-match",
        pool: PoolLimits = PATIENT,
        batches: BatchLimits | None = None,
        sessions: SessionLimits | None = None,
        seed: int = 0,
    ) -> None:
        self._roster = Roster(checked=False)
        self._ledger = Ledger(self._roster)
        self._dispatcher = Dispatcher(
            self._ledger,
            make_policy(policy),
            make_predictor(predictor),
            np.random.default_rng(seed),
            pool,
            sessions=sessions,
        )
        take_batches(self._dispatcher, batches or BatchLimits())
        self._now_s = 0.0
        self._rounds = Rounds(self._dispatcher, _TICK_S, lambda: self._now_s)
        for name, limits in workers.items():
            self.add(name, limits)

    @property
    def waiting(self) -> int:
        """Requests that wait for a worker."""
        return self._dispatcher.waiting.count

    @property
    def requests(self) -> dict[str, int]:
        """Requests that each worker has."""
        return self._by_name(self._ledger.requests)

    @property
    def kv_tokens(self) -> dict[str, int]:
        """KV tokens that are booked on each worker."""
        return self._by_name(self._ledger.kv_tokens)

    def is_waiting(self, request_id: RequestId) -> bool:
        """Tell whether a request waits for a worker."""
        return self._dispatcher.waiting.find(request_id) is not None

    def enter(self, request: PendingRequest, now_s: float) -> RequestId:
        """Have a request wait; raises PoolFullError, InvalidInputError and PromptTooLongError."""
        return self._dispatcher.enter(request, now_s).id

    def decide(self, now_s: float) -> list[Assigned]:
        """Run a round, and return those that no longer wait. Call it when anything has come or ended.

        Never raises for what a policy or a predictor does.
        """
        self._now_s = now_s
        served = self._rounds.run(now_s)
        return [Assigned(entry.id, self._name(entry.worker, entry.state)) for entry in served]

    def grow(self, request_id: RequestId, tokens: int, now_s: float) -> None:
        """Book ``tokens`` more output tokens; the first end its prefill. Raises LifecycleError."""
        if self._ledger.entry(request_id).state is State.PREFILL:
            self._ledger.first_token(request_id, now_s)
        self._ledger.grow(request_id, tokens)

    def retry(self, request_id: RequestId, now_s: float) -> None:
        """Have a request wait again, before all others and for another worker: its own failed it.

        Raises LifecycleError, also once it has had tokens.
        """
        self._dispatcher.retry(request_id, now_s)

    def end(self, request_id: RequestId, now_s: float, *, finished: bool = True) -> None:
        """End a request, wherever it is; ``finished``: by itself, so that its length teaches.

        Raises LifecycleError, also for one that waits and is to be ``finished``.
        """
        self._dispatcher.end(request_id, Event.FINISH if finished else Event.CANCEL, now_s)

    def add(self, name: str, limits: WorkerLimits) -> None:
        """Add a worker; raises InvalidInputError for a name that is taken."""
        self._roster.add(name, limits)

    def remove(self, name: str) -> None:
        """Have a worker get no more, and go with the last request that it has; raises RosterError."""
        self._roster.remove(name, self._ledger.requests[self._roster.find(name).index])

    def _name(self, worker: int, state: State) -> str | None:
        return self._roster.member(worker).key if state is State.PREFILL else None

    def _by_name(self, by_index: Sequence[int]) -> dict[str, int]:
        return {member.key: by_index[member.index] for member in self._roster.members}
