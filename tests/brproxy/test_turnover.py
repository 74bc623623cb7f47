"""How fast slots turn over: by what runs, and steadily."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.ledger import Ledger
from brproxy.lifecycle import Event
from brproxy.prediction.predictor import make_predictor
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policy import make_policy
from brproxy.turnover import Turnover
from brproxy.types import PendingRequest, WorkerIndex
from tests.draws import draws


class Group:
    """A group of which so many requests run as is said."""

    def __init__(self, workers, slots):
        ledger = Ledger(Roster.of([WorkerLimits(slots)] * workers))
        self.dispatcher = Dispatcher(
            ledger, make_policy("br-h"), make_predictor("survival"), np.random.default_rng(0), PoolLimits()
        )
        self.workers = workers
        self.running = []

    def run(self, count, sequences=1):
        while len(self.running) > count:
            self.dispatcher.end(self.running.pop(), Event.CANCEL)
        while len(self.running) < count:
            request_id = self.dispatcher.arrive(PendingRequest(1, sequences=sequences), 0.0)
            self.dispatcher.bind(request_id, WorkerIndex(len(self.running) % self.workers), 0.0)
            self.running.append(request_id)


@pytest.mark.parametrize(
    ("workers", "slots", "running", "each"),
    [(8, 512, 800, 100), (8, 64, 512, 64), (8, 64, 9000, 64), (4, 512, 9, 64), (4, 16, 3, 16), (2, 1, 2, 1)],
)
def test_it_is_of_what_runs(workers, slots, running, each):
    group = Group(workers, slots)
    group.run(running)
    turnover = Turnover(group.dispatcher.ledger)
    turnover.look()
    assert turnover.steps(1200.0) == pytest.approx(1200 / each)


def test_sequences_count():
    group = Group(2, 512)
    group.run(10, sequences=20)
    turnover = Turnover(group.dispatcher.ledger)
    turnover.look()
    assert turnover.steps(1000.0) == pytest.approx(10), "a hundred on each"


@draws(20)
@given(st.lists(st.integers(360, 440), min_size=1, max_size=20), st.integers(600, 900))
def test_it_does_not_jump_with_every_arrival_and_follows_what_lasts(counts, lasting):
    group = Group(4, 512)
    turnover = Turnover(group.dispatcher.ledger)
    for count in counts:
        group.run(count)
        turnover.look()
    assert turnover.version == 1
    group.run(lasting)
    for _ in range(2000):
        turnover.look()
    assert turnover.steps(1000.0) == pytest.approx(4000 / lasting, rel=0.26)
    assert turnover.version <= 4
    turnover.settle()
    assert turnover.steps(1000.0) == pytest.approx(4000 / lasting, rel=0.01)


def test_br_h_looks_ahead_with_many_slots_of_which_few_are_taken():
    group = Group(8, 512)
    group.run(520)
    foresight = group.dispatcher._foresight
    discounts, turnover_steps = foresight.discounts()
    assert turnover_steps == pytest.approx(512 / 65, rel=0.01)
    assert len(discounts) > 1
    for count in (521, 530, 515, 540):
        group.run(count)
        assert foresight.discounts()[0] is discounts, "what is cached stays"
