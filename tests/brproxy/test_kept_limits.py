"""What a worker holds, through reloads: what its engine has told since, and what it was seen to run."""

from brproxy.findings import NOT_ASKED, Finding, completed
from brproxy.roster import WorkerLimits
from tests.brproxy.deployments import config_of, deployment_of, the, worker


def test_what_a_worker_was_seen_to_run_at_once_outlasts_a_reload_until_somebody_says_its_slots():
    deployment = deployment_of(config_of(worker("a")))
    member = the(deployment, "a")
    assert member.limits == WorkerLimits(64, slots_are_assumed=True)
    deployment._groups["default"].set_limits("a", WorkerLimits(200, slots_are_assumed=True))
    deployment.reload(config_of(worker("a", kv_capacity_tokens=5)), "x")
    assert member.limits == WorkerLimits(200, 5, slots_are_assumed=True)
    deployment.reload(config_of(worker("a", slots=70)), "x")
    assert member.limits == WorkerLimits(70)
    deployment.reload(config_of(worker("a")), "x")
    assert member.limits == WorkerLimits(64, slots_are_assumed=True)


def filled(file, findings, deployment):
    return file.model_copy(update={"worker": completed(file.worker, findings, deployment.running())})


def test_what_engines_have_told_since_is_known_where_they_do_not_answer_later():
    deployment = deployment_of(config_of(worker("a"), worker("b", ranks="0-1", slots=3)))
    group = deployment._groups["default"]
    for name, kv_tokens in (("a", 1000), ("b/0", 700), ("b/1", 500)):
        group.set_limits(name, WorkerLimits(64, kv_tokens, capacity_is_found=True))
    assert [w.kv_capacity_tokens for w in deployment.running()] == [1000, 500]
    file = config_of(worker("a", slots=9), worker("b", ranks="0-1", slots=3))
    findings = {w.url: Finding(w.url, None, "silence") for w in file.worker}
    changes = deployment.reload(filled(file, findings, deployment), "x")
    assert list(map(str, changes.steps)) == ["limits changed a [default] (slots)"]
    assert the(deployment, "a").limits == WorkerLimits(9, 1000, capacity_is_found=True)
    assert the(deployment, "b/0").limits.kv_capacity_tokens == 700
    file = config_of(worker("a", slots=9, kv_capacity_tokens=5), worker("b", ranks="0-1", slots=3))
    deployment.reload(filled(file, NOT_ASKED, deployment), "x")
    assert the(deployment, "a").limits == WorkerLimits(9, 5)
