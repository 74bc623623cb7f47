"""Reloads of one group and what an operator does between them, drawn, beside a plain model."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from brproxy.config_workers import Worker
from brproxy.deployment import RefusedError
from brproxy.lifecycle import Event
from brproxy.plans import Kind
from brproxy.roster import Change, MemberState
from brproxy.types import PendingRequest, WorkerIndex
from brproxy.validation import ConfigError
from tests.brproxy.deployments import config_of, deployment_of, worker
from tests.draws import draws

NAMES = ("a", "b", "c", "d")
tables = st.dictionaries(st.sampled_from(NAMES), st.tuples(st.integers(1, 2), st.integers(1, 3)), min_size=1)
"""Port and slots of each worker by its name."""


class DeploymentMachine(RuleBasedStateMachine):
    """Reloads and what an operator does between them, while requests come and end, beside a plain model."""

    def __init__(self):
        super().__init__()
        self.model = {"a": (1, 1), "b": (1, 2)}
        self.drained = set()
        self.by_admin = set()
        self.deployment = deployment_of(self.config(self.model))
        (self.group,) = self.deployment._groups.values()
        self.ledger = self.group.dispatcher.ledger
        self.running = []
        self.seen = set(self.group.roster.members)
        self.group.roster.observe(self.told)
        self.columns_most = len(self.seen)

    @staticmethod
    def config(table):
        return config_of(*(worker(name, port, slots=slots) for name, (port, slots) in table.items()))

    def told(self, member, change):
        if change is Change.ADDED:
            assert member not in self.seen
            self.seen.add(member)
            self.columns_most = max(self.columns_most, len(self.seen))
        elif change is Change.GONE:
            self.seen.remove(member)

    @rule(table=tables)
    def reload(self, table):
        kept = {name: self.model[name] for name in self.by_admin - table.keys()}
        changes = self.deployment.reload(self.config(table), "x.toml")
        before, self.model = self.model, table | kept
        self.by_admin = set(kept)
        self.drained &= self.model.keys()
        added = {step.worker.label for step in changes.steps if step.kind is Kind.ADDED}
        assert added == self.model.keys() - before.keys()
        assert {s.worker.label for s in changes.steps if s.kind is Kind.REMOVED} == (
            before.keys() - self.model.keys()
        )

    @rule(name=st.sampled_from(NAMES), port=st.integers(1, 2), slots=st.integers(1, 3))
    def add(self, name, port, slots):
        wanted = Worker(url=f"http://{name}:{port}", name=name, slots=slots)
        if name in self.model:
            with pytest.raises(ConfigError, match="already"):
                self.deployment.add(wanted)
        else:
            self.deployment.add(wanted)
            self.model[name] = (port, slots)
            self.by_admin.add(name)

    @rule(name=st.sampled_from(NAMES))
    def drain(self, name):
        if name in self.model:
            self.deployment.drain(name)
            self.drained.add(name)

    @rule(name=st.sampled_from(NAMES))
    def resume(self, name):
        if name in self.model:
            self.deployment.resume(name)
            self.drained.discard(name)

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name):
        if name not in self.model:
            return
        if len(self.model) == 1:
            with pytest.raises(RefusedError):
                self.deployment.remove(name)
            return
        self.deployment.remove(name)
        del self.model[name]
        self.by_admin.discard(name)
        self.drained.discard(name)

    @rule(position=st.integers(0, 9))
    def begin(self, position):
        members = [m for m in self.group.roster.members if m.state is MemberState.ACTIVE]
        if members:
            member = members[position % len(members)]
            dispatcher = self.group.dispatcher
            request_id = dispatcher.arrive(PendingRequest(7), 0.0)
            dispatcher.bind(request_id, WorkerIndex(member.index), 0.0)
            self.running.append((request_id, member))

    @precondition(lambda self: self.running)
    @rule(position=st.integers(0, 99))
    def end(self, position):
        request_id, member = self.running.pop(position % len(self.running))
        assert self.ledger.entry(request_id).worker == member.index, "nothing has moved it"
        self.group.dispatcher.end(request_id, Event.FINISH)

    @invariant()
    def who_is_there_is_who_should_be(self):
        members = {m.key: m for m in self.group.roster.members}
        assert len(members) == len(self.group.roster.members), "names are unique"
        staying = {
            key: (int(m.origin.rpartition(":")[2]), m.limits.slots)
            for key, m in members.items()
            if not m.leaves
        }
        assert staying == self.model
        assert {w.label for w in self.deployment.config.worker} == self.model.keys()
        assert self.drained == {
            key for key, m in members.items() if not m.leaves and m.state is MemberState.DRAINING
        }
        assert set(members.values()) == self.seen, "observers know the same"
        busy = {member for _, member in self.running}
        assert {m for m in members.values() if m.leaves} <= busy

    @invariant()
    def the_books_are_of_who_is_there(self):
        roster = self.group.roster
        for member in roster.members:
            held = sum(1 for _, of in self.running if of is member)
            assert self.ledger.requests[member.index] == held
            assert self.ledger.kv_tokens[member.index] == 7 * held
            assert self.ledger._slots[member.index] == member.limits.slots
        assert self.ledger.slots_total == sum(m.limits.slots for m in roster.members)
        assert roster.columns <= self.columns_most, "indices are used again"

    def teardown(self):
        for request_id, _ in self.running:
            self.group.dispatcher.end(request_id, Event.CANCEL)
        assert not any(self.ledger.kv_tokens + self.ledger.requests)
        assert {m.key for m in self.group.roster.members} == self.model.keys()


DeploymentMachine.TestCase.settings = draws(60, stateful_step_count=40, deadline=None)
TestDeploymentMachine = DeploymentMachine.TestCase
