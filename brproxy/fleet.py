"""The barrier groups, and which of them serves a request. Pure.

Envelope, margin and pool exist per group; a request enters exactly one. Which one, when several serve its
model, is decided on arrival, among those that can take anything, by load and speed against capacity: what a
token will take there, and whether requests queue for room. Groups whose speed is not known are told apart by
how full they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from brproxy.dispatcher import Dispatcher
from brproxy.roster import Member, Roster, WorkerLimits, name_of_leaving
from brproxy.step_costs import StepCosts
from brproxy.step_model import StepModel
from brproxy.types import InvalidInputError


class UnknownModelError(InvalidInputError):
    """No barrier group serves the requested model."""


@dataclass(slots=True, eq=False)
class Group:
    """One barrier group: its name, its models (empty: any) and its dispatcher, which has the roster.

    ``prefills``: it only prefills, for another group; no request is for it. ``of``: the group in the
    configuration that it is, or prefills for. ``leaves``: it takes no new requests and goes with its last.
    ``steps`` learns what its steps cost, None where nobody looks at them.
    """

    name: str
    models: frozenset[str]
    dispatcher: Dispatcher
    prefills: bool = False
    of: str = ""
    leaves: bool = False
    steps: StepModel | None = None

    def __post_init__(self) -> None:
        """Be the configuration's group of that name where nothing else is said."""
        self.of = self.of or self.name

    @property
    def roster(self) -> Roster:
        """Who its workers are, and how they are."""
        return self.dispatcher.roster

    def serves(self, model: str) -> bool:
        """Tell whether a request for ``model`` may come here; "" is a request that names none."""
        return not self.models or not model or model in self.models

    @property
    def fullness(self) -> float:
        """What is bound and waits, as a share of what fits: of slots, or of KV capacity where that is less.

        What fits is of workers that may be chosen; without any it is endless. More than 1: some have to wait.
        """
        ledger, waiting = self.dispatcher.ledger, self.dispatcher.waiting.count
        members = [member for member in self.roster.members if member.is_routable]
        if not members:
            return math.inf
        # Also of workers that may not be chosen: that will be done there, or moves.
        running = sum(ledger.sequences)
        by_slots = (running + waiting) / max(1, sum(member.limits.slots for member in members))
        capacities = [member.limits.kv_capacity_tokens for member in members]
        if None in capacities:
            return by_slots
        # Who waits will be as large as those that run.
        expected = sum(ledger.load()) * (1 + waiting / max(1, running))
        return max(by_slots, expected / max(1, sum(filter(None, capacities))))

    def step_s(self, costs: StepCosts) -> float:
        """Return how long a step takes that prefills nothing: as long as its slowest worker (seconds)."""
        load = self.dispatcher.ledger.load()
        loads = [load[member.index] for member in self.roster.members]
        slowness = costs.slowness
        if slowness is not None and len(slowness) == len(loads):
            return costs.base_s + costs.s_per_kv_token * max(map(mul, slowness, loads), default=0)
        return costs.base_s + costs.s_per_kv_token * max(loads, default=0)

    def add(
        self, key: str, limits: WorkerLimits, origin: str = "", lines: bytes = b"", rank: int | None = None
    ) -> Member:
        """Add a worker to the running group; raises InvalidInputError for a name that is taken."""
        return self.roster.add(key, limits, origin, lines, rank)

    def drain(self, key: str) -> Member:
        """Have a worker take no new requests; raises RosterError for an unknown one."""
        return self.roster.drain(key)

    def resume(self, key: str) -> Member:
        """Have a worker that drains take requests again; raises RosterError, also for one that leaves."""
        return self.roster.resume(key)

    def set_limits(self, key: str, limits: WorkerLimits) -> Member:
        """Change what a worker holds while it runs; raises RosterError for an unknown one."""
        return self.roster.set_limits(key, limits)

    def remove(self, key: str) -> Member:
        """Have a worker go: at once if nothing is bound to it, else with its last request.

        Raises RosterError for an unknown one.
        """
        return self.roster.remove(key, self.dispatcher.ledger.requests[self.roster.find(key).index])


def least_pressed(groups: Sequence[Group]) -> Group:
    """Return the one of ``groups`` in which a request is done soonest, as far as their speed is known.

    A token takes a step there, and a request waits for as many of its own lifetimes as the group is fuller
    than full.
    """
    costs = [group.dispatcher.costs() for group in groups]
    fullness = [group.fullness for group in groups]
    steps_s = [0.0 if each is None else group.step_s(each) for group, each in zip(groups, costs, strict=True)]
    if not all(steps_s):
        steps_s = [1.0] * len(groups)
    ranks = [
        (full == math.inf, step_s * max(1.0, full), full)
        for full, step_s in zip(fullness, steps_s, strict=True)
    ]
    return groups[ranks.index(min(ranks))]


class Fleet:
    """All barrier groups behind one proxy, as they come and go."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)
        self._index()

    def add(self, group: Group) -> None:
        """Have a group serve requests from now on; raises InvalidInputError for a name that is taken.

        One that leaves gives its name away.
        """
        before = next((each for each in self.groups if each.name == group.name), None)
        if before is not None:
            if not before.leaves:
                msg = f"there is a group {group.name} already"
                raise InvalidInputError(msg)
            before.name = self._name_of_leaving(before)
        self.groups = (*self.groups, group)
        self._index()

    def retire(self, group: Group) -> None:
        """Have a group be chosen for no request any more, and be called a leaving one."""
        group.leaves = True
        group.name = self._name_of_leaving(group)
        self._index()

    def forget(self, group: Group) -> None:
        """Let go of a group that has gone."""
        self.groups = tuple(each for each in self.groups if each is not group)
        self._index()

    def set_models(self, group: Group, models: frozenset[str]) -> None:
        """Have a group serve ``models`` from now on; what it has of others it keeps."""
        group.models = models
        self._index()

    def _name_of_leaving(self, group: Group) -> str:
        return name_of_leaving(group.name, {each.name for each in self.groups})

    def _index(self) -> None:
        """Work out which groups serve which model."""
        self._serving = tuple(group for group in self.groups if not (group.prefills or group.leaves))
        self._of_any_model = tuple(group for group in self._serving if not group.models)
        models = {model for group in self._serving for model in group.models}
        of_model = {model: tuple(g for g in self._serving if g.serves(model)) for model in models}
        self._of_model = of_model | {"": self._serving}

    @property
    def ready(self) -> bool:
        """Tell whether any worker of any group may be chosen, and not only for want of a healthy one."""
        return any(member.is_routable for group in self._serving for member in group.roster.members)

    def choose(self, model: str) -> Group:
        """Return the group for a request; raises UnknownModelError, which lists the models served.

        A group without a routable worker is the last resort: the request then waits for one to return.
        """
        serving = self._of_model.get(model, self._of_any_model)
        if not serving:
            known = ", ".join(sorted(filter(None, self._of_model)))
            msg = f"The model `{model}` does not exist. Models served here: {known}."
            raise UnknownModelError(msg)
        return serving[0] if len(serving) == 1 else least_pressed(serving)
