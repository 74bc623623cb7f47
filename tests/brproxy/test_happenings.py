"""Who is told what happens to requests, and what a predictor learns from it."""

import numpy as np
import pytest

from brproxy.dispatcher import Dispatcher, PoolLimits
from brproxy.happenings import Observer
from brproxy.ledger import Ledger
from brproxy.lifecycle import Event, State
from brproxy.prediction.predictor import make_predictor
from brproxy.roster import Roster, WorkerLimits
from brproxy.routing.policy import make_policy
from brproxy.types import PendingRequest


class Log(Observer):
    def __init__(self):
        self.lines = []

    def arrived(self, entry):
        self.lines.append(("arrived", entry.id))

    def bound(self, entry, waited_s):
        self.lines.append(("bound", entry.id, waited_s))

    def retried(self, entry, member):
        self.lines.append(("retried", entry.id, member.key))

    def ended(self, entry, event, waited_s):
        self.lines.append(("ended", entry.id, event.name, waited_s))


def dispatcher_of(*limits):
    dispatcher = Dispatcher(
        Ledger(Roster.of(limits or [WorkerLimits(1)])),
        make_policy("br-0"),
        make_predictor("survival"),
        np.random.default_rng(0),
        PoolLimits(),
    )
    log = Log()
    dispatcher.happenings.tell(log)
    return dispatcher, log


def test_each_wait_is_told_and_none_that_a_worker_has_spent():
    dispatcher, log = dispatcher_of(WorkerLimits(1), WorkerLimits(1))
    first = dispatcher.arrive(PendingRequest(1), 10.0)
    late = dispatcher.arrive(PendingRequest(1), 11.0)
    dispatcher.decide(12.0, (True, False))
    dispatcher.retry(first, 100.0)
    dispatcher.decide(103.0, (False, True))
    dispatcher.end(first, Event.FINISH)
    dispatcher.end(late, Event.EXPIRE, 111.0)
    assert log.lines == [
        ("arrived", first),
        ("arrived", late),
        ("bound", first, 2.0),
        ("retried", first, "0"),
        ("bound", first, 3.0),
        ("ended", first, "FINISH", None),
        ("ended", late, "EXPIRE", 100.0),
    ]


def test_what_an_observer_does_not_override_is_not_called():
    dispatcher, _ = dispatcher_of()
    before = len(dispatcher.happenings._ended)
    dispatcher.happenings.tell(Observer())
    assert len(dispatcher.happenings._ended) == before


@pytest.mark.parametrize(
    ("sequences", "output_tokens", "taught"),
    [(1, 40, [40]), (4, 40, [10]), (4, 3, [1]), (0, 40, []), (2, 0, [])],
)
def test_a_request_teaches_the_length_of_one_sequence(sequences, output_tokens, taught):
    dispatcher, _ = dispatcher_of(WorkerLimits(8))
    learnt = []
    dispatcher.predictor.observe = lambda request, tokens, ended: learnt.append(tokens)
    request_id = dispatcher.arrive(PendingRequest(5, sequences=sequences), 0.0)
    dispatcher.decide(0.0, (True,))
    dispatcher.ledger.grow(request_id, output_tokens)
    assert dispatcher.end(request_id, Event.FINISH).state is State.FINISHED
    assert learnt == taught
