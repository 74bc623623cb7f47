"""The interface of a routing policy, and the frame that the one-request-at-a-time baselines share.

A policy is a pure function of a view and a random generator: the same view and the same generator state
give the same answer, in the proxy and in the simulator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from brproxy.registry import Registry, make_configurable
from brproxy.routing.view import NOT_ADMITTED, ClusterView, IntArray


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

    def __init__(self, params: P) -> None:
        self.params = params

    def horizon_steps(self, turnover_steps: float, lookahead_turnovers: float) -> int:
        """Return H: how many decode steps ahead the view's forecast must reach; 0 needs no predictor.

        The arguments are those of ClusterView.
        """
        return 0

    @property
    def lookahead_requests(self) -> int:
        """How many waiting requests the policy wants to see beyond those it could admit (requests)."""
        return 0

    @abstractmethod
    def route(self, view: ClusterView, rng: np.random.Generator) -> IntArray:
        """Return int64[N]: the worker of each waiting request, NOT_ADMITTED for those that keep waiting.

        Never more than ``slots_free`` requests and ``kv_free`` prompt tokens go to a worker.
        """


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


class RoundState:
    """What one decision round has changed so far: copies of the view's per-worker arrays."""

    def __init__(self, view: ClusterView) -> None:
        self.view = view
        self.kv_tokens = view.kv_tokens.copy()
        self.requests = view.requests.copy()
        self.slots_free = view.slots_free.copy()
        self.kv_free = view.kv_free.copy()

    def eligible(self, prompt_tokens: int) -> IntArray:
        """Return the workers with a free slot and KV room for a prompt, in index order."""
        return np.flatnonzero((self.slots_free > 0) & (self.kv_free >= prompt_tokens)).astype(np.int64)

    def admit(self, worker: int, prompt_tokens: int) -> None:
        """Book a request, so that the rest of the round sees it."""
        self.kv_tokens[worker] += prompt_tokens
        self.requests[worker] += 1
        self.slots_free[worker] -= 1
        self.kv_free[worker] -= prompt_tokens


class OneByOnePolicy(RoutingPolicy[P]):
    """A baseline: requests in order of arrival, each to the worker that ``choose`` names.

    A request that fits nowhere stops the round: those behind it wait, as in an engine's own queue.
    """

    @abstractmethod
    def choose(self, state: RoundState, eligible: IntArray, rng: np.random.Generator) -> int:
        """Return one of ``eligible`` (never empty) for the next request."""

    def route(self, view: ClusterView, rng: np.random.Generator) -> IntArray:
        """See RoutingPolicy.route."""
        decision = np.full(view.waiting, NOT_ADMITTED, dtype=np.int64)
        state = RoundState(view)
        for i, prompt_tokens in enumerate(view.prompt_tokens.tolist()):
            eligible = state.eligible(prompt_tokens)
            if len(eligible) == 0:
                break
            worker = self.choose(state, eligible, rng)
            state.admit(worker, prompt_tokens)
            decision[i] = worker
        return decision


def least(keys: IntArray, rng: np.random.Generator) -> int:
    """Return the position of the smallest key, a random one of those that tie.

    Ties are the common case on a quiet cluster; taking the first would pile everything onto worker 0.
    """
    ties = np.flatnonzero(keys == keys.min())
    return int(ties[0]) if len(ties) == 1 else int(ties[rng.integers(len(ties))])
