"""What running groups make of a new configuration, and of what the admin API asks."""

import pytest

from brproxy.config_workers import Worker
from brproxy.deployment import RefusedError, UnknownWorkerError
from brproxy.lifecycle import Event
from brproxy.plans import Kind
from brproxy.roster import MemberState
from brproxy.types import PendingRequest, WorkerIndex
from brproxy.validation import ConfigError
from tests.brproxy.deployments import all_members, config_of, deployment_of, kinds, the, worker


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


def test_how_workers_are_reached_is_noted_before_they_come_and_when_it_changes():
    deployment = deployment_of(config_of(worker("a"), worker("b")))
    key = {"headers": {"X-Key": "k"}}
    changes = deployment.reload(config_of(worker("a", **key), worker("b", 9, **key), worker("c", **key)), "x")
    assert list(map(str, changes.steps)) == [
        "added c [default]",
        "replaced b [default] (url, headers)",
        "reached otherwise a [default] (headers)",
    ]
    reached = [(one.label, one.fields) for one in deployment._making.reached]
    assert reached == [(name, ((b"X-Key", b"k"),)) for name in ("c", "b", "a")]


def test_a_group_that_is_removed_serves_what_it_has_under_another_name():
    deployment = deployment_of(config_of(worker("a"), worker("b", group="g", model="m")))
    end = bind(deployment, "b")
    deployment.reload(config_of(worker("a")), "x")
    (old,) = deployment._making.ended
    assert (old.name, old.leaves, old.roster.find("b").is_routable) == ("g (leaving)", True, True)
    with pytest.raises(
        RefusedError, match=r"worker b goes with its group g \(leaving\), whose last requests"
    ):
        deployment.drain("b")
    deployment.reload(config_of(worker("a"), worker("b", group="g", model="m")), "x")
    assert the(deployment, "b") is not old.roster.find("b")
    assert [group.name for group in deployment._fleet.groups] == ["default", "g (leaving)", "g"]
    end()


def test_who_was_drained_stays_so_in_a_group_that_is_made_anew():
    deployment = deployment_of(config_of(worker("a"), worker("b")))
    deployment.drain("a")
    deployment.reload(config_of(worker("a", engine="sglang"), worker("b", engine="sglang")), "x")
    assert [the(deployment, name).state for name in "ab"] == [MemberState.DRAINING, MemberState.ACTIVE]


def test_a_group_stays_for_whom_the_admin_api_has_added_to_it():
    deployment = deployment_of(config_of(worker("a"), worker("b", group="g")))
    deployment.add(Worker(url="http://late:1", name="late", group="g"))
    changes = deployment.reload(config_of(worker("a")), "x")
    assert (changes.groups, kinds(changes)) == ((), [(Kind.REMOVED, "b")])
