"""Closed batches in ``loadgen simulate``: the longest first, and what an epoch before has taught."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from brproxy.types import InvalidInputError
from loadgen.cluster_settings import ClusterSettings
from loadgen.commands.policy_spec import parse_policy
from loadgen.commands.scenario import Arrivals, Scenario, WorkloadChoice
from loadgen.commands.simulate import _Job, _one


def a_closed_batch(epochs=1, requests=512):
    return Scenario(
        WorkloadChoice("rollouts", requests=requests, epochs=epochs),
        Arrivals(at_once=True),
        ClusterSettings(workers=4, slots=16),
        seed=3,
    )


def test_an_epoch_before_has_the_same_prompts_and_other_samples():
    (before,), (run, _) = a_closed_batch(2).earlier_epochs(), a_closed_batch(2).draw()
    assert run == a_closed_batch(1).draw()[0]
    assert not a_closed_batch(1).earlier_epochs()
    for seen, again in zip(before.requests, run.requests, strict=True):
        assert (seen.prompt_key, seen.prompt_tokens) == (again.prompt_key, again.prompt_tokens)
        assert seen.batch == again.batch == "rollouts"
    logs = [np.log([r.output_tokens for r in each.requests]).reshape(-1, 8).mean(1) for each in (before, run)]
    assert np.corrcoef(*logs)[0, 1] > 0.9
    assert [r.output_tokens for r in before.requests] != [r.output_tokens for r in run.requests]


def makespan_s(policy, *closed_batch):
    scenario = a_closed_batch(*closed_batch)
    return _one(_Job(policy, parse_policy(policy, "exact-match"), scenario)).makespan_s


@pytest.mark.long_simulation
def test_a_closed_batch_is_done_sooner_the_longest_first_and_sooner_still_if_seen_before():
    as_it_comes, first, again = makespan_s("br-0+fifo"), makespan_s("br-0"), makespan_s("br-0", 2)
    assert first < 0.97 * as_it_comes
    assert again < 0.97 * first


def test_where_who_arrives_is_bound_nobody_waits_in_any_order():
    assert makespan_s("join-shortest-queue", 1, 96) == makespan_s("join-shortest-queue+fifo", 1, 96)
    assert makespan_s("br-0", 1, 96) != makespan_s("br-0+fifo", 1, 96)


@pytest.mark.parametrize(
    ("scenario", "says"),
    [
        (replace(a_closed_batch(2), arrivals=Arrivals(rate=1.0)), "set arrivals.at_once"),
        (Scenario(WorkloadChoice("short", epochs=2), Arrivals(at_once=True)), "'short' has no epochs"),
        (Scenario(WorkloadChoice(trace=Path("x"), epochs=2), Arrivals(at_once=True)), "leave out the trace"),
    ],
)
def test_epochs_are_of_closed_batches(scenario, says):
    with pytest.raises(InvalidInputError, match=says):
        scenario.earlier_epochs()
