"""The interface of a routing policy, and the frame that the one-request-at-a-time baselines share.

A policy is a pure function of a view and a random generator: the same view and the same generator state
give the same answer, in the proxy and in the simulator.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Generic, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from brproxy.registry import Registry, make_configurable
from brproxy.routing.fscore import discounts_for
from brproxy.routing.view import NOT_ADMITTED, ClusterView, FloatArray, Home, IntArray, RoundState
from brproxy.step_costs import StepCosts

TIE = 1e-9
"""Discounted loads that differ by less than this share are equal: they are sums of floats."""


class PolicyParams(BaseModel):
    """The TOML table of a policy; every policy's parameters extend it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    late_binding: bool = Field(
        default=False,
        description="Hold requests in the proxy's pool until a slot and KV room are free, "
        "instead of binding on arrival and letting the worker queue.",
    )


P = TypeVar("P", bound=PolicyParams)


class RoutingPolicy(ABC, Generic[P]):
    """Chooses a worker for each waiting request of one barrier group."""

    Params: ClassVar[type[PolicyParams]] = PolicyParams
    TAKES_AFFINITY: ClassVar[bool] = False
    """Whether a request may go to its home although that is not the least loaded worker."""

    WAITED_FROM: ClassVar[float] = math.inf
    """The share of the pool's limit in time from which on it matters to ``route`` how long one has waited."""

    HOLDS: ClassVar[bool] = False
    """Whether it has a ``holds`` of its own: most rounds are of one request, and need not ask."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.HOLDS = cls.holds is not RoutingPolicy.holds

    def __init__(self, params: P) -> None:
        self.params = params

    def discounts(self, turnover_steps: float, lookahead_turnovers: float) -> FloatArray:
        """Return float64[H+1], d_0 = 1: what the load 0, 1, …, H decode steps ahead weighs.

        It says how far the forecast must reach; with H = 0 no predictor is needed. The arguments are those
        of ClusterView. The array is shared: do not write to it.
        """
        return discounts_for(0, 1.0)

    def lookahead_requests(self, waiting: int, costs: StepCosts | None) -> int:
        """Return how many of ``waiting`` requests to see beyond those that could be admitted (requests).

        ``costs``: what a step costs, as in ClusterView.
        """
        return 0

    def holds(self, state: RoundState, costs: StepCosts | None, bound_s: float, wait_s_max: float) -> bool:
        """Tell whether all that wait are to wait on, whoever they are; asked before each round over them.

        The last was bound ``bound_s`` ago; who waits is sent away after ``wait_s_max`` (seconds).
        """
        return False

    @abstractmethod
    def route(self, view: ClusterView, rng: np.random.Generator) -> IntArray:
        """Return int64[N]: the worker of each waiting request, NOT_ADMITTED for those that keep waiting.

        Never more than ``slots_free`` requests and ``kv_free`` prompt tokens go to a worker.
        """

    @abstractmethod
    def place(
        self,
        state: RoundState,
        prompt_tokens: int,
        discounted_load: Sequence[float],
        rng: np.random.Generator,
    ) -> int:
        """Return the worker of a request that waits alone, or NOT_ADMITTED: the same as ``route``.

        Most rounds are such: one request has arrived and finds a free slot. ``discounted_load`` (G) is each
        worker's forecast weighed with ``discounts``.
        """

    def place_near(
        self,
        state: RoundState,
        prompt_tokens: int,
        discounted_load: Sequence[float],
        rng: np.random.Generator,
        home: Home,
        weight: float,
    ) -> int:
        """As ``place``, for a request with a home: it goes there if that is near enough to the chosen worker.

        ``weight``: what a KV token weighs in ``discounted_load``, Σ d.
        """
        worker = self.place(state, prompt_tokens, discounted_load, rng)
        if worker == NOT_ADMITTED or not self.TAKES_AFFINITY or not state.fits(home.place, prompt_tokens):
            return worker
        limit = tie_limit(discounted_load[worker] + weight * home.discount_tokens)
        return home.place if discounted_load[home.place] <= limit else worker


AnyPolicy = RoutingPolicy[PolicyParams]
POLICIES: Registry[type[AnyPolicy]] = Registry("policy", "brproxy.routing.policies")


def register_policy(name: str) -> Callable[[type[RoutingPolicy[P]]], type[RoutingPolicy[P]]]:
    """Return a class decorator that files a policy under ``name``."""

    def add(policy: type[RoutingPolicy[P]]) -> type[RoutingPolicy[P]]:
        # The registry hands a policy only parameters of its own Params class (see make_policy).
        POLICIES.register(name)(policy)  # type: ignore[arg-type]
        return policy

    return add


def make_policy(name: str, params: PolicyParams | None = None) -> AnyPolicy:
    """Build the policy called ``name`` with ``params`` or its defaults; raises UnknownNameError."""
    return make_configurable(POLICIES, name, params)


class OneByOnePolicy(RoutingPolicy[P]):
    """A baseline: requests in order of arrival, each to the worker that ``choose`` names.

    A request that fits nowhere stops the round: those behind it wait, as in an engine's own queue.
    """

    @abstractmethod
    def choose(self, state: RoundState, eligible: list[int], rng: np.random.Generator) -> int:
        """Return one of ``eligible`` (never empty) for the next request."""

    def route(self, view: ClusterView, rng: np.random.Generator) -> IntArray:
        """See RoutingPolicy.route."""
        decision = np.full(view.waiting, NOT_ADMITTED, dtype=np.int64)
        state = RoundState.of(view)
        waiting = zip(view.prompt_tokens.tolist(), view.each_sequences(), view.each_home(), strict=True)
        for i, (prompt_tokens, sequences, home) in enumerate(waiting):
            if home is None:
                worker = self.place(state, prompt_tokens, state.kv_tokens, rng)
            else:
                worker = self.place_near(state, prompt_tokens, state.kv_tokens, rng, home, 1.0)
            if worker == NOT_ADMITTED:
                break
            state.admit(worker, prompt_tokens, sequences)
            decision[i] = worker
        return decision

    def place(
        self,
        state: RoundState,
        prompt_tokens: int,
        discounted_load: Sequence[float],
        rng: np.random.Generator,
    ) -> int:
        """See RoutingPolicy.place."""
        eligible = state.eligible(prompt_tokens)
        return self.choose(state, eligible, rng) if eligible else NOT_ADMITTED


def tie_limit(least: float) -> float:
    """Return the largest discounted load that equals ``least``."""
    return least + TIE * max(1.0, least)


def least(workers: Sequence[int], keys: Sequence[int], rng: np.random.Generator) -> int:
    """Return the one of ``workers`` with the smallest of ``keys`` (G), a random one of those that tie.

    Ties are the common case on a quiet cluster; taking the first would pile everything onto worker 0.
    """
    lowest = min(map(keys.__getitem__, workers))
    ties = [g for g in workers if keys[g] == lowest]
    return ties[0] if len(ties) == 1 else ties[rng.integers(len(ties))]
