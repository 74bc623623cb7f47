"""The proxy in the simulated world: a fixed set of seeds, and what makes them worth something."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from brproxy.engines.transfer import TRANSFERS
from brproxy.proxy.exchange.client_sink import ClientSink
from tests.simulation.actions import Answer, Ask, Scenario, Trouble, Visit
from tests.simulation.parted_scenario import LEG_FAULTS, POSTS, draw_parted
from tests.simulation.runs import explain, reports, run
from tests.simulation.scenario import FAULTS, WORLD_FAULTS, draw
from tests.simulation.shrink import shrink

RANGE = 25
ROOT = Path(__file__).parents[2]


def pytest_generate_tests(metafunc):
    """Share the seeds out over cases of RANGE: three of ten have prefill and decode apart."""
    parted = metafunc.config.getoption("--simulation-seeds") * 3 // 10
    plain = metafunc.config.getoption("--simulation-seeds") - parted
    for name, seeds in (("seeds", range(plain)), ("parted_seeds", range(parted))):
        if name in metafunc.fixturenames:
            shares = [seeds[first : first + RANGE] for first in seeds[::RANGE]]
            metafunc.parametrize(name, shares, ids=lambda share: f"{share[0]}-{share[-1]}")


@pytest.fixture
def a_few(request):
    """Return a function that makes a few seeds fewer still where fewer than usual are asked for."""
    asked = request.config.getoption("--simulation-seeds")
    return lambda seeds: seeds[: max(1, len(seeds) * asked // 1000)]


def test_every_promise_is_held(seeds):
    for seed, report in reports(seeds):
        assert report.violation is None, explain(seed)


def test_every_promise_is_held_where_prefill_and_decode_are_apart(parted_seeds):
    for seed, report in reports(parted_seeds, parted=True):
        assert report.violation is None, explain(seed, parted=True)


@pytest.mark.parametrize("fault", sorted(LEG_FAULTS))
def test_every_promise_is_held_where_only_this_goes_wrong_between_two_legs(fault, a_few):
    for seed, report in reports(a_few(range(4)), frozenset({fault}), parted=True):
        assert report.violation is None, explain(seed, frozenset({fault}), parted=True)


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_every_promise_is_held_where_only_this_goes_wrong(fault, a_few):
    # Among many faults much is excused: what each of them alone may do is held more strictly.
    for seed, report in reports(a_few(range(6)), frozenset({fault})):
        assert report.violation is None, explain(seed, frozenset({fault}))


def test_every_promise_is_held_where_workers_only_refuse(a_few):
    refusals = frozenset({"refusal", "refusal-event", "refusal-hangs"})
    for seed, report in reports(a_few(range(100, 130)), refusals):
        assert report.violation is None, explain(seed, refusals)


@pytest.mark.parametrize(("seed", "parted"), [(1, False), (8, False), (13, True), (21, True)])
def test_the_same_seed_is_the_same_run(seed, parted):
    # In a process of its own, where the order of sets and the places in memory are others.
    script = (
        "from tests.simulation.runs import reports; import sys; "
        f"print(next(reports([int(sys.argv[1])], parted={parted}))[1])"
    )
    command = [sys.executable, "-c", script, str(seed)]
    environment = os.environ | {"PYTHONHASHSEED": str(seed)}
    other = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    reported = [report for _, report in reports([seed, seed], parted=parted)]
    assert reported[0] == reported[1]
    assert other.stdout.strip() == str(reported[0])


def test_seeds_differ_and_every_fault_is_drawn():
    scenarios = [draw(seed) for seed in range(100)]
    assert len({str(scenario.actions) for scenario in scenarios}) == 100
    drawn = {
        action.kind for scenario in scenarios for action in scenario.actions if isinstance(action, Trouble)
    }
    assert drawn == WORLD_FAULTS


def test_every_transfer_and_every_fault_between_two_legs_is_drawn():
    scenarios = [draw_parted(seed) for seed in range(100)]
    assert {name for one in scenarios for _, name in one.parted.transfers} == set(TRANSFERS.names())
    asks = [ask for one in scenarios for act in one.actions if isinstance(act, Visit) for ask in act.asks]
    answers = {answer.kind for ask in asks for answer in ask.prefills}
    assert answers >= {"answer", "refusal", "error", "bad-request", "garbage", "no-params"}
    assert {answer.ending for ask in asks for answer in ask.prefills} >= {"hang", "reset", "close"}
    assert {post for ask in asks for post in ask.posts} == set(POSTS)
    assert any(ask.own_handles for ask in asks)
    assert any(ask.unsplit for ask in asks)


def test_what_is_not_allowed_is_not_drawn():
    for seed in range(30):
        for action in draw(seed, frozenset()).actions:
            assert isinstance(action, Visit)
            assert all(answer.stop_at is None for ask in action.asks for answer in ask.answers)
    assert draw(5, FAULTS) != draw(5, frozenset())


def test_a_script_is_shrunk_to_what_breaks():
    scenario = draw(7)
    culprit = Visit(3.0, (Ask(900), Ask(901, prompt=5, answers=(Answer(tokens=77), Answer(ending="reset")))))
    scenario = Scenario(7, scenario.settings, scenario.workers, (*scenario.actions, culprit))

    def breaks(other):
        answers = [a for v in other.actions if isinstance(v, Visit) for k in v.asks for a in k.answers]
        return any(answer.tokens == 77 for answer in answers)

    shrunk = shrink(scenario, breaks)
    assert shrunk.actions == (Visit(3.0, (Ask(901, answers=(Answer(tokens=77),)),)),)


def test_a_proxy_that_loses_a_byte_is_found(monkeypatch):
    flush = ClientSink.flush

    def lossy(self):
        self._unsent = self._unsent.replace(b".1 ", b" ")
        flush(self)

    monkeypatch.setattr(ClientSink, "flush", lossy)
    violations = [report.violation for _, report in reports(range(10))]
    assert any(violations)


def test_nothing_happens_without_actions():
    scenario = draw(3)
    report = run(Scenario(3, scenario.settings, scenario.workers))
    assert report.violation is None
    assert report.requests == 0
