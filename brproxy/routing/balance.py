"""The two-stage decision round of BalanceRoute, shared by BR-0 and BR-H.

Source: the paper's algorithm (arXiv 2605.06113), with what our simulator taught:

* Margins go to a level below the envelope, ``aim.py`` says why; only a request that was passed over is judged
  by the envelope itself.
* Workers are taken by *headroom* (the discounted margin in KV tokens), not by free slots; free slots and
  KV room only say who is eligible. Equal headroom: more free slots first, then at random.
* Stage 1, while free slots suffice for everybody who waits: the worker with the most headroom admits the
  one request of the window with the largest F. Stage 2, when slots are scarce: it admits the best *subset*,
  of up to ``subset_max`` of the oldest requests. In both, when no score is positive the best single request
  is admitted all the same.
* The window is the *oldest* waiting requests, sliding as they are admitted, and a small part of all that
  wait: whoever is in it and chosen overtakes the others. A very large request placed
  before a margin for it has opened costs all workers for as long as it runs, so it may be passed over, and a
  limit bounds how often: ``passed_over_max_per_worker`` times G younger requests. Before the pool's limit in
  time would send it away it is as overdue, if it has been passed over at all. From half of either on room
  is *made*: the worker with the most headroom (where KV room lacks, with the most of that) takes nothing else
  until the request pays there. One worker at a time is held, for the oldest such request, and only where
  its running requests leaving would open the margin. At the limit the request goes, at whatever price.

All workers share the envelope, so the one with the most headroom is the one with the least discounted load: a
scalar for each worker, which an admission raises by the prompt times Σ d. A choice therefore costs a few
operations on vectors of G, H and the window. A request that waits alone needs no more than those scalars: it
goes to the least of them, and no envelope, margin or score has a say.

Where prefill is dear and slots are scarce another round decides: see ``prefill.py`` and ``waves.py``.

A request whose beginning is cached on a worker, its *home*, is less load there: that worker's discounted load
counts as less by the discount, for this request alone. So what the worker with the most headroom admits goes
home instead where that is within the discount, never beyond; and of single requests F is more by the discount
for those that are at home with the worker that chooses.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal, TypeVar

import numpy as np
from pydantic import Field

from brproxy.routing.aim import growth_tokens, level
from brproxy.routing.fscore import FScore
from brproxy.routing.overdue import MAKE_ROOM_FROM, OVERDUE_FROM, how_overdue
from brproxy.routing.policy import TIE, PolicyParams, RoutingPolicy, tie_limit
from brproxy.routing.prefill import PrefillTerms
from brproxy.routing.subsets import SUBSET_SIZE_MAX, SUBSET_WINDOW_MAX, set_members, set_sums
from brproxy.routing.view import NOT_ADMITTED, ClusterView, FloatArray, Home, IntArray, RoundState
from brproxy.routing.waves import PrefillRound
from brproxy.step_costs import StepCosts

WINDOW_MAX = 512
"""Largest window (requests): a choice looks at each of it."""

PREFILL_WINDOW_MAX = 4096
"""Largest window for prompts that prefill in step (requests): it is sorted now and then."""

_WAITING_PER_CANDIDATE = 8
"""Requests that wait for each that a choice looks at, beyond those that subsets are chosen from.

Who suits a worker overtakes all before him in the window. Where that is half of all that wait, those that
are passed over wait for several times as long as in order; where it is a small part, hardly longer.
"""

_DRAWS = 64
"""Random numbers drawn at once."""


class BalanceParams(PolicyParams):
    """Parameters that BR-0 and BR-H share."""

    late_binding: bool = Field(
        default=True,
        description="Hold requests in the proxy's pool until a slot and KV room are free, "
        "instead of binding on arrival and letting the worker queue.",
    )
    window: int = Field(
        default=64,
        ge=1,
        le=WINDOW_MAX,
        description="Oldest waiting requests that a choice looks at, at most; beyond the oldest "
        f"{SUBSET_WINDOW_MAX} no more than one in {_WAITING_PER_CANDIDATE} of those that wait (requests).",
    )
    subset_max: int = Field(
        default=4,
        ge=1,
        le=SUBSET_SIZE_MAX,
        description="R_max: most requests admitted to a worker in one choice (requests).",
    )
    passed_over_max_per_worker: float = Field(
        default=192.0,
        gt=0,
        description="Younger requests that may be admitted before this one goes at any price; room for it is "
        "made from half of that on (requests, times G).",
    )
    beta_per_worker: float = Field(
        default=8.0,
        gt=0,
        description="β / G: the price of raising the envelope (times G). An overflow is sticky and lasts, so "
        "it costs more than the one step that the paper's 1 charges.",
    )
    order: Literal["headroom", "slots"] = Field(
        default="headroom",
        description="Which worker chooses next: the one with the most headroom, or the one with the most "
        "free slots, which is the paper's order.",
    )
    aim: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="How high workers are filled: share of the way from mean to envelope (ratio). "
        "Left out: follows the traffic. The paper's is 1.",
    )
    prefill_window: int = Field(
        default=256,
        ge=1,
        le=PREFILL_WINDOW_MAX,
        description="Waiting requests, beyond those there are slots for, that prompts prefilled in step are "
        "chosen from; where prefill holds up decoding only (requests).",
    )
    prefill_wait_s_max: float = Field(
        default=10.0,
        ge=0,
        description="Longest that free slots are held so that prompts prefill in step; 0: never (seconds).",
    )


def random_order(draw: float, workers: Iterable[int]) -> list[int]:
    """Return a random rank for each of ``workers``, from one draw: a permutation costs more than that."""
    return [hash((draw, worker)) for worker in workers]


class BalanceRound:
    """One decision round: the loads as they grow, and the requests not yet admitted."""

    def __init__(
        self, view: ClusterView, params: BalanceParams, fscore: FScore, rng: np.random.Generator
    ) -> None:
        self._view = view
        self._params = params
        self._fscore = fscore
        self._slots_free = view.slots_free.copy()
        self._kv_free = view.kv_free.copy()
        self._forecast: FloatArray = view.forecast[:, : len(fscore.discounts)].copy()
        # What has an envelope is the time that a worker takes: KV tokens weigh more on a slow one.
        slowness = None if view.costs is None else view.costs.slowness
        self._slowness = [1.0] * view.workers if slowness is None else list(slowness)
        if slowness is not None:
            self._forecast *= np.array(slowness)[:, None]
        # Not by methods of the array: for some hundred numbers those take as long as the work.
        self._envelope: FloatArray = np.maximum.reduce(self._forecast)
        self._mean: FloatArray = np.add.reduce(self._forecast) / view.workers
        self._growth = growth_tokens(view)
        self._discount_sum = fscore.discount_sum
        self._discounted_load: FloatArray = self._forecast @ fscore.discounts
        self._prompts: list[int] = view.prompt_tokens.tolist()
        self._sequences = view.each_sequences()
        self._homes = view.homes
        self._sequences_waiting = sum(self._sequences)
        self._prompt_max = max(self._prompts, default=0)
        self._waiting = list(range(view.waiting))
        self._open = view.slots_free > 0
        self._rng = rng
        self._overdue_by = how_overdue(view, params.window, params.passed_over_max_per_worker)
        self._holds = False
        self._tie_break: IntArray | None = None
        self._decision = np.full(view.waiting, NOT_ADMITTED, dtype=np.int64)

    def run(self) -> IntArray:
        """Return the decision, int64[N]."""
        for request in self._overdue():
            self._place_overdue(request)
        while self._waiting:
            worker = self._most_headroom(np.flatnonzero(self._open))
            if worker is None:
                break
            chosen = self._choose(worker)
            if not chosen:
                self._open[worker] = False
            # Of a subset the second finds the worker with more than the others may have.
            least = float(self._discounted_load[worker])
            for request in chosen:
                # Several sequences take several slots: the rest of a subset may find none.
                if self._open[worker]:
                    self._admit(self._near(worker, request, least), request)
        return self._decision

    def _most_headroom(self, workers: IntArray) -> int | None:
        """Return the one of ``workers`` that chooses next, None when there are none."""
        if len(workers) == 0:
            return None
        if self._params.order == "slots":
            slots_free = self._slots_free[workers]
            workers = workers[slots_free == slots_free.max()]
        loads = self._discounted_load[workers]
        ties = workers[loads <= tie_limit(float(loads.min()))]
        return int(ties[0]) if len(ties) == 1 else self._of_equals(ties)

    def _of_equals(self, workers: IntArray) -> int:
        """Return the one of ``workers`` with the most free slots, by a random order of the round at last."""
        slots_free = self._slots_free[workers]
        equals = workers[slots_free == slots_free.max()]
        if len(equals) == 1:
            return int(equals[0])
        if self._tie_break is None:
            self._tie_break = np.array(random_order(self._rng.random(), range(self._view.workers)))
        return int(equals[int(np.argmin(self._tie_break[equals]))])

    def _choose(self, worker: int) -> list[int]:
        """Return the requests to admit to ``worker``; empty when none of the window has KV room."""
        kv_free = int(self._kv_free[worker])
        window = self._waiting[: self._params.window]
        if kv_free < self._prompt_max:
            window = [i for i in window if self._prompts[i] <= kv_free]
        if not window:
            return []
        tokens = [self._prompts[i] for i in window]
        prompts = np.array(tokens, dtype=np.float64)
        mean_prompt = sum(tokens) / len(tokens)
        filled = level(self._mean, self._envelope, self._params.aim, self._growth, mean_prompt)
        margins = (filled - self._forecast[worker]) / self._slowness[worker]
        size_max = min(int(self._slots_free[worker]), self._subset_max(), len(window))
        if size_max > 1:
            best, score = self._fscore.best(margins, self._sums(prompts, size_max, kv_free))
            if score > 0:
                return [window[i] for i in set_members(len(window), size_max, best)]
        # One request; also when nothing pays: the least harmful, so that no slot idles and nobody starves.
        best, score = self._fscore.best(margins, prompts)
        if self._homes is not None:
            best = self._best_guest(worker, window, margins, best, score)
        return [window[best]]

    def _sums(self, prompts: FloatArray, size_max: int, kv_free: int) -> FloatArray:
        """Return the sums of all sets to choose from, inf for those without KV room; see ``set_members``."""
        sums = set_sums(prompts, size_max)
        return np.where(sums <= kv_free, sums, np.inf) if kv_free < size_max * self._prompt_max else sums

    def _best_guest(
        self, worker: int, window: list[int], margins: FloatArray, best: int, score: float
    ) -> int:
        """Return the position in ``window`` of the best request, those at home with ``worker`` worth more."""
        fscore = self._fscore
        for position, request in enumerate(window):
            home = self._home(request)
            if home is None or home.place != worker:
                continue
            worth = fscore.alpha * self._discount_sum * home.discount_tokens
            with_discount = float(fscore.score(margins, self._demand(request))[0]) + worth
            if with_discount > score:
                best, score = position, with_discount
        return best

    def _demand(self, request: int) -> FloatArray:
        """Return D of one request alone, float64[1]."""
        return np.array([float(self._prompts[request])])

    def _home(self, request: int) -> Home | None:
        return None if self._homes is None else self._homes[request]

    def _near(self, worker: int, request: int, least: float) -> int:
        """Return where a request goes that ``worker`` admits, which had the ``least`` load: it, or home."""
        home = self._home(request)
        if home is None or not self._open[home.place] or self._kv_free[home.place] < self._prompts[request]:
            return worker
        limit = tie_limit(least + self._discount_sum * home.discount_tokens)
        return home.place if self._discounted_load[home.place] <= limit else worker

    def _subset_max(self) -> int:
        """Return 1 in stage 1 (slots for everybody who waits), R_max in stage 2."""
        ample = int(self._slots_free[self._open].sum()) >= self._sequences_waiting
        return 1 if ample else self._params.subset_max

    def _overdue(self) -> list[int]:
        """Return the requests of the window that have been passed over often, oldest first."""
        overdue: list[int] = np.flatnonzero(self._overdue_by >= MAKE_ROOM_FROM).tolist()
        return overdue

    def _place_overdue(self, request: int) -> None:
        """Admit an overdue request where it pays, or must go; else hold the worker nearest to that for it."""
        workers = np.flatnonzero(self._open)
        if len(workers) == 0:
            return
        kv_free = self._kv_free[workers]
        worker = self._most_headroom(workers[kv_free >= self._prompts[request]])
        if worker is not None and self._goes(request, worker):
            self._admit(self._near(worker, request, float(self._discounted_load[worker])), request)
        elif not self._holds:
            self._holds = True
            held = int(workers[int(np.argmax(kv_free))]) if worker is None else worker
            self._open[held] = False

    def _goes(self, request: int, worker: int) -> bool:
        """Say whether ``worker`` admits an overdue request now: it pays, or waiting would not change that."""
        if len(self._waiting) == 1 or self._overdue_by[request] >= 1:
            return True
        others = np.delete(self._forecast, worker, axis=0).max(axis=0, initial=0.0)
        now, drained = (
            float(self._fscore.score(margins / self._slowness[worker], self._demand(request))[0])
            for margins in (self._envelope - self._forecast[worker], others)
        )
        return now >= 0 or drained < 0

    def _admit(self, worker: int, request: int) -> None:
        prompt_tokens, sequences = self._prompts[request], self._sequences[request]
        self._slots_free[worker] -= sequences
        self._sequences_waiting -= sequences
        self._kv_free[worker] -= prompt_tokens
        self._open[worker] &= self._slots_free[worker] > 0
        load = prompt_tokens * self._slowness[worker]
        self._forecast[worker] += load
        self._mean += load / self._view.workers
        np.maximum(self._envelope, self._forecast[worker], out=self._envelope)
        self._discounted_load[worker] += load * self._discount_sum
        self._waiting.remove(request)
        self._decision[request] = worker


B = TypeVar("B", bound=BalanceParams)


class BalancePolicy(RoutingPolicy[B]):
    """What BR-0 and BR-H share: a policy is its F-score and its discounts."""

    TAKES_AFFINITY: ClassVar[bool] = True
    WAITED_FROM: ClassVar[float] = OVERDUE_FROM

    def __init__(self, params: B) -> None:
        super().__init__(params)
        self._draws: list[float] = []

    def lookahead_requests(self, waiting: int, costs: StepCosts | None) -> int:
        """See RoutingPolicy.lookahead_requests."""
        prefills = costs is not None and costs.s_per_prefill_token > 0
        if prefills and self.params.prefill_wait_s_max > 0:
            return self.params.prefill_window
        return min(self.params.window, max(SUBSET_WINDOW_MAX, waiting // _WAITING_PER_CANDIDATE))

    @abstractmethod
    def fscore(self, view: ClusterView) -> FScore:
        """Return the F-score of a round over ``view``."""

    def route(self, view: ClusterView, rng: np.random.Generator) -> IntArray:
        """See RoutingPolicy.route."""
        fscore, params = self.fscore(view), self.params
        terms = PrefillTerms.of(view) if params.prefill_wait_s_max else None
        if terms is None:
            return BalanceRound(view, params, fscore, rng).run()
        if not terms.opens(view, params.prefill_wait_s_max):
            return np.full(view.waiting, NOT_ADMITTED, dtype=np.int64)
        kv_load = view.forecast[:, : len(fscore.discounts)] @ fscore.discounts / fscore.discount_sum
        if view.costs is not None and view.costs.slowness is not None:
            kv_load = kv_load * view.costs.slowness
        overdue = how_overdue(view, params.window, params.passed_over_max_per_worker)
        return PrefillRound(view, terms, kv_load, overdue).run()

    def place(
        self,
        state: RoundState,
        prompt_tokens: int,
        discounted_load: Sequence[float],
        rng: np.random.Generator,
    ) -> int:
        """See RoutingPolicy.place: the most headroom, then the most free slots, then at random."""
        if self.params.order == "slots":
            eligible = state.eligible(prompt_tokens)
            most_slots = max((state.slots_free[g] for g in eligible), default=0)
            discounted_load = [
                load if state.slots_free[g] == most_slots else math.inf
                for g, load in enumerate(discounted_load)
            ]
        # In one pass: on most arrivals this is all that there is to decide.
        equals: list[int] = []
        better, limit, most = math.inf, math.inf, 0
        slots_free, kv_free = state.slots_free, state.kv_free
        for worker, load in enumerate(discounted_load):
            slots = slots_free[worker]
            if slots <= 0 or kv_free[worker] < prompt_tokens or load > limit:
                continue
            if load < better:
                # As tie_limit has it, without the call.
                limit = load + TIE * load if load > 1.0 else load + TIE
                better, most, equals = load - (limit - load), slots, [worker]
            elif slots > most:
                most, equals = slots, [worker]
            elif slots == most:
                equals.append(worker)
        if len(equals) <= 1:
            return equals[0] if equals else NOT_ADMITTED
        order = random_order(self._draw(rng), equals)
        return equals[order.index(min(order))]

    def _draw(self, rng: np.random.Generator) -> float:
        """Return what ``rng`` draws next; it is asked for many: for one it takes as long as the choice."""
        if not self._draws:
            self._draws = rng.random(_DRAWS)[::-1].tolist()
        return self._draws.pop()
