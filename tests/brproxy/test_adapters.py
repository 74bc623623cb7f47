"""Which worker has which LoRA adapter."""

from brproxy.adapters import Adapters
from brproxy.roster import Roster, WorkerLimits


def three():
    roster = Roster.of([WorkerLimits(8)] * 3)
    return roster, Adapters(roster), roster.members


def test_those_that_are_known_to_have_none_of_it_lack_it():
    _, adapters, (a, b, c) = three()
    assert adapters.lacking("sql") == frozenset()
    adapters.told([a, b], frozenset({"sql", "law"}))
    assert adapters.lacking("sql") == {c.index}
    adapters.told([c], frozenset({"sql"}))
    assert adapters.lacking("sql") == frozenset()
    assert adapters.lacking("law") == {c.index}
    # No adapter, or nobody's: the engine has the word.
    assert adapters.lacking("base") == frozenset()
    adapters.told([a, b], frozenset())
    assert adapters.names == {"sql"}
    assert adapters.lacking("law") == frozenset()


def test_who_has_gone_has_nothing():
    roster, adapters, (a, b, _) = three()
    adapters.told([a], frozenset({"sql"}))
    roster.remove(b.key, 0)
    assert b.index not in adapters.lacking("sql")
    roster.remove(a.key, 0)
    assert adapters.names == frozenset()
    adapters.told([a], frozenset({"sql"}))
    assert adapters.names == frozenset(), "it answered after it had gone"
    late = roster.add("late", WorkerLimits(8))
    adapters.told([late], frozenset({"sql"}))
    assert late.index not in adapters.lacking("sql")
