"""From one configuration to the next: what is planned, and that it leads to what the next would give."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brproxy.plans import Kind, is_live, plan
from tests.brproxy.deployments import config_of, deployment_of, kinds, worker


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
    assert changes.restart == ("listen.port", "timeouts.stall_s")
    assert changes.changed == ("routing.policy", "routing.br-h.gamma")
    assert str(changes).endswith(
        "taken up: routing.policy, routing.br-h.gamma; needs a restart: listen.port, timeouts.stall_s"
    )


def test_the_order_of_a_group_s_models_is_none():
    old, new = (config_of(worker("a", model=models)) for models in (["x", "y"], ["y", "x"]))
    assert plan(old, new).steps == plan(old, new).refused == ()


def test_how_workers_are_reached_and_what_they_hold_are_changes_of_their_own():
    key = {"headers": {"X-Key": "k"}, "slots": 3}
    changes = plan(config_of(worker("a"), worker("b")), config_of(worker("a", **key), worker("b", 9, **key)))
    assert list(map(str, changes.steps)) == [
        "replaced b [default] (url, slots, headers)",
        "reached otherwise a [default] (headers)",
        "limits changed a [default] (slots)",
    ]
    assert changes.restart == ()


PARTED = ({"role": "prefill", "bootstrap_port": 1}, {"role": "decode"})


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        ([worker("a"), worker("b", group="new")], "added group new, added b [new]"),
        ([worker("b", group="new")], "added group new, removed group default, added b [new]"),
        ([worker("a", model="m")], "models changed group default"),
        (
            [worker("a", model=["m", "n"], slots=2)],
            "models changed group default, limits changed a [default] (slots)",
        ),
        ([worker("a", engine="sglang")], "replaced group default, added a [default]"),
        (
            [worker("a", **PARTED[1]), worker("p", **PARTED[0])],
            "replaced group default, added a [default], added p [default/prefill]",
        ),
    ],
)
def test_groups_come_and_go_and_are_made_anew(workers, said):
    changes = plan(config_of(worker("a")), config_of(*workers))
    assert str(changes) == said


def test_what_prefills_comes_and_goes_with_its_group():
    whole = config_of(worker("a", **PARTED[1]), worker("p", **PARTED[0]))
    other = config_of(
        worker("a", **PARTED[1], transfer="mooncake"), worker("p", **PARTED[0], transfer="mooncake")
    )
    assert str(plan(whole, other)) == ("replaced group default, added a [default], added p [default/prefill]")
    moved = config_of(worker("a", **PARTED[1]), worker("p", **PARTED[0] | {"bootstrap_port": 2}))
    assert str(plan(whole, moved)) == "reached otherwise p [default/prefill] (bootstrap_port)"


NAMES = ("a", "b", "c", "d")


@st.composite
def configurations(draw):
    """Draw a file: workers in two groups at most, each of an engine and models of its own, parted or not."""
    places = draw(
        st.dictionaries(
            st.sampled_from(NAMES),
            st.tuples(st.sampled_from("gh"), st.integers(1, 2), st.integers(1, 3)),
            min_size=1,
        )
    )
    groups = {
        name: {
            "engine": draw(st.sampled_from(["vllm", "sglang"])),
            "model": draw(st.sampled_from(["", "m", "n"])),
            "transfer": draw(st.sampled_from(["", "mooncake"])),
        }
        for name in "gh"
    }
    parted = {name for name in "gh" if draw(st.booleans()) and sum(p[0] == name for p in places.values()) > 1}
    workers, seen = [], set()
    for name, (group, port, slots) in places.items():
        role = "both" if group not in parted else "decode" if group in seen else "prefill"
        seen.add(group)
        workers.append(worker(name, port, group=group, slots=slots, role=role, **groups[group]))
    policy = draw(st.sampled_from(["br-0", "br-h"]))
    return config_of(
        *workers,
        listen={"port": draw(st.integers(1, 2))},
        routing={"policy": policy, "seed": draw(st.integers(0, 1)), "tick_ms": draw(st.integers(1, 2))},
        limits={"retries_max": draw(st.integers(0, 1))},
    )


def described(deployment):
    """Return what the groups of the configuration are, and whom the fleet chooses for each model."""
    groups = {
        name: (
            group.models,
            group.prefills,
            group.leaves,
            deployment._making.made_of[group],
            {m.key: (m.origin, m.limits, m.lines) for m in group.roster.members if not m.leaves},
        )
        for name, group in deployment._groups.items()
    }
    fleet = deployment._fleet
    serving = {model: {group.name for group in of} for model, of in fleet._of_model.items()}
    return groups, serving, {group.name for group in fleet._of_any_model}


def leaf_keys(model, prefix=""):
    for name, field in type(model).model_fields.items():
        value, key = getattr(model, name), prefix + (field.alias or name)
        if key == "worker":
            continue
        if hasattr(type(value), "model_fields"):
            yield from leaf_keys(value, f"{key}.")
        else:
            yield key, value


@settings(deadline=None)
@given(st.lists(configurations(), min_size=2, max_size=4))
def test_a_plan_leads_to_what_the_next_configuration_would_give_by_itself(files):
    deployment = deployment_of(files[0])
    first, settled = dict(leaf_keys(files[0])), []
    for before, file in itertools.pairwise(files):
        changes = deployment.reload(file, "x")
        assert described(deployment) == described(deployment_of(file))
        assert list(deployment.config.worker) == list(file.worker)
        wanted, runs, previous = (dict(leaf_keys(one)) for one in (file, deployment.config, before))
        assert runs == {key: value if is_live(key) else first[key] for key, value in wanted.items()}
        assert set(changes.restart) == {k for k, v in wanted.items() if not is_live(k) and v != first[k]}
        assert set(changes.changed) == {k for k, v in wanted.items() if is_live(k) and v != previous[k]}
        settled += [deployment.config] if changes.changed else []
        assert deployment._making.settled == settled
    again = deployment.reload(files[-1], "x")
    assert (again.steps, again.groups, again.changed) == ((), (), ()), "it has arrived"


@given(configurations(), configurations())
def test_the_new_are_there_before_the_old_leave(old, new):
    changes = plan(old, new)
    order = [list(Kind).index(step.kind) for step in changes.steps]
    assert order == sorted(order)
