"""From one configuration to the next: what is planned, and what a running group makes of it."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from brproxy.config import parse_config
from brproxy.config_workers import Worker
from brproxy.deployment import Deployment, Kind, RefusedError, UnknownWorkerError, join, plan
from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.fleet import Fleet, Group
from brproxy.ledger import Ledger
from brproxy.lifecycle import Event
from brproxy.prediction.predictor import make_predictor
from brproxy.roster import Change, MemberState, Roster
from brproxy.routing.policy import make_policy
from brproxy.types import PendingRequest, WorkerIndex
from brproxy.validation import ConfigError


def config_of(*workers, **tables):
    return parse_config({"worker": list(workers)} | tables, "x.toml")


def worker(name, port=None, **more):
    return {"name": name, "url": f"http://{name}:{port or 80}"} | more


def deployment_of(config):
    groups = []
    for name, workers in config.groups.items():
        roster = Roster(checked=False)
        for each in workers:
            join(roster, each)
        parts = make_policy("least-kv"), make_predictor("survival"), np.random.default_rng(0), PoolLimits()
        groups.append(Group(name, workers[0].models, Dispatcher(Ledger(roster), *parts)))
    return Deployment(config, Fleet(groups), lambda worker: None)


def kinds(changes):
    return [(step.kind, step.worker.label) for step in changes.steps]


def test_nothing_changes_between_two_that_are_alike():
    config = config_of(worker("a"), worker("b"))
    changes = plan(config, config_of(worker("a"), worker("b")))
    assert (changes.steps, changes.restart, changes.refused) == ((), (), ())
    assert str(changes) == "no worker changes"


def test_changes_come_before_those_who_leave():
    old = config_of(worker("gone"), worker("moves", 1), worker("grows"))
    new = config_of(worker("moves", 2), worker("grows", slots=9, kv_capacity_tokens=5), worker("new"))
    changes = plan(old, new)
    assert kinds(changes) == [
        (Kind.ADDED, "new"),
        (Kind.REPLACED, "moves"),
        (Kind.LIMITS, "grows"),
        (Kind.REMOVED, "gone"),
    ]
    assert str(changes) == (
        "added new [default], replaced moves [default] (url), "
        "limits changed grows [default] (slots, kv_capacity_tokens), removed gone [default]"
    )


def test_a_worker_that_changes_its_group_leaves_one_and_comes_to_the_other():
    old = config_of(worker("a"), worker("b", group="g"), worker("c"))
    new = config_of(worker("a"), worker("b", group="g"), worker("c", group="g"))
    changes = plan(old, new)
    assert [(step.kind, step.worker.group) for step in changes.steps] == [
        (Kind.ADDED, "g"),
        (Kind.REMOVED, "default"),
    ]


def test_keys_that_are_read_at_start_only_are_named_one_by_one():
    new = config_of(
        worker("a"),
        listen={"port": 1},
        routing={"policy": "br-h", "br-h": {"gamma": 0.5}},
        timeouts={"stall_s": 3},
    )
    changes = plan(config_of(worker("a")), new)
    assert changes.restart == ("listen.port", "routing.policy", "routing.br-h.gamma", "timeouts.stall_s")
    assert str(changes).endswith(
        "needs a restart: listen.port, routing.policy, routing.br-h.gamma, timeouts.stall_s"
    )


@pytest.mark.parametrize(
    ("workers", "reason"),
    [
        ([worker("a"), worker("b", group="new")], "group 'new' is new, which needs a restart"),
        ([worker("b", group="new")], "group 'default' is gone, which needs a restart"),
        ([worker("a", model="m")], "group 'default' has another model, engine or transfer, which needs"),
        ([worker("a", engine="sglang")], "group 'default' has another model, engine or transfer, which"),
    ],
)
def test_groups_are_made_at_start(workers, reason):
    deployment = deployment_of(config_of(worker("a")))
    with pytest.raises(ConfigError) as caught:
        deployment.reload(config_of(*workers), "x.toml")
    assert any(line.startswith("x.toml: " + reason) for line in str(caught.value).split("\n"))
    assert [m.key for _, m in all_members(deployment)] == ["a"]


def test_the_order_of_a_group_s_models_is_none():
    old, new = (config_of(worker("a", model=models)) for models in (["x", "y"], ["y", "x"]))
    assert plan(old, new).steps == plan(old, new).refused == ()


def all_members(deployment):
    return [(group, member) for group in deployment._groups.values() for member in group.roster.members]


def the(deployment, name):
    (member,) = deployment.find(name)[1]
    return member


def bind(deployment, name):
    group, (member,) = deployment.find(name)
    request_id = group.dispatcher.arrive(PendingRequest(10), 0.0)
    group.dispatcher.bind(request_id, WorkerIndex(member.index), 0.0)
    return lambda: group.dispatcher.end(request_id, Event.FINISH)


def test_who_is_replaced_finishes_what_it_has_under_another_name():
    deployment = deployment_of(config_of(worker("a", 1), worker("b")))
    end = bind(deployment, "a")
    old = the(deployment, "a")
    deployment.reload(config_of(worker("a", 2), worker("b")), "x")
    new = the(deployment, "a")
    assert new is not old
    assert (new.origin, new.state, new.index) == ("http://a:2", MemberState.ACTIVE, 2)
    assert (old.key, old.state, old.index) == ("a (leaving)", MemberState.DRAINING, 0)
    deployment.reload(config_of(worker("a", 3), worker("b")), "x")
    end()
    assert old.state is MemberState.GONE
    assert [m.key for _, m in all_members(deployment)] == ["b", "a"]


def test_several_may_leave_that_had_the_same_name():
    deployment = deployment_of(config_of(worker("a", 1)))
    ends = []
    for port in (2, 3, 4):
        ends.append(bind(deployment, "a"))
        deployment.reload(config_of(worker("a", port)), "x")
    names = sorted(m.key for _, m in all_members(deployment))
    assert names == ["a", "a (leaving 2)", "a (leaving 3)", "a (leaving)"]
    for end in ends:
        end()
    assert [m.key for _, m in all_members(deployment)] == ["a"]


def test_one_that_leaves_and_is_named_again_stays_with_what_it_has():
    deployment = deployment_of(config_of(worker("a"), worker("b")))
    end = bind(deployment, "a")
    member = the(deployment, "a")
    deployment.reload(config_of(worker("b")), "x")
    with pytest.raises(RefusedError, match="worker a leaves with its last request"):
        deployment.resume("a")
    deployment.reload(config_of(worker("a", slots=7), worker("b")), "x")
    assert the(deployment, "a") is member
    assert (member.state, member.leaves, member.limits.slots) == (MemberState.ACTIVE, False, 7)
    end()
    assert member.state is MemberState.ACTIVE


def test_who_was_drained_stays_so_until_resumed():
    deployment = deployment_of(config_of(worker("a"), worker("b")))
    deployment.drain("a")
    deployment.reload(config_of(worker("a", slots=3), worker("b")), "x")
    assert the(deployment, "a").state is MemberState.DRAINING
    deployment.reload(config_of(worker("a", 9), worker("b")), "x")
    assert the(deployment, "a").origin == "http://a:9"
    assert the(deployment, "a").state is MemberState.DRAINING
    assert [m.state for m in deployment.resume("a")] == [MemberState.ACTIVE]


def test_who_was_added_stays_until_the_file_names_it():
    deployment = deployment_of(config_of(worker("a")))
    deployment.add(Worker(url="http://late:1", name="late"))
    changes = deployment.reload(config_of(worker("a")), "x")
    assert (changes.steps, changes.kept) == ((), ("late",))
    assert "added by the admin API and kept: late" in str(changes)
    deployment.reload(config_of(worker("a"), worker("late", 1, slots=5)), "x")
    assert the(deployment, "late").limits.slots == 5
    deployment.reload(config_of(worker("a")), "x")
    with pytest.raises(UnknownWorkerError, match="there is no worker late"):
        deployment.find("late")


def test_who_was_removed_comes_back_with_a_file_that_names_it_and_that_is_said():
    deployment = deployment_of(config_of(worker("a"), worker("b")))
    deployment.remove("a")
    changes = deployment.reload(config_of(worker("a"), worker("b")), "x")
    assert kinds(changes) == [(Kind.ADDED, "a")]


def test_the_last_of_a_group_is_not_removed():
    deployment = deployment_of(config_of(worker("a"), worker("b", group="g")))
    with pytest.raises(RefusedError, match="worker b is the last of group g: add another one first"):
        deployment.remove("b")
    deployment.add(Worker(url="http://c:1", group="g"))
    deployment.remove("b")
    assert [m.key for _, m in all_members(deployment)] == ["a", "c:1"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"url": "http://x:1", "group": "no"},
            "worker.group: 'no' is no group of this proxy; groups",
        ),
        ({"url": "http://a:80"}, "worker a:80.url: 'http://a:80' is worker a's already"),
        ({"url": "http://x:1", "name": "a"}, "worker a.name: 'a' is worker a's already"),
        (
            {"url": "http://x:1", "model": "m"},
            "worker x:1: group 'default' has workers with different models",
        ),
    ],
)
def test_one_that_does_not_go_with_the_others_is_not_added(more, said):
    deployment = deployment_of(config_of(worker("a")))
    with pytest.raises(ConfigError) as caught:
        deployment.add(Worker(**more))
    assert str(caught.value).startswith(said)
    assert [m.key for _, m in all_members(deployment)] == ["a"]


def test_a_file_that_goes_against_who_was_added_changes_nothing():
    deployment = deployment_of(config_of(worker("a")))
    deployment.add(Worker(url="http://late:1", name="late"))
    with pytest.raises(ConfigError) as caught:
        deployment.reload(config_of(worker("b"), worker("other") | {"url": "http://late:1"}), "x.toml")
    assert str(caught.value) == (
        "x.toml: worker late.url: 'http://late:1' is worker other's already; each worker must have its own"
    )
    assert [m.key for _, m in all_members(deployment)] == ["a", "late"]


def keys_of(deployment):
    return [m.key for _, m in all_members(deployment)]


def test_a_worker_may_be_several_members():
    deployment = deployment_of(config_of(worker("a", ranks="0-1", slots=10), worker("b", ranks="0", slots=1)))
    assert keys_of(deployment) == ["a/0", "a/1", "b/0"]
    assert [m.key for m in deployment.drain("a")] == ["a/0", "a/1"]
    assert [m.key for m in deployment.resume("a/1")] == ["a/1"]
    with pytest.raises(RefusedError, match="a/1 is a part of a worker, which can only be removed as a whole"):
        deployment.remove("a/1")
    changes = deployment.reload(
        config_of(worker("a", ranks="0-2", slots=100), worker("b", 9, ranks="0", slots=1)), "x"
    )
    assert list(map(str, changes.steps)) == [
        "added a/2 [default]",
        "replaced b/0 [default] (url)",
        "limits changed a/0 [default] (slots, ranks)",
        "limits changed a/1 [default] (slots, ranks)",
    ]
    assert [the(deployment, f"a/{n}").state for n in range(3)] == [
        MemberState.DRAINING,
        MemberState.ACTIVE,
        MemberState.ACTIVE,
    ]
    assert [m.key for m in deployment.add(Worker(url="http://c:1", ranks="0-1"))] == ["c:1/0", "c:1/1"]
    assert [m.state for m in deployment.remove("a")] == [MemberState.GONE] * 3
    assert sorted(keys_of(deployment)) == ["b/0", "c:1/0", "c:1/1"]


def test_what_connections_are_made_with_is_noted_and_of_a_worker_that_stays_needs_a_restart():
    reached = []
    config = config_of(worker("a"), worker("b"))
    deployment = deployment_of(config)
    deployment._reach = reached.append
    key = {"headers": {"X-Key": "k"}}
    changes = deployment.reload(config_of(worker("a", **key), worker("b", 9, **key), worker("c", **key)), "x")
    assert list(map(str, changes.steps)) == ["added c [default]", "replaced b [default] (url, headers)"]
    assert changes.restart == ("worker a: headers",)
    assert [(one.label, one.fields) for one in reached] == [(n, ((b"X-Key", b"k"),)) for n in ("c", "b")]


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


DeploymentMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestDeploymentMachine = DeploymentMachine.TestCase
