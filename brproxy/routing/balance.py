"""The two-stage decision round of BalanceRoute, shared by BR-0 and BR-H.

Source: the paper's algorithm (arXiv 2605.06113), with what our simulator taught:

* Workers are taken by *headroom* (the discounted margin in KV tokens), not by free slots; free slots and
  KV room only say who is eligible. Equal headroom: more free slots first, then at random.
* Stage 1, while free slots suffice for everybody who waits: the worker with the most headroom admits the
  one request of the window with the largest F. Stage 2, when slots are scarce: it admits the best *subset*,
  of up to ``subset_max`` requests. In both, when no score is positive the best single request is admitted
  all the same.
* The window is the *oldest* waiting requests, sliding as they are admitted. A request that has been passed
  over ``passed_over_max`` times goes first; if it fits nowhere, the worker with the most KV room is kept
  free for it.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from brproxy.routing.fscore import FScore, margins
from brproxy.routing.policy import PolicyParams, RoundState
from brproxy.routing.subsets import SUBSET_SIZE_MAX, WINDOW_MAX, SubsetSums
from brproxy.routing.view import NOT_ADMITTED, ClusterView, FloatArray, IntArray


class BalanceParams(PolicyParams):
    """Parameters that BR-0 and BR-H share."""

    late_binding: bool = Field(
        default=True,
        description="Hold requests in the proxy's pool until a slot and KV room are free, "
        "instead of binding on arrival and letting the worker queue.",
    )
    window: int = Field(
        default=32,
        ge=1,
        le=WINDOW_MAX,
        description="Oldest waiting requests that a choice looks at (requests).",
    )
    subset_max: int = Field(
        default=4,
        ge=1,
        le=SUBSET_SIZE_MAX,
        description="R_max: most requests admitted to a worker in one choice (requests).",
    )
    passed_over_max: int = Field(
        default=256,
        ge=1,
        description="Decision rounds that may prefer a younger request before this one goes first (rounds).",
    )


class BalanceRound:
    """One decision round: the loads as they grow, and the requests not yet admitted."""

    def __init__(
        self, view: ClusterView, params: BalanceParams, fscore: FScore, rng: np.random.Generator
    ) -> None:
        self._view = view
        self._params = params
        self._fscore = fscore
        self._state = RoundState(view)
        self._forecast: FloatArray = view.forecast[:, : len(fscore.discounts)].copy()
        self._waiting = list(range(view.waiting))
        self._closed = np.zeros(view.workers, dtype=bool)
        self._tie_break = rng.permutation(view.workers)
        self._decision = np.full(view.waiting, NOT_ADMITTED, dtype=np.int64)

    def run(self) -> IntArray:
        """Return the decision, int64[N]."""
        for request in self._overdue():
            self._place_overdue(request)
        while self._waiting:
            below_envelope = margins(self._forecast)
            worker = self._most_headroom(self._open(), below_envelope)
            if worker is None:
                break
            chosen = self._choose(worker, below_envelope[worker])
            if not chosen:
                self._closed[worker] = True
            for request in chosen:
                self._admit(worker, request)
        return self._decision

    def _open(self) -> IntArray:
        return np.flatnonzero((self._state.slots_free > 0) & ~self._closed).astype(np.int64)

    def _most_headroom(self, workers: IntArray, below_envelope: FloatArray) -> int | None:
        """Return the one of ``workers`` with the most headroom, None when there are none."""
        if len(workers) == 0:
            return None
        headroom = self._fscore.headroom(below_envelope[workers])
        order = np.lexsort((self._tie_break[workers], -self._state.slots_free[workers], -headroom))
        return int(workers[order[0]])

    def _choose(self, worker: int, worker_margins: FloatArray) -> list[int]:
        """Return the requests to admit to ``worker``; empty when none of the window has KV room."""
        kv_free = int(self._state.kv_free[worker])
        prompts = self._view.prompt_tokens
        window = [i for i in self._waiting[: self._params.window] if prompts[i] <= kv_free]
        if not window:
            return []
        size_max = min(int(self._state.slots_free[worker]), self._subset_max())
        subsets = SubsetSums(prompts[window].astype(np.float64), size_max)
        scores = self._fscore.score(worker_margins, subsets.sums)
        scores[subsets.sums > kv_free] = -np.inf
        best = int(np.argmax(scores))
        if scores[best] <= 0:
            # Nothing pays; admit the least harmful single request, so that no slot idles and nobody starves.
            best = int(np.argmax(scores[: len(window)]))
        return [window[i] for i in subsets.members(best)]

    def _subset_max(self) -> int:
        """Return 1 in stage 1 (slots for everybody who waits), R_max in stage 2."""
        ample = int(self._state.slots_free[~self._closed].sum()) >= len(self._waiting)
        return 1 if ample else self._params.subset_max

    def _overdue(self) -> list[int]:
        """Return the requests of the window that have been passed over too often, oldest first."""
        late = self._view.passed_over[: self._params.window] >= self._params.passed_over_max
        overdue: list[int] = np.flatnonzero(late).tolist()
        return overdue

    def _place_overdue(self, request: int) -> None:
        """Admit an overdue request where it fits; where it fits nowhere, stop feeding the roomiest worker."""
        workers = self._open()
        if len(workers) == 0:
            return
        kv_free = self._state.kv_free[workers]
        fitting = workers[kv_free >= self._view.prompt_tokens[request]]
        worker = self._most_headroom(fitting, margins(self._forecast))
        if worker is None:
            self._closed[workers[int(np.argmax(kv_free))]] = True
        else:
            self._admit(worker, request)

    def _admit(self, worker: int, request: int) -> None:
        prompt_tokens = int(self._view.prompt_tokens[request])
        self._state.admit(worker, prompt_tokens)
        self._forecast[worker] += prompt_tokens
        self._waiting.remove(request)
        self._decision[request] = worker
