"""The dispatcher of one barrier group: pool -> state -> forecast -> policy -> bindings. Synchronous, no I/O.

The proxy drives it from a timer, the simulator from virtual time; both call the same three methods.

A round serves requests whatever its parts do. Without a forecast it balances the load as it is. Where a
policy raises, or names a worker that cannot be chosen, requests are decided one by one; who judges then is
the policy itself: a request that it raises for, while it decides a harmless one in its place, cannot be
decided and fails alone; a policy that raises for the harmless one as well is broken, and the least KV load
decides instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import cast

import numpy as np

from brproxy.faults import Faults
from brproxy.foresight import Foresight
from brproxy.growth import GrowthRoom
from brproxy.happenings import Happenings
from brproxy.learning import Learner
from brproxy.ledger import Ledger
from brproxy.lifecycle import AFTER, NOBODY, TERMINAL, Entry, Event, LifecycleError, State, bounded, entry_of
from brproxy.prediction.predictor import AnyPredictor, Prospect
from brproxy.prediction.quality import QualityMonitor
from brproxy.roster import Change, Member
from brproxy.routing.policy import AnyPolicy, least
from brproxy.routing.view import NOT_ADMITTED, ClusterView, IntArray, RoundState, RoutingError, checked
from brproxy.sessions import SessionLimits, Sessions
from brproxy.step_costs import StepCosts
from brproxy.types import TOKENS_MAX, PendingRequest, RequestId, WorkerIndex
from brproxy.waiting import Foreseer, Growth, PoolFullError, PromptTooLongError, WaitingRoom


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """``requests_max`` wait at once; each waits at most ``wait_s_max`` seconds.

    Rounds leave ``kv_growth_share`` of each worker's KV capacity free, see growth.py (0: nothing for growth).
    """

    requests_max: int = 4096
    wait_s_max: float = 60.0
    kv_growth_share: float = 0.015


_HARMLESS_TOKENS = 1
"""Prompt of the request that shows whether a policy that raised is broken (tokens)."""


class Dispatcher:
    """Decides, for one barrier group, which waiting request goes to which worker and when.

    ``waiting`` are those that wait, ``ledger`` has those that are bound, ``happenings`` tells what happens to
    both, and ``faults`` counts what went wrong. ``sessions`` remembers who served whom, None: nobody does.
    ``costs`` says what a step costs as far as it is known by now, ``foreseer`` how long those of a closed
    batch will be (None: nobody does). Of the last round, ``admitted`` is what it bound, also if it raised,
    and ``undecidable`` are the requests that it could not decide and that no other will: they still wait, and
    the caller ends them.
    """

    def __init__(
        self,
        ledger: Ledger,
        policy: AnyPolicy,
        predictor: AnyPredictor,
        rng: np.random.Generator,
        limits: PoolLimits,
        group: str = "",
        sessions: SessionLimits | None = None,
        costs: Callable[[], StepCosts | None] = lambda: None,
    ) -> None:
        self.ledger, self.roster = ledger, ledger.roster
        self.waiting = WaitingRoom()
        self.policy = policy
        self.predictor = predictor
        predictor.watch(ledger.active, lambda: ledger.bound)
        self.limits = limits
        self.quality = QualityMonitor()
        self.faults = Faults(group)
        self.happenings = Happenings(self.faults)
        self.happenings.tell(Learner(predictor, self.quality))
        self.sessions = None if sessions is None else Sessions(ledger, sessions)
        if self.sessions is not None:
            self.happenings.tell(self.sessions)
        self.admitted: list[Entry] = []
        self.undecidable: list[RequestId] = []
        self._ids = cast("Iterator[RequestId]", count())
        self._rng = rng
        self.costs = costs
        # When a round first left slots free although requests waited; None: nobody is held.
        self._held_since_s: float | None = None
        self.foreseer: Foreseer | None = None
        # When the last request was bound.
        self._bound_s = float("-inf")
        self._foresight = Foresight(ledger, policy, predictor, self.quality, self.faults, rng)
        self._growth = GrowthRoom(ledger, predictor, self.faults)
        self._policy_is_broken = False
        self.roster.observe(self._member_changed)

    def decide_by(self, policy: AnyPolicy) -> None:
        """Have another policy decide from the next round on."""
        self.policy = policy
        self._foresight.look_by(policy)

    def entry(self, request_id: RequestId) -> Entry:
        """Return the entry of a request that waits or is bound; raises LifecycleError once it has ended."""
        entry = self.ledger.find(request_id) or self.waiting.find(request_id)
        if entry is None:
            msg = f"request {request_id} is not here: it has ended or never arrived"
            raise LifecycleError(msg)
        return entry

    def arrive(self, request: PendingRequest, now_s: float) -> RequestId:
        """Have a request wait; as ``enter``, for whoever wants its id only."""
        return self.enter(request, now_s).id

    def enter(self, request: PendingRequest, now_s: float, avoid: frozenset[WorkerIndex] = NOBODY) -> Entry:
        """Have a request wait; it goes to none of ``avoid`` before that has come back.

        Raises PoolFullError, InvalidInputError, and PromptTooLongError for a count.
        A guess that is too long for every worker may be wrong, and only the engine can tell: it counts as
        what the largest worker holds, so that it can be placed.
        """
        longest = self.ledger.kv_capacity_tokens_max
        if request.sequences:
            if request.prompt_tokens > longest and request.prompt_is_exact:
                msg = (
                    f"the prompt has {request.prompt_tokens} tokens, "
                    f"more than the KV capacity of any worker ({longest} tokens)"
                )
                raise PromptTooLongError(msg)
            if self.waiting.count >= self.limits.requests_max:
                msg = f"{self.waiting.count} requests are waiting already, the most that the pool holds"
                raise PoolFullError(msg)
        entry = entry_of(next(self._ids), request, now_s, longest)
        if avoid:
            entry.avoid = avoid
        if self.sessions is not None and request.session_keys:
            self.sessions.recall(entry, now_s)
        self.waiting.enter(entry)
        self.happenings.arrived(entry)
        return entry

    def decide(self, now_s: float, routable: Sequence[bool]) -> list[Entry]:
        """Run one decision round over everything that waits, bind what it admits and return that.

        ``routable`` (by index) are the workers that may be chosen. Requests that a worker failed and those
        that take no slot are placed first, one by one, and never on a worker that failed them before it has
        come back. Never raises for what a policy or a predictor does.
        """
        waiting = self.waiting
        self.admitted = []
        self.undecidable.clear()
        self._policy_is_broken = False
        if True not in routable:
            return self.admitted
        alone = waiting.alone()
        if alone is not None:
            state = self._state([alone], routable, now_s)
            if not (self.policy.HOLDS and self._holds(state, now_s)):
                self._place([alone], state, now_s)
            return self.admitted
        for entry in waiting.first():
            if entry.sequences:
                self._place([entry], self._state([entry], entry.others(routable), now_s), now_s)
            else:
                self.place_at_once(entry, now_s, routable)
        if not waiting.count:
            return self.admitted
        state = self._state([], routable, now_s)
        if self.policy.HOLDS and self._holds(state, now_s):
            return self.admitted
        seen = list(islice(waiting.in_turn(sum(state.slots_free)), self._worth_seeing(state)))
        if seen:
            self._growth.leave(state, seen, self.limits.kv_growth_share)
            growth = self.foreseer(seen) if self.foreseer else None
            if growth is None:
                self._route(seen[: self._worth_seeing(state)], state, now_s)
            else:
                self._place(seen, state, now_s, growth)
        return self.admitted

    def place_at_once(self, entry: Entry, now_s: float, routable: Sequence[bool]) -> None:
        """Bind a request that takes no slot to the worker with the least load, if any may be chosen."""
        candidates = [g for g, ok in enumerate(entry.others(routable)) if ok]
        if candidates:
            worker = least(candidates, self.ledger.load(), self._rng)
            self._bind(entry, WorkerIndex(worker), now_s)

    def bind(
        self, request_id: RequestId, worker: WorkerIndex, now_s: float, prospect: Prospect | None = None
    ) -> None:
        """Bind a waiting request to ``worker``; raises LifecycleError, and as Ledger.bind."""
        entry = self.entry(request_id)
        self.ledger.bind(entry, worker, now_s, prospect)
        self._is_bound(entry, now_s)

    def retry(self, request_id: RequestId, now_s: float) -> None:
        """Have a request wait again, before all others, and remember the worker that failed it."""
        entry = self.ledger.entry(request_id)
        member = self.roster.member(entry.worker)
        self.ledger.take_back(entry, now_s)
        self.waiting.enter(entry)
        self.happenings.retried(entry, member)

    def correct_prompt(self, entry: Entry, prompt_tokens: int) -> None:
        """Replace the estimate of a prompt by its count, whether it waits or is bound; not once it has ended.

        One that waits counts as the largest worker's capacity at most, as when it came: it must be placed.
        """
        if entry.state is State.PENDING:
            longest = min(self.ledger.kv_capacity_tokens_max, TOKENS_MAX)
            entry.prompt_tokens = bounded(prompt_tokens, longest)
            entry.cached_tokens = min(entry.cached_tokens, entry.prompt_tokens)
        elif entry.state not in TERMINAL:
            self.ledger.correct_prompt(entry.id, prompt_tokens)

    def expired(self, now_s: float) -> list[RequestId]:
        """Return the requests that have waited longer than the limit; the caller ends them."""
        return [entry.id for entry in self.waiting.late(now_s, self.limits.wait_s_max)]

    def end(self, request_id: RequestId, event: Event, now_s: float | None = None) -> Entry:
        """End a request by FINISH, FAIL, CANCEL or EXPIRE and return its load; raises LifecycleError.

        ``now_s`` (None: it does not matter) tells how long one has waited that never got a worker.
        """
        entry, waited_s = self.ledger.find(request_id), None
        if entry is None:
            entry = self.entry(request_id)
            entry.state = AFTER[entry.state][event]
            self.waiting.leave(entry)
            waited_s = None if now_s is None else now_s - entry.waiting_since_s
        else:
            self.ledger.end(entry, event)
        self.happenings.ended(entry, event, waited_s)
        return entry

    def _member_changed(self, member: Member, change: Change) -> None:
        if change in {Change.HEALTHY, Change.ADDED, Change.RESUMED}:
            self.waiting.forgive(member.index)
        if change not in {Change.HEALTHY, Change.UNHEALTHY}:
            # The largest worker may be another now, and who waits was measured against the one before.
            self.waiting.cap_prompts(self.ledger.kv_capacity_tokens_max)

    def _state(self, waiting: Sequence[Entry], routable: Sequence[bool], now_s: float) -> RoundState:
        """Return the workers as a round over ``waiting`` finds them, with room left for growth."""
        late_binding = self.policy.params.late_binding
        state = self.ledger.state(routable, late_binding=late_binding, now_s=now_s)
        if self.ledger.kv_is_limited:
            self._growth.leave(state, waiting, self.limits.kv_growth_share)
        return state

    def _worth_seeing(self, state: RoundState) -> int:
        """Return how many of the waiting requests a round can make use of."""
        if not self.policy.params.late_binding:
            return self.limits.requests_max
        slots_free = sum(state.slots_free)
        if not slots_free:
            return 0
        return slots_free + self.policy.lookahead_requests(self.waiting.count, self.costs())

    def _place(
        self, waiting: Sequence[Entry], state: RoundState, now_s: float, growth: Growth | None = None
    ) -> None:
        """Decide on requests one by one, as on most arrivals, when there is one; the same as ``_route``.

        With ``growth`` each goes, as far as the policy follows loads, where least is expected in the end.
        """
        discounts, _ = self._foresight.discounts()
        # Policies take integers for numbers, and most look no steps ahead.
        load: list[float] = state.kv_tokens  # type: ignore[assignment]
        if growth is not None:
            load = [tokens + more for tokens, more in zip(load, growth.of_workers, strict=True)]
        elif len(discounts) > 1:
            load = self._foresight.discounted_load(state, discounts)
        weight = 1.0 if growth or load is state.kv_tokens else self._foresight.discount_sum
        costs = self.costs()
        slowness = None if costs is None else costs.slowness
        if slowness is not None:
            load = [tokens * slow for tokens, slow in zip(load, slowness, strict=True)]
        for position, entry in enumerate(waiting):
            place = self._choose(entry, state, load, weight)
            if place == NOT_ADMITTED:
                if entry.id in self.undecidable:
                    continue
                break
            present = self.roster.present
            self._bind(entry, WorkerIndex(place if present is None else present[place]), now_s)
            if len(waiting) > 1:
                state.admit(place, entry.prompt_tokens, entry.sequences)
                if load is not state.kv_tokens:
                    tokens = entry.prompt_tokens + (growth.of_waiting[position] if growth else 0.0)
                    load[place] += tokens * weight * (1.0 if slowness is None else slowness[place])

    def _choose(self, entry: Entry, state: RoundState, load: list[float], weight: float) -> int:
        """Return the worker of one request or NOT_ADMITTED; one that cannot be decided is noted as such."""
        if not self._policy_is_broken:
            try:
                if entry.cached_tokens:
                    worker = self._place_near(entry, state, load, weight)
                else:
                    worker = self.policy.place(state, entry.prompt_tokens, load, self._rng)
                # Asked by a call only what is no worker: each request comes by here.
                return worker if worker >= 0 and state.slots_free[worker] > 0 else checked(worker, state)
            except Exception as error:  # noqa: BLE001 - whatever a policy raises, the round goes on
                self.faults.note("policy", error)
            try:
                checked(self.policy.place(state, _HARMLESS_TOKENS, load, self._rng), state)
            except Exception:  # noqa: BLE001 - counted above
                self._policy_is_broken = True
            else:
                self.undecidable.append(entry.id)
                return NOT_ADMITTED
        eligible = state.eligible(entry.prompt_tokens)
        return min(eligible, key=state.kv_tokens.__getitem__, default=NOT_ADMITTED)

    def _place_near(self, entry: Entry, state: RoundState, load: list[float], weight: float) -> int:
        """As the policy's ``place``, for a request of which a worker has the beginning."""
        home = None if self.sessions is None else self.sessions.home(entry)
        if home is None:
            return self.policy.place(state, entry.prompt_tokens, load, self._rng)
        return self.policy.place_near(state, entry.prompt_tokens, load, self._rng, home, weight)

    def _bind(self, entry: Entry, worker: WorkerIndex, now_s: float) -> None:
        try:
            prospect = self.predictor.prospect(entry.request)
            self.ledger.bind(entry, worker, now_s, prospect)
        except Exception as error:  # noqa: BLE001 - a request is served without a prospect, too
            self.faults.note("predictor", error)
            self.ledger.bind(entry, worker, now_s)
        self.admitted.append(entry)
        self._is_bound(entry, now_s)

    def _is_bound(self, entry: Entry, now_s: float) -> None:
        self._held_since_s, self._bound_s = None, now_s
        self.waiting.leave(entry)
        self.happenings.bound(entry, now_s - entry.waiting_since_s)

    def _route(self, waiting: Sequence[Entry], state: RoundState, now_s: float) -> None:
        """Decide on all of ``waiting`` together; one by one if the policy raises."""
        try:
            decision = self._decision(waiting, state, now_s)
            admitted: list[int] = np.flatnonzero(decision != NOT_ADMITTED).tolist()
            chosen: list[int] = decision[admitted].tolist()
            for place in chosen:
                checked(place, state)
        except Exception as error:  # noqa: BLE001 - whatever a policy raises, the round goes on
            self.faults.note("policy", error)
            self._place(waiting, state, now_s)
            return
        if admitted:
            self.waiting.pass_over(waiting, admitted)
            present = self.roster.present
            for i, place in zip(admitted, chosen, strict=True):
                self._bind(waiting[i], WorkerIndex(place if present is None else present[place]), now_s)
        elif self._held_since_s is None:
            self._held_since_s = now_s

    def _holds(self, state: RoundState, now_s: float) -> bool:
        """Tell whether the policy lets all that wait on."""
        try:
            return self.policy.holds(state, self.costs(), now_s - self._bound_s, self.limits.wait_s_max)
        except Exception as error:  # noqa: BLE001 - whatever a policy raises, the round goes on
            self.faults.note("policy", error)
            return False

    def _decision(self, waiting: Sequence[Entry], state: RoundState, now_s: float) -> IntArray:
        """Return the worker of each of ``waiting``, as the policy says; raises whatever it does."""
        wait_s_max = self.limits.wait_s_max
        waited = self.waiting.waited(waiting, now_s, wait_s_max, self.policy.WAITED_FROM)
        held_s = 0.0 if self._held_since_s is None else now_s - self._held_since_s
        view = ClusterView.of(
            state,
            [entry.prompt_tokens for entry in waiting],
            [entry.passed_over for entry in waiting],
            self._foresight.outlook(state, self.costs(), waited, held_s, wait_s_max),
            [entry.sequences for entry in waiting] if self.waiting.plural else None,
            None if self.sessions is None else self.sessions.homes(waiting),
        )
        decision = self.policy.route(view, self._rng)
        if decision.shape != (len(waiting),):
            msg = f"{len(waiting)} requests wait, and the decision has shape {decision.shape}"
            raise RoutingError(msg)
        return decision
